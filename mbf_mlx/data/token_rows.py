"""A task's rows as tokens, in few bytes each: the tokens in a file beside memory, the rows where they came from.

Of a row 12 bytes stay in memory: where its record ends, and how many tokens it has. Small tasks are not written to a
file at all. A record is the length of the prompt and what was cut, then the tokens, all in int32, then a byte for each
token that says whether it is a label.
"""

import weakref
from array import array
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from tempfile import SpooledTemporaryFile, gettempdir
from typing import overload

import numpy as np

from mbf_mlx.data.row import Row
from mbf_mlx.files.storage import refusal

IN_MEMORY = 16 * 2**20  # bytes of records up to which there is no file


@dataclass(frozen=True, slots=True, eq=False)
class Encoded:
    """A row's tokens; `supervised[i]` says that token i is a label, to be predicted from the tokens before it."""

    tokens: np.ndarray  # int32 (n,)
    supervised: np.ndarray  # bool (n,); never the first, which nothing predicts
    prompt_length: int  # tokens before the last answer: what a generation starts from
    cut: int  # tokens that were cut because the row was too long
    row: Row


class EncodedRows(Sequence[Encoded]):
    """Encoded rows, of which one is in memory when it is asked for.

    Args:
        source: The rows they are made of, in the same order; read again for an encoded row's `row`.
        spill: A folder for the file; None is the system's own for such files. Nobody else sees the file, and it is gone
            with the process.
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
    def __getitem__(self, place: int) -> Encoded: ...
    @overload
    def __getitem__(self, place: slice) -> list[Encoded]: ...
    def __getitem__(self, place: int | slice) -> Encoded | list[Encoded]:
        if isinstance(place, slice):
            return [self[i] for i in range(*place.indices(len(self)))]
        place = range(len(self))[place]  # as lists have it: negative from the end, IndexError behind it
        start, count = self._ends[place - 1] if place else 0, self._lengths[place]
        self._file.seek(start)
        data = self._file.read(self._ends[place] - start)
        prompt_length, cut = np.frombuffer(data, np.int32, 2).tolist()
        tokens, supervised = np.frombuffer(data, np.int32, count, 8), np.frombuffer(data, bool, count, 8 + 4 * count)
        return _Stored(tokens, supervised, prompt_length, cut, self._source, place)


class _Stored(Encoded):
    """An encoded row whose `row` is read when somebody wants it."""

    _source: Sequence[Row]
    _place: int
    __slots__ = ("_place", "_source")

    def __init__(
        self,
        tokens: np.ndarray,
        supervised: np.ndarray,
        prompt_length: int,
        cut: int,
        source: Sequence[Row],
        place: int,
    ):
        values = {"tokens": tokens, "supervised": supervised, "prompt_length": prompt_length, "cut": cut}
        for name, value in (values | {"_source": source, "_place": place}).items():
            object.__setattr__(self, name, value)

    @property
    def row(self) -> Row:  # type: ignore[override]
        return self._source[self._place]
