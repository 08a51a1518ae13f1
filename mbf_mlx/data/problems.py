"""Everything that is wrong with a task, collected row by row and said in one error."""

from pathlib import Path

from mbf_mlx.data.row import EXAMPLES, NAMES, Row
from mbf_mlx.errors import InputError

SHOWN = 20  # bad rows printed for each file; the rest are counted


class Problems:
    """The bad rows and bad files of one task: of each file's bad rows, the first few and the count."""

    def __init__(self) -> None:
        self.kind = ""  # kind of the task's first good row, so of every row; "" while there is none
        self._first = ""  # where that row stands
        self._files: list[str] = []
        self._shown: dict[Path, list[str]] = {}
        self._count: dict[Path, int] = {}
        self._fixed = self._example = ""

    def add_file(self, message: str) -> None:
        """Note a file that cannot be read at all."""
        self._files.append(message)

    def add_row(self, file: Path, line: int, reason: str, *, fixed: str = "", example: str = "") -> None:
        """Note a bad row.

        Args:
            file, line: Where the row stands.
            reason: What is wrong with it, in one line.
            fixed: The same row put right, where the fix is clear.
            example: Any row that fits, shown if no row could be put right.
        """
        self._count[file] = self._count.get(file, 0) + 1
        if self._count[file] <= SHOWN:
            self._shown.setdefault(file, []).append(f"  {file}:{line}: {reason}")
        self._fixed, self._example = self._fixed or fixed, self._example or example

    def same_kind(self, row: Row) -> bool:
        """Return whether a row is of the same kind as the task's first row; if it is not, note it as a bad row."""
        if not self.kind:
            self.kind, self._first = row.kind, row.where
        if row.kind == self.kind:
            return True
        expected, got = NAMES[self.kind], NAMES[row.kind]
        reason = f"expected a {expected} row as in {self._first}, got a {got} row (a task has rows of one kind)"
        self.add_row(row.file, row.line, reason, example=EXAMPLES[self.kind])
        return False

    def raise_any(self, path: Path) -> None:
        """Raise InputError if anything was noted; `path` is what the message calls the task."""
        total = sum(self._count.values())
        report = self._files.copy()
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
