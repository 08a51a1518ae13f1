"""The rows of one file: only their places stay in memory, each row is read from the file when it is asked for.

A row costs 16 bytes of memory, whatever its length: its place, its number, and the first half of its digest, which
finds rows that say the same. Among ten million different rows, two share that half by chance in one file of 400,000.
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

BLOCK = 1 << 20  # rows compared at a time, so that temporary arrays stay small


class FileRows(Sequence[Row]):
    """Some rows of one file, in the file's order, each read when it is asked for.

    Args:
        reader: Reads single rows of the file again.
        numbers: Which of the file's rows these are, uint32 (rows,).
        places: The place of each of the file's rows.
        digests: The short digest of each of the file's rows, uint64 (all rows,).

    Raises:
        InputError: on reading, if a row no longer says what it said when the task was checked.
    """

    def __init__(self, reader: Reader, numbers: np.ndarray, places: "Places", digests: np.ndarray):
        self._reader = reader
        self._numbers = numbers
        self._places, self._digests = places, digests

    @property
    def file(self) -> Path:
        """The file that the rows stand in."""
        return self._reader.file

    def __len__(self) -> int:
        return len(self._numbers)

    @overload
    def __getitem__(self, index: int) -> Row: ...
    @overload
    def __getitem__(self, index: slice) -> "FileRows": ...
    def __getitem__(self, index: int | slice) -> "Row | FileRows":
        if isinstance(index, slice):
            return self.take(index)
        with open_binary(self.file) as handle:
            return self._read(handle, int(self._numbers[index]))

    def __iter__(self) -> Iterator[Row]:
        with open_binary(self.file) as handle:
            for number in self._numbers:
                yield self._read(handle, int(number))

    @property
    def digests(self) -> np.ndarray:
        """The short digest of each row, uint64 (rows,)."""
        everything = len(self._numbers) == len(self._digests)
        ascending = everything and bool((self._numbers[1:] > self._numbers[:-1]).all())
        return self._digests if ascending else self._digests[self._numbers]

    def take(self, which: np.ndarray | slice) -> "FileRows":
        """Return only the rows that indices, a mask or a slice choose."""
        return FileRows(self._reader, self._numbers[which], self._places, self._digests)

    def _read(self, handle: BinaryIO, number: int) -> Row:
        offset, line = self._places[number]
        try:
            row = self._reader.read(handle, offset, line)
            if row.short_digest == self._digests[number]:
                return row
        except BadRow:
            pass
        raise InputError(f"{self.file}:{line}: the row changed after it was checked: start again")


class Places:
    """The offset and line of each row of a file, in 4 bytes a row where every line holds one row.

    A run is a series of rows on consecutive lines. Each row is kept as its distance in bytes from the run's first.
    """

    def __init__(self) -> None:
        self._runs = array("I"), array("Q"), array("I")  # number, offset and line of each run's first row
        self._distances = array("I")

    def append(self, offset: int, line: int) -> None:
        """Add the place of the next row."""
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


def count_repeated(rows: FileRows) -> int:
    """Return how many rows say what an earlier row says."""
    digests = np.sort(rows.digests)
    return int(np.count_nonzero(digests[1:] == digests[:-1]))


def pick_share(rows: FileRows, share: int) -> np.ndarray:
    """Pick one in `share` of the distinct rows, at least one: those with the lowest digests.

    The choice depends on what the rows say, not on their order. Rows that say the same are all picked, or none.

    Returns:
        A mask, bool (rows,).
    """
    digests = np.sort(rows.digests)
    is_new = digests[1:] != digests[:-1]
    picked = max(1, (1 + int(np.count_nonzero(is_new))) // share)  # distinct digests
    mask: np.ndarray = rows.digests <= digests[_index_of_new(is_new, picked - 1)]
    return mask


def _index_of_new(is_new: np.ndarray, count: int) -> int:
    """Return where, in a sorted array, its value has changed `count` times.

    Args:
        is_new: is_new[i] says that element i + 1 differs from element i; at least `count` are true.
        count: Changes, from 0.
    """
    if not count:
        return 0
    start, here = 0, np.flatnonzero(is_new[:BLOCK])
    while count > len(here):
        count -= len(here)
        start += BLOCK
        here = np.flatnonzero(is_new[start : start + BLOCK])
    return start + 1 + int(here[count - 1])


def is_in(rows: FileRows, others: FileRows) -> np.ndarray:
    """Return for each row whether one of `others` says the same, bool (rows,)."""
    found = np.zeros(len(rows), bool)
    digests, known = rows.digests, np.sort(others.digests)
    for start in range(0, len(rows), BLOCK):
        block = digests[start : start + BLOCK]
        places = np.minimum(np.searchsorted(known, block), len(known) - 1)
        found[start : start + len(block)] = known[places] == block
    return found
