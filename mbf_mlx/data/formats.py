"""The file formats of a task, one reader each: here JSON lines and tables, the benchmarks' in benchmark_formats.py.

A reader goes through its file once (`scan`) and gives every row's place, with the row or the reason why it does not
fit. Later it reads single rows again by their place (`read`), so the rows of a large file are never in memory together.
Which files make up a task is left to task_files.py.
"""

import csv
import hashlib
import json
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import BinaryIO, NamedTuple

from mbf_mlx.data.json_stream import parse_json
from mbf_mlx.data.row import EXAMPLES, READ, BadRow, Row, held_keys, row_from
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


_COLUMNS = ("prompt", "completion", "text", "system")  # all others are not read


class Table(Reader):
    """CSV (commas) or TSV (tabs) whose first row names the columns: prompt and completion, or text."""

    def __init__(self, file: Path):
        super().__init__(file)
        self.tabs = file.suffix.lower() == ".tsv"
        comma = "\t" if self.tabs else ","
        self.example = f"prompt{comma}completion\n  Is this mail spam? You won!{comma}yes"
        self.columns: list[str] = []

    def scan(self) -> Iterator[Found]:
        """Yield the row of every record below the header; if the header does not fit, yield only its error."""
        csv.field_size_limit(MAX_LINE)
        with open_binary(self.file) as handle:
            for offset, line, cells in self._records(lines(handle, self.sha256.update)):
                if self.columns:
                    yield Found(offset, line, row_or_reason(self._row, cells, line))
                    continue
                try:
                    self.columns = self._header(cells)
                except BadRow as error:
                    yield Found(offset, line, error)
                    return

    def read(self, handle: BinaryIO, offset: int, line: int) -> Row:
        """Return the row of the record that begins at `offset`."""
        handle.seek(offset)
        for _, _, cells in self._records(lines(handle)):
            return self._row(cells, line)
        raise BadRow("the file ends here")

    def _records(self, lines: Iterator[tuple[int, int, bytes | None]]) -> Iterator[tuple[int, int, list[str] | BadRow]]:
        """Yield offset, line and cells of each record; one in quotes may span several lines."""
        start: list[tuple[int, int]] = []
        problem: list[BadRow] = []

        def texts() -> Iterator[str]:
            for offset, line, raw in lines:
                if not start:
                    start.append((offset, line))
                try:
                    yield decode(raw)
                except BadRow as error:
                    problem.append(error)
                    yield "\n"

        records = csv.reader(texts(), delimiter="\t" if self.tabs else ",", strict=True)
        while True:
            start.clear()
            problem.clear()
            cells: list[str] | BadRow
            try:
                cells = next(records)
            except StopIteration:
                return
            except csv.Error as error:
                cells = BadRow(
                    f'broken table row: {error} (put a field with quotes in it into quotes and double them: "")'
                )
            if problem:
                cells = problem[0]
            if cells:
                yield *start[0], cells

    def _header(self, cells: list[str] | BadRow) -> list[str]:
        if isinstance(cells, BadRow):
            raise cells
        names = [cell.strip().lower() for cell in cells]
        if not {"prompt", "completion"} <= set(names) and "text" not in names:
            shown = ", ".join(json.dumps(cell[:40]) for cell in cells[:6])
            hint = ""
            if len(cells) == 1 and any(mark in cells[0] for mark in ";\t,"):
                hint = f" (columns of a {self.file.suffix} file are separated by {'tabs' if self.tabs else 'commas'})"
            raise BadRow(f'expected columns named "prompt" and "completion", or "text", got {shown}{hint}')
        for name in _COLUMNS:
            if names.count(name) > 1:
                raise BadRow(f'the column "{name}" stands twice')
        return names

    def _row(self, cells: list[str] | BadRow, line: int) -> Row:
        if isinstance(cells, BadRow):
            raise cells
        if len(cells) != len(self.columns):
            raise BadRow(f"expected {len(self.columns)} fields as in the first line, got {len(cells)}")
        named = dict(zip(self.columns, cells, strict=True))
        kind = "completion" if {"prompt", "completion"} <= named.keys() else "text"
        read = {name: cell for name, cell in named.items() if name in READ[kind] & {*_COLUMNS}}
        return replace(row_from(read, self.file, line), unread=held_keys(named, read.keys()))


def row_or_reason(make: Callable[..., Row], what: object, line: int) -> Row | BadRow:
    """Return the row `make(what, line)`, or the reason why there is none."""
    try:
        return make(what, line)
    except BadRow as error:
        return error
    except RecursionError:
        return BadRow("nested too deeply")
