"""Readers of tables: CSV, and TSV, whose first row names the columns.

In a CSV file a field in quotes may hold commas, doubled quotes and line ends. TSV files are written in two ways: with
the same quotes, or with none at all, and then a field may begin with a quote that means itself.
"""

import csv
import json
from abc import abstractmethod
from collections import deque
from collections.abc import Iterable, Iterator
from dataclasses import replace
from itertools import chain
from pathlib import Path
from typing import BinaryIO, NamedTuple

from mbf_mlx.data.formats import Found, Reader, row_or_reason
from mbf_mlx.data.row import READ, BadRow, Row, held_keys, row_from
from mbf_mlx.data.text_file import MAX_LINE, decode, lines, open_binary

Line = tuple[int, int, bytes | None]  # offset, number and bytes of a line, as text_file.lines gives them

_COLUMNS = ("prompt", "completion", "text", "system")  # all others are not read
_EXAMPLES = {"completion": ("Is this mail spam? You won!", "yes"), "text": ("Ferns are plants without flowers.",)}
_AHEAD = 20  # lines with the right number of fields behind which nobody looks for the other end of a quote


class Record(NamedTuple):
    """One row of a table."""

    offset: int  # bytes from the start of the file
    line: int  # from 1
    cells: list[str] | BadRow
    lines: int  # how many lines it has


class Table(Reader):
    """A table with the columns prompt and completion, or text; perhaps system, too."""

    comma: str  # what separates columns
    commas: str  # the word for them

    def __init__(self, file: Path):
        super().__init__(file)
        self.columns: list[str] = []
        self.example = self._example("completion")
        self._long, self._first_long = 0, (0, 0)  # rows of several lines, and the first one's first and last line

    def scan(self) -> Iterator[Found]:
        """Yield the row of every record below the header; if the header does not fit, yield only its error."""
        csv.field_size_limit(MAX_LINE)
        with open_binary(self.file) as handle:
            for offset, line, cells, count in self._records(lines(handle, self.sha256.update)):
                if self.columns:
                    if count > 1:
                        self._first_long = self._first_long if self._long else (line, line + count - 1)
                        self._long += 1
                    yield Found(offset, line, row_or_reason(self._row, cells, line))
                    continue
                try:
                    self.columns = self._header(cells)
                except BadRow as error:
                    yield Found(offset, line, error)
                    return
                self.example = self._example(self._kind())

    def read(self, handle: BinaryIO, offset: int, line: int) -> Row:
        """Return the row of the record that begins at `offset`."""
        handle.seek(offset)
        for record in self._records(lines(handle)):
            return self._row(record.cells, line)
        raise BadRow("the file ends here")

    def notes(self) -> list[str]:
        """Say how many rows have several lines: one quote too many would do it, too."""
        if not self._long:
            return []
        count = f"{self._long} row in quotes goes" if self._long == 1 else f"{self._long} rows in quotes go"
        first, last = self._first_long
        return [f"{self.file}: {count} over several lines (the first: {first} to {last})"]

    @abstractmethod
    def _records(self, lines: Iterator[Line]) -> Iterator[Record]:
        """Yield every record that is not empty."""

    def _example(self, kind: str) -> str:
        names = ("prompt", "completion") if kind == "completion" else ("text",)
        return f"{self.comma.join(names)}\n  {self.comma.join(_EXAMPLES[kind])}"

    def _kind(self) -> str:
        return "completion" if {"prompt", "completion"} <= {*self.columns} else "text"

    def _header(self, cells: list[str] | BadRow) -> list[str]:
        if isinstance(cells, BadRow):
            raise cells
        names = [cell.strip().lower() for cell in cells]
        if not {"prompt", "completion"} <= set(names) and "text" not in names:
            shown = ", ".join(json.dumps(cell[:40]) for cell in cells[:6])
            hint = ""
            if len(cells) == 1 and any(mark in cells[0] for mark in ";\t,"):
                hint = f" (columns of a {self.file.suffix} file are separated by {self.commas})"
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
        read = {name: cell for name, cell in named.items() if name in READ[self._kind()] & {*_COLUMNS}}
        try:
            return replace(row_from(read, self.file, line), unread=held_keys(named, read.keys()))
        except BadRow as error:
            raise BadRow(str(error)) from None  # without the example of a row in JSON


class CommaTable(Table):
    """CSV."""

    comma, commas = ",", "commas"

    def _records(self, lines: Iterator[Line]) -> Iterator[Record]:
        used: list[Line] = []
        problem: list[BadRow] = []

        def texts() -> Iterator[str]:
            for line in lines:
                used.append(line)
                try:
                    yield decode(line[2])
                except BadRow as error:
                    problem.append(error)
                    yield "\n"

        records = csv.reader(texts(), strict=True)
        while True:
            used.clear()
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
                yield Record(*used[0][:2], cells, len(used))


class TabTable(Table):
    """TSV.

    A field that begins with a quote is in quotes if they end before a tab or a line end, and the row then has as many
    fields as the table has columns. Lines that are all rows as they stand are not put together, unless the table has
    one column: there every line would be a row.
    """

    comma, commas = "\t", "tabs"

    def _records(self, lines: Iterator[Line]) -> Iterator[Record]:
        waiting = deque[Line]()  # lines that were looked at and belong to no record yet, the next one first
        while (line := waiting.popleft() if waiting else next(lines, None)) is not None:
            offset, number, raw = line
            try:
                text = decode(raw)
            except BadRow as error:
                yield Record(offset, number, error, 1)
                continue
            if not text.strip("\r\n"):
                continue
            cells, count = self._cells(text), 1
            if self.columns and _is_open(text):
                merged, looked_at = self._merge(text, cells, chain(waiting, lines))
                for _ in range(min(len(looked_at), len(waiting))):
                    waiting.popleft()
                if merged:
                    cells, count = merged, 1 + len(looked_at)
                else:
                    waiting.extendleft(reversed(looked_at))
            yield Record(offset, number, cells, count)

    def _cells(self, text: str) -> list[str]:
        """Return the fields of a line as it stands, without quotes around a field."""
        bare = text.removesuffix("\n").removesuffix("\r")
        literal = bare.split("\t")
        if '"' not in bare:
            return literal
        quoted = _parse([text])
        if quoted and len(quoted) == (len(self.columns) or len(quoted)):
            return quoted
        return [(_parse([cell]) or [cell])[0] if cell else cell for cell in literal]

    def _is_row(self, cells: list[str]) -> bool:
        """Return whether a line may be a row as it stands: it has every field, and a text where one is needed."""
        needed = zip(self.columns, cells, strict=False)
        texts = all(cell.strip() for name, cell in needed if name in READ[self._kind()] - {"system"})
        return texts and len(cells) == len(self.columns) > 1

    def _merge(self, text: str, cells: list[str], following: Iterator[Line]) -> tuple[list[str] | None, list[Line]]:
        """Put a line whose last quote is open together with those behind it, up to the quote's end.

        Returns:
            The fields, None where the line is a row of its own; and the lines behind it that were looked at.
        """
        looked_at: list[Line] = []
        rows = self._is_row(cells)  # whether all lines so far are rows as they stand

        def texts() -> Iterator[str]:
            nonlocal rows
            yield text
            size = len(text)
            while not (rows and len(looked_at) == _AHEAD) and (line := next(following, None)) is not None:
                looked_at.append(line)
                size += len(line[2] or b"")
                if line[2] is None or size > MAX_LINE:
                    return
                more = decode(line[2])
                rows = rows and self._is_row(self._cells(more))
                yield more

        merged = _parse(texts())
        good = merged is not None and len(merged) == len(self.columns) and not rows
        return merged if good else None, looked_at


def _parse(texts: Iterable[str]) -> list[str] | None:
    """Return the fields of the record that `texts` begin with, read with quotes; None where they do not fit."""
    try:
        return next(csv.reader(texts, delimiter="\t", strict=True), None)
    except (csv.Error, BadRow):
        return None


def _is_open(text: str) -> bool:
    """Return whether a line ends within quotes."""
    if '"' not in text:
        return False
    try:
        next(csv.reader([text], delimiter="\t", strict=True), None)
    except csv.Error as error:
        return "unexpected end of data" in str(error)
    return False
