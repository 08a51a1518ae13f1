"""A few numbers for every task of a stream: its first, best and newest score, and what tells it from other tasks.

The averages over all tasks are made from this table. A short stream makes it from its history; a long one keeps it as
a file, of 41 bytes a task, because most of its history is not read any more.
"""

import hashlib
import math
from array import array
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from mbf_mlx.errors import InputError
from mbf_mlx.files.safetensors_file import header_of, safetensors_bytes
from mbf_mlx.stream.records import TaskRecord

METRICS = ("exact_match", "rouge_l", "loss")
_NONE = math.nan  # stands in a column where there is no score
_SCORES, _MARKS = ("first", "best", "newest"), {"name": "Q", "content": "Q", "metric": "B"}
_DTYPES = {"d": "F64", "Q": "U64", "B": "U8"}


class Averages(NamedTuple):
    """Means over all tasks, in [0, 1]; None where no task counts. metrics.py has their definitions and sources."""

    accuracy: float | None
    backward_transfer: float | None
    forgetting: float | None


class TaskScores:
    """The table. A task that was not scored again after a later one counts with its newest score.

    Where a task was to be scored and could not be (its rows are gone), it has no newest score and does not count.
    """

    def __init__(self) -> None:
        self._scores = {name: array("d") for name in _SCORES}
        self._marks: dict[str, array[int]] = {name: array(code) for name, code in _MARKS.items()}

    def __len__(self) -> int:
        return len(self._scores["first"])

    def add(self, record: TaskRecord) -> None:
        """Take the scores after one more task.

        Raises:
            ValueError: the record is not the next task's.
        """
        if record.t != len(self) + 1:
            raise ValueError(f"expected task {len(self) + 1}, got task {record.t}")
        for column in self._scores.values():
            column.append(_NONE)
        self._marks["name"].append(digest(record.name))
        self._marks["content"].append(digest(record.sha256))
        self._marks["metric"].append(METRICS.index(record.metric))
        first, best, newest = (self._scores[name] for name in _SCORES)
        for task, score, _ in record.scored_tasks():
            before, value = newest[task - 1], _NONE if score is None else score
            if not math.isnan(before) and not best[task - 1] >= before:
                best[task - 1] = before
            newest[task - 1] = value
        first[-1] = newest[-1]

    def _columns(self) -> "dict[str, array[Any]]":
        return {**self._scores, **self._marks}

    def newest(self, task: int) -> float | None:
        """Return the newest score of a task, counted from 1."""
        value = self._scores["newest"][task - 1]
        return None if math.isnan(value) else float(value)

    def contents_of(self, name: str) -> list[int]:
        """Return the digests of the contents that were learned under a name."""
        wanted = digest(name)
        return [content for own, content in zip(self._marks["name"], self._marks["content"]) if own == wanted]

    def metrics(self) -> set[str]:
        """Return the metrics that the averages mix: those of all tasks but "loss"."""
        return {METRICS[code] for code in set(self._marks["metric"])} - {"loss"}

    def averages(self) -> Averages:
        """Return the means over all tasks, after the newest one."""
        first, best, newest = (self._scores[name] for name in _SCORES)
        earlier = range(len(self) - 1)
        return Averages(
            _mean(newest),
            _mean([newest[j] - first[j] for j in earlier]),
            _mean([best[j] - newest[j] for j in earlier]),
        )

    # As a file

    def to_bytes(self) -> memoryview:
        """Return the table as a safetensors file, a tensor a column."""
        import numpy as np  # only a commit needs it

        return safetensors_bytes(
            {name: np.frombuffer(column, column.typecode) for name, column in self._columns().items()}
        )

    @classmethod
    def from_bytes(cls, data: memoryview, tasks: int, where: Path) -> "TaskScores":
        """Return the table that a file holds.

        Args:
            data: The bytes of the file.
            tasks: How many tasks the stream has learned.
            where: The file, for messages.

        Raises:
            InputError: this is no such table.
        """
        table, (entries, _) = cls(), header_of(data, where)
        for name, column in table._columns().items():
            entry, dtype = entries.get(name), _DTYPES[column.typecode]
            if entry is None or (entry.dtype, entry.shape) != (dtype, (tasks,)):
                raise InputError(f"{where}: damaged: {name}: expected {tasks:,} numbers of type {dtype}")
            column.frombytes(data[entry.begin : entry.begin + entry.nbytes])
        if any(code >= len(METRICS) for code in set(table._marks["metric"])):
            raise InputError(f"{where}: damaged: metric: expected numbers below {len(METRICS)}")
        return table


def digest(text: str) -> int:
    """Return the first 64 bits of a text's sha256: enough to tell a stream's tasks apart."""
    return int.from_bytes(hashlib.sha256(text.encode(errors="surrogatepass")).digest()[:8], "little")


def _mean(values: "Sequence[float] | array[float]") -> float | None:
    known = [value for value in values if not math.isnan(value)]
    return math.fsum(known) / len(known) if known else None
