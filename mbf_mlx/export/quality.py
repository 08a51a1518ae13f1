"""How far an exported model is from the live one: KL divergence, top-1 agreement and exact matches on the same rows.

Both are asked for the tokens that a row supervises, teacher-forced. P is the live model's distribution over the
vocabulary at such a position and Q the exported one's; KL is the mean of sum P log(P / Q), in nats. The live model runs
first and its answers are kept, so that the two are never in memory together.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import mlx.core as mx
import numpy as np

from mbf_mlx.errors import InputError

POSITIONS = 16  # of a row; of a longer answer the first
KEPT_BYTES = 128 << 20  # of the live model's distributions
FORWARD_BYTES = 192 << 20  # of the logits of one forward pass


@dataclass(frozen=True)
class Quality:
    """What the comparison found."""

    rows: int
    positions: int
    kl: float
    agreement: float  # share of positions where both name the same token
    live: float  # share of rows whose every position is right
    exported: float


@dataclass(frozen=True)
class _Batch:
    tokens: np.ndarray  # (rows, length) int32
    at: np.ndarray  # flat positions whose logits predict a supervised token
    targets: np.ndarray
    row_of: np.ndarray


class Reference:
    """The live model's answers, to compare others with.

    Args:
        model: The live model; called as `model(tokens)` for logits (rows, length, vocabulary).
        rows: Objects with `tokens` and `supervised`, as encode.py gives them.
        advance: Called with the number of rows done.

    Raises:
        InputError: the model's own logits are not finite.
    """

    def __init__(self, model: Any, rows: Sequence[Any], advance: Callable[[int], None] = lambda rows: None) -> None:
        vocabulary = model(mx.array([[0]])).shape[-1]
        self._batches = list(_batches(rows, vocabulary))
        self._kept = []
        for batch in self._batches:
            self._kept.append(_log_probabilities(model, batch))
            advance(len(batch.tokens))
        if any(not np.isfinite(kept).all() for kept in self._kept):
            raise InputError("the live model's logits are not finite; its adapter is broken")

    def compare(self, model: Any, advance: Callable[[int], None] = lambda rows: None) -> Quality:
        """Return how far another model is from the live one on the same rows."""
        total = same = count = rows = live = exported = 0.0
        for batch, ours in zip(self._batches, self._kept, strict=True):
            theirs = _log_probabilities(model, batch)
            total += float((np.exp(ours) * (ours - theirs)).sum(dtype=np.float64))
            mine, other = ours.argmax(-1), theirs.argmax(-1)
            same += float((mine == other).sum())
            live += _right(batch, mine)
            exported += _right(batch, other)
            count += len(mine)
            rows += len(batch.tokens)
            advance(len(batch.tokens))
        return Quality(int(rows), int(count), total / count, same / count, live / rows, exported / rows)


def _right(batch: _Batch, best: np.ndarray) -> int:
    """Return how many rows of the batch are right at every position."""
    return len(batch.tokens) - len(np.unique(batch.row_of[best != batch.targets]))


def _batches(rows: Sequence[Any], vocabulary: int) -> Iterator[_Batch]:
    """Yield the rows, shortest first, in batches whose logits fit the budget."""
    budget = KEPT_BYTES // (4 * vocabulary)  # positions
    chosen = []
    for row in rows:
        positions = np.flatnonzero(row.supervised)[:POSITIONS]
        if len(positions) and budget >= len(positions):
            budget -= len(positions)
            chosen.append((np.asarray(row.tokens), positions))
    chosen.sort(key=lambda item: len(item[0]))
    while chosen:
        count = 1
        while count < len(chosen) and 4 * vocabulary * (count + 1) * len(chosen[count][0]) <= FORWARD_BYTES:
            count += 1
        part, chosen = chosen[:count], chosen[count:]
        length = max(int(positions[-1]) for _, positions in part)
        tokens = np.zeros((count, length), np.int32)
        for place, (row_tokens, _) in enumerate(part):
            tokens[place, : len(row_tokens[:length])] = row_tokens[:length]
        at = [place * length + positions - 1 for place, (_, positions) in enumerate(part)]
        targets = [row_tokens[positions] for row_tokens, positions in part]
        row_of = np.repeat(np.arange(count), [len(positions) for _, positions in part])
        yield _Batch(tokens, np.concatenate(at), np.concatenate(targets), row_of)


def _log_probabilities(model: Any, batch: _Batch) -> np.ndarray:
    """Return log P at the batch's positions, (positions, vocabulary) float32."""
    logits = model(mx.array(batch.tokens))
    picked = logits.reshape(-1, logits.shape[-1])[mx.array(batch.at)].astype(mx.float32)
    return np.array(picked - mx.logsumexp(picked, axis=-1, keepdims=True))
