"""One split of a task: a file gone through once, its rows remembered by their places, read again when asked for.

A row costs 16 bytes of memory, whatever its length: where it stands, the first half of its digest, by which rows that
say the same are found, and its number. Of ten million different rows two meet by chance in one file of 400,000.
"""

from array import array
from bisect import bisect_right
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import BinaryIO, overload

import numpy as np

from mbf_mlx.data.formats import Reader
from mbf_mlx.data.row import BadRow, Row
from mbf_mlx.data.text_file import open_binary
from mbf_mlx.errors import InputError

_PART = 1 << 20  # rows that are compared at a time: what is made of them on the way stays small
MAX_LABELS = 64  # distinct completions that are remembered one by one


class Rows(Sequence[Row]):
    """Some rows of one file, in the file's order, read when they are asked for.

    Raises:
        InputError: on reading, a row no longer says what it said when the task was checked.
    """

    def __init__(self, reader: Reader, places: np.ndarray, stand: "Places", digests: np.ndarray):
        self.reader = reader
        self.places = places  # uint32 (rows,): which of the file's rows these are
        self._stand, self._digests = stand, digests  # of all the file's rows; uint64 (all rows,)

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
        ascending = len(self.places) == len(self._digests) and bool((self.places[1:] > self.places[:-1]).all())
        return self._digests if ascending else self._digests[self.places]

    def take(self, which: np.ndarray | slice) -> "Rows":
        """Return the rows that indices, a mask or a slice name, and no others."""
        return Rows(self.reader, self.places[which], self._stand, self._digests)

    def _read(self, handle: BinaryIO, place: int) -> Row:
        offset, line = self._stand[place]
        try:
            row = self.reader.read(handle, offset, line)
            if _half(row.digest) == self._digests[place]:
                return row
        except BadRow:
            pass
        raise InputError(f"{self.file}:{line}: the row changed after it was checked: start again")


class Places:
    """The offset and line of each row of a file, in 4 bytes a row where every line holds one.

    A run is rows whose lines follow each other. What is kept of a row is its distance in bytes from the run's first.
    """

    def __init__(self) -> None:
        self._runs = array("I"), array("Q"), array("I")  # number, offset and line of each run's first row
        self._distances = array("I")

    def append(self, offset: int, line: int) -> None:
        """Note the next row."""
        firsts, offsets, lines = self._runs
        number = len(self._distances)
        if not firsts or line - lines[-1] != number - firsts[-1] or offset - offsets[-1] >= 1 << 32:
            firsts.append(number)
            offsets.append(offset)
            lines.append(line)
        self._distances.append(offset - offsets[-1])

    def __len__(self) -> int:
        return len(self._distances)

    def __getitem__(self, number: int) -> tuple[int, int]:
        firsts, offsets, lines = self._runs
        run = bisect_right(firsts, number) - 1
        return offsets[run] + self._distances[number], lines[run] + number - firsts[run]


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
    differ = digests[1:] != digests[:-1]  # from the one before
    wanted = max(1, (1 + int(np.count_nonzero(differ))) // share) - 1  # how many of these come before the last one held
    for start in range(0, len(differ), _PART):
        count = int(np.count_nonzero(differ[start : start + _PART]))
        if wanted <= count:
            place = start + 1 + int(np.flatnonzero(differ[start : start + _PART])[wanted - 1]) if wanted else 0
            return rows.digests <= digests[place]
        wanted -= count
    return rows.digests <= digests[0]


def standing_in(rows: Rows, others: Rows) -> np.ndarray:
    """Return for each row whether it is also among the others, bool (rows,)."""
    found = np.zeros(len(rows), bool)
    digests, known = rows.digests, np.sort(others.digests)
    for start in range(0, len(rows), _PART):
        part = digests[start : start + _PART]
        places = np.minimum(np.searchsorted(known, part), len(known) - 1)
        found[start : start + len(part)] = known[places] == part
    return found
