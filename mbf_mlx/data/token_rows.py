"""A task's rows as tokens, in little memory: large tasks keep their tokens in a temporary file.

12 bytes of each row stay in memory: where its record ends, and how many tokens it has. The text of a row is read again
from the task's file when somebody asks for it. A record is the length of the prompt and the number of cut tokens, then
the tokens, all as int32, then one byte for each token that says whether it is a label.
"""

import weakref
from array import array
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from tempfile import SpooledTemporaryFile, gettempdir
from typing import overload

import numpy as np

from mbf_mlx.data.row import Row
from mbf_mlx.files.storage import refusal

IN_MEMORY = 16 * 2**20  # bytes of records that are kept in memory; more go to a file


class Encoded:
    """A row's tokens, with those marked that are labels.

    Attributes:
        tokens: int32 (n,).
        supervised: bool (n,); supervised[i] says that token i is a label, to be predicted from the tokens before it.
            The first token never is one.
        prompt_length: Tokens before the last answer, from which that answer is generated.
        cut: Tokens that were cut because the row was too long.
    """

    __slots__ = ("_row", "cut", "prompt_length", "supervised", "tokens")

    def __init__(
        self,
        tokens: np.ndarray,
        supervised: np.ndarray,
        prompt_length: int,
        cut: int,
        row: Row | Callable[[], Row],
    ):
        self.tokens = tokens
        self.supervised = supervised
        self.prompt_length = prompt_length
        self.cut = cut
        self._row = row

    @property
    def row(self) -> Row:
        """The row that the tokens were made of; it may be read from its file now."""
        return self._row if isinstance(self._row, Row) else self._row()


class EncodedRows(Sequence[Encoded]):
    """Encoded rows, each loaded when it is asked for.

    Args:
        source: The rows that they are made of, in the same order.
        spill: The folder for the temporary file; None is the system's own. The file has no name, and it is gone when
            the process ends.
    """

    def __init__(self, source: Sequence[Row], spill: Path | None = None):
        self._source = source
        self._folder = Path(gettempdir()) if spill is None else spill
        self._file = SpooledTemporaryFile[bytes](IN_MEMORY, dir=str(self._folder))
        weakref.finalize(self, self._file.close)
        self._ends, self._lengths = array("Q"), array("I")
        self.cut_rows = 0  # rows that were too long

    def append(self, encoded: Encoded) -> None:
        """Add the next row.

        Raises:
            InputError: the disk is full, or refuses the file.
        """
        head = np.array([encoded.prompt_length, encoded.cut], np.int32)
        parts = (head, encoded.tokens.astype(np.int32), encoded.supervised.astype(bool))
        try:
            self._file.seek(0, 2)
            for part in parts:
                self._file.write(part.tobytes())
        except OSError as error:
            raise refusal(error, self._folder, sum(part.nbytes for part in parts)) from error
        self._ends.append(self._file.tell())
        self._lengths.append(len(encoded.tokens))
        self.cut_rows += encoded.cut > 0

    @property
    def lengths(self) -> np.ndarray:
        """Tokens of each row, uint32 (rows,)."""
        return np.array(self._lengths, np.uint32)

    def __len__(self) -> int:
        return len(self._lengths)

    @overload
    def __getitem__(self, index: int) -> Encoded: ...
    @overload
    def __getitem__(self, index: slice) -> list[Encoded]: ...
    def __getitem__(self, index: int | slice) -> Encoded | list[Encoded]:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        index = range(len(self))[index]  # as in a list: negative from the end, IndexError beyond it
        start, count = self._ends[index - 1] if index else 0, self._lengths[index]
        self._file.seek(start)
        data = self._file.read(self._ends[index] - start)
        prompt_length, cut = np.frombuffer(data, np.int32, 2).tolist()
        tokens, supervised = np.frombuffer(data, np.int32, count, 8), np.frombuffer(data, bool, count, 8 + 4 * count)
        return Encoded(tokens, supervised, prompt_length, cut, partial(self._source.__getitem__, index))
