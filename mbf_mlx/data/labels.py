"""The distinct answers of a task: their list while they are few, a hash once they are many."""

import hashlib
from collections.abc import Sequence

MAX_LABELS = 64  # distinct answers that are listed one by one


class Labels:
    """The answers of one file, added row by row. However many there are, memory stays small."""

    def __init__(self) -> None:
        self._distinct: set[str] = set()  # at most MAX_LABELS + 1
        self._hash_of: dict[str, int] = {}  # for the first answers: in most files there are no others
        self._sum = 0  # of the hashes of all answers, repeated ones included: it does not depend on their order

    def add(self, label: str) -> None:
        """Add the answer of one row."""
        if len(self._distinct) <= MAX_LABELS:
            self._distinct.add(label)
        if (number := self._hash_of.get(label)) is None:
            number = int.from_bytes(hashlib.blake2b(label.encode(), digest_size=16).digest())
            if len(self._hash_of) <= MAX_LABELS:
                self._hash_of[label] = number
        self._sum += number

    @staticmethod
    def together(files: "Sequence[Labels]") -> tuple[str, ...] | str:
        """Return the sorted distinct answers of several files, or a hash in hex if there are over MAX_LABELS."""
        distinct = set[str]().union(*(labels._distinct for labels in files))
        if len(distinct) <= MAX_LABELS:
            return tuple(sorted(distinct))
        return f"{sum(labels._sum for labels in files) % 2**128:032x}"
