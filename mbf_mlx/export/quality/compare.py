"""Compares an exported model with the live one: KL divergence, top-1 agreement and exact matches on the same rows.

Both models predict the supervised tokens of a row, teacher-forced. P is the live model's distribution over the
vocabulary at such a position and Q the exported model's; KL is the mean of sum P log(P / Q), in nats. The live model
runs first and its answers are kept, so that the two are never in memory together. Where the architecture allows it,
logits are computed at those positions only: the logits of a whole row take more memory than a small model's weights.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import mlx.core as mx
import numpy as np

from mbf_mlx.data.batches import Batch, make_batch
from mbf_mlx.engine.mlx_forward import Forward
from mbf_mlx.errors import InputError

POSITIONS = 16  # of a row, the first ones of a longer answer
KEPT_BYTES = 128 << 20  # for the live model's distributions
TOKENS = 1024  # in one forward pass
LOGITS_BYTES = 64 << 20  # in one forward pass, if the architecture computes logits at every position


class NotFiniteError(ArithmeticError):
    """A model that was compared has logits that are not finite."""


@dataclass(frozen=True)
class Quality:
    """The result of a comparison."""

    rows: int
    positions: int
    kl: float
    agreement: float  # share of positions where both name the same token
    live: float  # share of rows whose every position is right
    exported: float


@dataclass(frozen=True)
class _Row:
    """The part of a row that is compared."""

    tokens: np.ndarray
    supervised: np.ndarray


class Reference:
    """The live model's answers, with which exports are compared.

    Args:
        model: The live model; called as `model(tokens)` for logits (rows, length, vocabulary).
        rows: Objects with `tokens` and `supervised`, as data/encode.py gives them.
        advance: Called with the number of rows just done.

    Raises:
        InputError: the model's own logits are not finite.
    """

    def __init__(self, model: Any, rows: Sequence[Any], advance: Callable[[int], None] = lambda rows: None) -> None:
        forward = Forward(model)
        self._batches = list(_batches(rows, forward.vocabulary, forward.picks_positions))
        self._kept = []
        for batch in self._batches:
            self._kept.append(_log_probabilities(forward, batch))
            advance(len(batch.tokens))
        if any(not np.isfinite(kept).all() for kept in self._kept):
            raise InputError("the live model's logits are not finite; its adapter is broken")

    def compare(self, model: Any, advance: Callable[[int], None] = lambda rows: None) -> Quality:
        """Return the comparison of another model with the live one on the same rows.

        Raises:
            NotFiniteError: the other model's logits are not finite.
        """
        forward = Forward(model)
        total = same = count = rows = live = exported = 0.0
        for batch, ours in zip(self._batches, self._kept, strict=True):
            theirs = _log_probabilities(forward, batch)
            if not np.isfinite(theirs).all():
                raise NotFiniteError("its logits are not finite")
            total += float((np.exp(ours) * (ours - theirs)).sum(dtype=np.float64))
            mine, other = ours.argmax(-1), theirs.argmax(-1)
            same += float((mine == other).sum())
            live += _right(batch, mine)
            exported += _right(batch, other)
            count += len(mine)
            rows += len(batch.tokens)
            advance(len(batch.tokens))
        return Quality(int(rows), int(count), total / count, same / count, live / rows, exported / rows)


def _right(batch: Batch, best: np.ndarray) -> int:
    """Return how many rows of the batch are right at every position."""
    return len(batch.tokens) - len(np.unique(batch.row_of[best != batch.targets]))


def _batches(rows: Sequence[Any], vocabulary: int, picked: bool) -> Iterator[Batch]:
    """Yield the rows in batches that fit the budgets, shortest rows first.

    Args:
        rows: As `Reference` takes them.
        vocabulary: Number of logits of a position.
        picked: Whether logits are computed at supervised positions only.
    """
    budget = KEPT_BYTES // (4 * vocabulary)  # positions
    chosen = []
    for row in rows:
        positions = np.flatnonzero(row.supervised)[:POSITIONS]
        if len(positions) and budget >= len(positions):
            budget -= len(positions)
            end = positions[-1] + 1
            chosen.append(_Row(np.asarray(row.tokens)[:end], np.asarray(row.supervised)[:end]))
    chosen.sort(key=lambda row: len(row.tokens))
    most = TOKENS if picked else min(TOKENS, LOGITS_BYTES // (4 * vocabulary))
    while chosen:
        count = 1
        while count < len(chosen) and (count + 1) * len(chosen[count].tokens) <= most:
            count += 1
        part, chosen = chosen[:count], chosen[count:]
        yield make_batch(part, range(count))


def _log_probabilities(forward: Forward, batch: Batch) -> np.ndarray:
    """Return log P at the batch's positions, (positions, vocabulary) float32."""
    picked = forward.head(forward.hidden(batch)) if forward.picks_positions else forward.logits(batch)
    picked = picked.astype(mx.float32)
    return np.array(picked - mx.logsumexp(picked, axis=-1, keepdims=True))
