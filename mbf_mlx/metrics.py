"""Measures of continual learning, from scores alone: what is known at the end, what was lost, what helped.

R is a list of rows, one a learned task: R[i][j] is the score on task j after learning task i, counted here from 0. A
row may end at its own task or go on to tasks not learned yet. None stands where nothing was scored (no test rows, a
file that is gone); a task whose scores are needed and missing is left out of a mean, and the mean says so. Scores keep
their unit (accuracies: [0, 1]). T is the number of rows. This file runs no model.

Source: Lopez-Paz and Ranzato 2017, arXiv:1706.08840 (backward and forward transfer, divided by T - 1); Chaudhry et al.
2018, arXiv:1801.10112 (forgetting); Riemer et al. 2019, arXiv:1810.11910 (learning accuracy); Yoon et al. 2020,
arXiv:1902.09432 (order disparity).
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple

Scores = Sequence[Sequence[float | None]]


class Mean(NamedTuple):
    """A mean over tasks that tells what it could not count."""

    value: float | None  # None where no task could be counted
    over: int  # how many tasks were counted
    missing: tuple[int, ...] = ()  # tasks left out because a score is missing, from 1 as users count them


class Spread(NamedTuple):
    """A mean over seeds with its sample standard deviation."""

    mean: float | None
    deviation: float | None  # None for fewer than two values
    over: int  # how many values were there


class Disparity(NamedTuple):
    """How much the order of the tasks decides a task's final score: the largest and the average range over orders."""

    largest: float | None  # MOPD; None where no task was scored in two orders or more
    average: float | None  # AOPD
    missing: tuple[str, ...] = ()  # tasks that some order did not score


def average_accuracy(scores: Scores) -> Mean:
    """Return the mean over all tasks of the score after the last one, mean over j of R[T, j]."""
    last = len(scores) - 1
    return _mean([_at(scores, last, j) for j in range(len(scores))])


def backward_transfer(scores: Scores) -> Mean:
    """Return the mean over j < T of R[T, j] - R[j, j]: below 0 where later tasks cost earlier ones.

    Divided by T - 1, the tasks that have a later one; some published scripts divide by T.
    """
    last = len(scores) - 1
    return _mean([_minus(_at(scores, last, j), _at(scores, j, j)) for j in range(last)])


def learning_accuracy(scores: Scores) -> Mean:
    """Return the mean over all tasks of the score just after each was learned, mean over j of R[j, j]."""
    return _mean([_at(scores, j, j) for j in range(len(scores))])


def forgetting(scores: Scores) -> Mean:
    """Return the mean over j < T of the best earlier R[i, j], j <= i < T, minus R[T, j]."""
    last = len(scores) - 1
    best = [-math.inf] * last  # of each task so far
    for i, row in enumerate(scores[:-1]):
        for j, value in enumerate(row[: i + 1]):
            if value is not None and value > best[j]:  # a NaN is above nothing
                best[j] = value
    return _mean([_minus(None if b == -math.inf else b, _at(scores, last, j)) for j, b in enumerate(best)])


def forward_transfer(scores: Scores, before: Sequence[float | None]) -> Mean:
    """Return the mean over j > 1 of R[j - 1, j] - before[j]: what earlier tasks gave to one not learned yet.

    Args:
        scores: Rows that go one task beyond their own, or further; a row that does not counts as not scored.
        before: Score of every task on the base model, before any learning.

    Raises:
        ValueError: `before` and `scores` count different tasks.
    """
    if len(before) != len(scores):
        raise ValueError(f"forward_transfer: expected {len(scores)} scores of the base model, got {len(before)}")
    gains = [_minus(_at(scores, j - 1, j), before[j]) for j in range(1, len(scores))]
    return _mean(gains, first=2)


def newest_score(scores: Scores) -> float | None:
    """Return R[T, T], the score on the task just learned: how plastic a method is at the end of its stream."""
    return _at(scores, len(scores) - 1, len(scores) - 1) if scores else None


def order_disparity(finals: Sequence[Mapping[str, float | None]]) -> Disparity:
    """Return MOPD and AOPD over several orders of the same tasks.

    Args:
        finals: One mapping an order: task name -> its score after the last task. A task that an order lacks, or did
            not score, is left out and named.
    """
    tasks = list(dict.fromkeys(name for final in finals for name in final))
    ranges, missing = [], []
    for name in tasks:
        values = [value for final in finals if (value := final.get(name)) is not None]
        if len(values) < len(finals):
            missing.append(name)
        elif len(values) > 1:
            ranges.append(max(values) - min(values))
    if not ranges:
        return Disparity(None, None, tuple(missing))
    return Disparity(max(ranges), math.fsum(ranges) / len(ranges), tuple(missing))


def spread(values: Iterable[float | None]) -> Spread:
    """Return mean and sample standard deviation (n - 1 in the denominator) of the values that are there."""
    known = [value for value in values if value is not None]
    if not known:
        return Spread(None, None, 0)
    mean = math.fsum(known) / len(known)
    if len(known) == 1:
        return Spread(mean, None, 1)
    variance = math.fsum((value - mean) ** 2 for value in known) / (len(known) - 1)
    return Spread(mean, math.sqrt(variance), len(known))


def _at(scores: Scores, i: int, j: int) -> float | None:
    """Return R[i][j], None where row i ends before j; a NaN is nobody's score."""
    value = scores[i][j] if 0 <= j < len(scores[i]) else None
    return None if value is None or math.isnan(value) else value


def _minus(one: float | None, other: float | None) -> float | None:
    return None if one is None or other is None else one - other


def _mean(values: Sequence[float | None], first: int = 1) -> Mean:
    """Return the mean of the values that are there; `first` is the number of the task that comes first."""
    known = [value for value in values if value is not None]
    missing = tuple(task for task, value in enumerate(values, start=first) if value is None)
    return Mean(math.fsum(known) / len(known) if known else None, len(known), missing)
