"""The file formats of a task, one reader each: here what they share, and JSON lines.

Tables are read in tables.py, the JSON of published benchmarks in benchmark_formats.py.

A reader goes through its file once (`scan`) and gives every row's place, with the row or the reason why it does not
fit. Later it reads single rows again by their place (`read`), so the rows of a large file are never in memory together.
Which files make up a task is left to task_files.py.
"""

import hashlib
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import BinaryIO, NamedTuple

from mbf_mlx.data.json_stream import parse_json
from mbf_mlx.data.row import EXAMPLES, BadRow, Row, row_from
from mbf_mlx.data.text_file import MAX_LINE, decode, lines, open_binary


class Found(NamedTuple):
    """A row's place, with the row or the reason why it does not fit."""

    offset: int  # bytes from the start of the file
    line: int  # from 1
    row: Row | BadRow


class Reader(ABC):
    """What the formats share: the file, an example of a row that fits, and a hash over everything that was read."""

    example = EXAMPLES["completion"]

    def __init__(self, file: Path):
        self.file = file
        self.sha256 = hashlib.sha256()

    @abstractmethod
    def scan(self) -> Iterator[Found]:
        """Yield every row of the file in order.

        Raises:
            InputError: the file as a whole does not fit: it cannot be read, is empty, or is not text in UTF-8.
        """

    def notes(self) -> list[str]:
        """Return what the user should know of how the file was read, after `scan`."""
        return []

    @abstractmethod
    def read(self, handle: BinaryIO, offset: int, line: int) -> Row:
        """Return the row that `scan` found at `offset` and `line` of the open file.

        Raises:
            BadRow: the row is no longer there: the file was changed.
        """


class JsonLines(Reader):
    """mlx-lm's rows, one JSON object a line."""

    def scan(self) -> Iterator[Found]:
        """Yield the row of every line that is not blank."""
        with open_binary(self.file) as handle:
            for offset, line, raw in lines(handle, self.sha256.update):
                if raw is None or raw.strip():
                    yield Found(offset, line, row_or_reason(self._row, raw, line))

    def read(self, handle: BinaryIO, offset: int, line: int) -> Row:
        """Return the row of the line at `offset`."""
        handle.seek(offset)
        return self._row(handle.readline(MAX_LINE + 2), line)

    def _row(self, raw: bytes | None, line: int) -> Row:
        return row_from(parse_json(decode(raw).rstrip(" \t\r\n")), self.file, line)


def row_or_reason(make: Callable[..., Row], what: object, line: int) -> Row | BadRow:
    """Return the row `make(what, line)`, or the reason why there is none."""
    try:
        return make(what, line)
    except BadRow as error:
        return error
    except RecursionError:
        return BadRow("nested too deeply")
