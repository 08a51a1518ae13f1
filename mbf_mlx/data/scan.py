"""One reading of a task's file: its rows, what is wrong with them, its hash and labels."""

import hashlib
from array import array
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import numpy as np

from mbf_mlx.data.file_rows import MAX_LABELS, Places, Rows, _half
from mbf_mlx.data.formats import Reader
from mbf_mlx.data.row import EXAMPLES, NAMES, BadRow, Row, Skipped, reference_text
from mbf_mlx.errors import InputError

SHOWN = 20  # bad rows of a file that are printed; the rest is counted


REPORT_ROWS = 5000  # between two reports of how far reading is


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
        self._numbers: dict[str, int] = {}  # the hashes of the first of them, most files' only ones
        self.skipped = Counter[str]()  # reason -> rows
        self.unread = Counter[str]()  # key beside "text" that looks like an answer -> rows
        self._stand, self._digests = Places(), array("Q")
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
        places = np.arange(len(self._stand), dtype=np.uint32)
        return Rows(self.reader, places, self._stand, np.frombuffer(self._digests, np.uint64))

    def _note(self, offset: int, row: Row, problems: Problems) -> None:
        if not problems.kind:
            problems.kind, problems.first = row.kind, row.where
        if row.kind != problems.kind:
            expected, got = NAMES[problems.kind], NAMES[row.kind]
            reason = f"expected a {expected} row as in {problems.first}, got a {got} row (a task has rows of one kind)"
            problems.add(row.file, row.line, reason, example=EXAMPLES[problems.kind])
            return
        self._stand.append(offset, row.line)
        self._digests.append(_half(row.digest))
        if row.unread:
            self.unread[row.unread] += 1
        if label := reference_text(row):
            if len(self.labels) <= MAX_LABELS:
                self.labels.add(label)
            if (number := self._numbers.get(label)) is None:
                number = int.from_bytes(hashlib.blake2b(label.encode(), digest_size=16).digest())
                if len(self._numbers) <= MAX_LABELS:
                    self._numbers[label] = number
            self.all_labels = (self.all_labels + number) % 2**128
