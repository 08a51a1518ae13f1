"""One split of a task: a file gone through once, its rows remembered by their places, read again when asked for.

A row costs 20 bytes of memory, whatever its length: where it stands, and the first half of its digest, by which rows
that say the same are found. Of ten million different rows two meet by chance in one file of 400,000.
"""

import hashlib
from array import array
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import BinaryIO, overload

import numpy as np

from mbf_mlx.errors import InputError
from mbf_mlx.formats import Reader
from mbf_mlx.reading import open_binary
from mbf_mlx.rows import EXAMPLES, NAMES, BadRow, Row, Skipped, reference_text

SHOWN = 20  # bad rows of a file that are printed; the rest is counted
REPORT_ROWS = 5000  # between two reports of how far reading is
MAX_LABELS = 64  # distinct completions that are remembered one by one


class Rows(Sequence[Row]):
    """Some rows of one file, in the file's order, read when they are asked for.

    Raises:
        InputError: on reading, a row no longer says what it said when the task was checked.
    """

    def __init__(self, reader: Reader, places: np.ndarray, columns: tuple[np.ndarray, np.ndarray, np.ndarray]):
        self.reader = reader
        self.places = places  # uint32 (rows,): which of the file's rows these are; the columns are all its rows'
        self._offsets, self._lines, self._digests = columns  # uint64 in bytes, uint32, uint64

    @property
    def file(self) -> Path:
        """The file that the rows stand in."""
        return self.reader.file

    def __len__(self) -> int:
        return len(self.places)

    @overload
    def __getitem__(self, place: int) -> Row: ...
    @overload
    def __getitem__(self, place: slice) -> "Rows": ...
    def __getitem__(self, place: int | slice) -> "Row | Rows":
        if isinstance(place, slice):
            return self.take(place)
        with open_binary(self.file) as handle:
            return self._read(handle, int(self.places[place]))

    def __iter__(self) -> Iterator[Row]:
        with open_binary(self.file) as handle:
            for place in self.places:
                yield self._read(handle, int(place))

    @property
    def digests(self) -> np.ndarray:
        """Half the digest of each row, uint64 (rows,)."""
        return self._digests[self.places]

    def take(self, which: np.ndarray | slice) -> "Rows":
        """Return the rows that indices, a mask or a slice name, and no others."""
        return Rows(self.reader, self.places[which], (self._offsets, self._lines, self._digests))

    def _read(self, handle: BinaryIO, place: int) -> Row:
        line = int(self._lines[place])
        try:
            row = self.reader.read(handle, int(self._offsets[place]), line)
            if _half(row.digest) == self._digests[place]:
                return row
        except BadRow:
            pass
        raise InputError(f"{self.file}:{line}: the row changed after it was checked: start again")


class Problems:
    """Everything that is wrong with a task, to be said at once; of each file's bad rows the first and the count."""

    def __init__(self) -> None:
        self.kind = ""  # of the task's first row that fits, and so of all
        self.first = ""  # where that row stands
        self.files: list[str] = []  # what is wrong with whole files
        self._shown: dict[Path, list[str]] = {}
        self._count: dict[Path, int] = {}
        self._fixed = self._example = ""

    def add(self, file: Path, line: int, reason: str, *, fixed: str = "", example: str = "") -> None:
        """Note a bad row, the row put right where that can be told, and an example of one that fits."""
        self._count[file] = self._count.get(file, 0) + 1
        if self._count[file] <= SHOWN:
            self._shown.setdefault(file, []).append(f"  {file}:{line}: {reason}")
        self._fixed, self._example = self._fixed or fixed, self._example or example

    def raise_any(self, path: Path) -> None:
        """Raise InputError if there are any."""
        total = sum(self._count.values())
        report = self.files.copy()
        if total:
            report.append(f"{path}: {total} {'row does' if total == 1 else 'rows do'} not fit:")
        for file, shown in self._shown.items():
            report += shown
            if self._count[file] > len(shown):
                report.append(f"  … and {self._count[file] - len(shown)} more in {file}")
        if example := self._fixed or self._example:
            report.append(f"  a row that fits: {example}")
        if report:
            raise InputError("\n".join(report))


class Scan:
    """One pass over a split's file: where its good rows stand; what is wrong goes to `problems`."""

    def __init__(self, reader: Reader, problems: Problems, report: Callable[[int], None] = lambda offset: None):
        self.reader = reader
        self.labels: set[str] = set()  # distinct completions, one more than MAX_LABELS at most
        self.all_labels = 0  # a hash over all completions, whatever their order
        self.skipped = Counter[str]()  # reason -> rows
        self.unread = Counter[str]()  # key beside "text" that looks like an answer -> rows
        self._offsets, self._lines, self._digests = array("Q"), array("I"), array("Q")
        found = 0
        for place, (offset, line, row) in enumerate(reader.scan()):
            found += not isinstance(row, Skipped)
            if place % REPORT_ROWS == 0:
                report(offset)
            if isinstance(row, Skipped):
                self.skipped[str(row)] += 1
            elif isinstance(row, BadRow):
                problems.add(reader.file, line, str(row), fixed=row.fixed, example=row.example or reader.example)
            else:
                self._note(offset, row, problems)
        if not found:
            raise InputError(f"{reader.file}: expected rows, got none")

    def rows(self) -> Rows:
        """Return the rows that fit."""
        offsets, digests = np.frombuffer(self._offsets, np.uint64), np.frombuffer(self._digests, np.uint64)
        places = np.arange(len(offsets), dtype=np.uint32)
        return Rows(self.reader, places, (offsets, np.frombuffer(self._lines, np.uint32), digests))

    def _note(self, offset: int, row: Row, problems: Problems) -> None:
        if not problems.kind:
            problems.kind, problems.first = row.kind, row.where
        if row.kind != problems.kind:
            expected, got = NAMES[problems.kind], NAMES[row.kind]
            reason = f"expected a {expected} row as in {problems.first}, got a {got} row (a task has rows of one kind)"
            problems.add(row.file, row.line, reason, example=EXAMPLES[problems.kind])
            return
        self._offsets.append(offset)
        self._lines.append(row.line)
        self._digests.append(_half(row.digest))
        if row.unread:
            self.unread[row.unread] += 1
        if label := reference_text(row):
            if len(self.labels) <= MAX_LABELS:
                self.labels.add(label)
            digest = hashlib.blake2b(label.encode(), digest_size=16).digest()
            self.all_labels = (self.all_labels + int.from_bytes(digest)) % 2**128


def _half(digest: bytes) -> int:
    return int.from_bytes(digest[:8])


def repeated(rows: Rows) -> int:
    """Return how many rows say what an earlier one says."""
    digests = np.sort(rows.digests)
    return int(np.count_nonzero(digests[1:] == digests[:-1]))


def lowest(rows: Rows, share: int) -> np.ndarray:
    """Return a mask of one in `share` of the rows that differ, at least one, whatever their order.

    Rows that say the same are all in it, or none.
    """
    digests = np.sort(rows.digests)
    first = np.flatnonzero(np.concatenate(([True], digests[1:] != digests[:-1])))
    return rows.digests <= digests[first[max(1, len(first) // share) - 1]]


def standing_in(rows: Rows, others: Rows) -> np.ndarray:
    """Return for each row whether it is also among the others, bool (rows,)."""
    found = np.zeros(len(rows), bool)
    digests, known = rows.digests, np.sort(others.digests)
    for start in range(0, len(rows), 1 << 20):
        part = digests[start : start + (1 << 20)]
        places = np.minimum(np.searchsorted(known, part), len(known) - 1)
        found[start : start + len(part)] = known[places] == part
    return found
