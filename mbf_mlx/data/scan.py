"""The first pass over one file of a task: where its good rows stand, what is wrong with the others, its labels."""

from array import array
from collections import Counter
from collections.abc import Callable

import numpy as np

from mbf_mlx.data.file_rows import FileRows, Places
from mbf_mlx.data.formats import Reader
from mbf_mlx.data.labels import Labels
from mbf_mlx.data.problems import Problems
from mbf_mlx.data.row import BadRow, Row, Skipped, reference_text
from mbf_mlx.errors import InputError

MAX_KEYS = 20  # from so many keys that are not read, others are counted together
OTHERS = "others"
REPORT_ROWS = 5000  # rows between two reports of progress


class Scan:
    """What one pass over a file found.

    Args:
        reader: The file's reader.
        problems: Takes the rows that do not fit.
        report: Called now and then with the number of bytes read.

    Raises:
        InputError: the file as a whole does not fit, or has no rows.
    """

    def __init__(self, reader: Reader, problems: Problems, report: Callable[[int], None] = lambda offset: None):
        self.reader = reader
        self.labels = Labels()
        self.skipped = Counter[str]()  # reason -> rows
        self.unread = Counter[str]()  # key that is not read -> rows
        self._places, self._digests = Places(), array("Q")
        found = 0
        for number, (offset, line, row) in enumerate(reader.scan()):
            if number % REPORT_ROWS == 0:
                report(offset)
            if isinstance(row, Skipped):
                self.skipped[str(row)] += 1
                continue
            found += 1
            if isinstance(row, BadRow):
                problems.add_row(reader.file, line, str(row), fixed=row.fixed, example=row.example or reader.example)
            elif problems.same_kind(row):
                self._note(offset, row)
        if not found:
            raise InputError(f"{reader.file}: expected rows, got none")

    def rows(self) -> FileRows:
        """Return the rows that fit."""
        numbers = np.arange(len(self._places), dtype=np.uint32)
        return FileRows(self.reader, numbers, self._places, np.frombuffer(self._digests, np.uint64))

    def _note(self, offset: int, row: Row) -> None:
        self._places.append(offset, row.line)
        self._digests.append(row.short_digest)
        few = len(self.unread) < MAX_KEYS
        self.unread.update(list(dict.fromkeys(key if few or key in self.unread else OTHERS for key in row.unread)))
        if label := reference_text(row):
            self.labels.add(label)
