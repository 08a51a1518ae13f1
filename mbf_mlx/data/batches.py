"""Batches: which rows go together, what the model reads of them, and where it must predict a token.

Letters: rows of a batch; P tokens that all of them start with (the shared prefix); L input tokens of the longest row
after the prefix; N supervised tokens of the batch. A row of n tokens has the inputs tokens[:-1] and the targets
tokens[1:]: token i is predicted at input i - 1. The forward pass is left to engine/, and mlx is not imported here.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Protocol, overload

import numpy as np

from mbf_mlx.data.token_rows import EncodedRows

BUCKETS_PER_DOUBLING = 8  # rows of one bucket differ by at most 9 % in length; they mix freely from epoch to epoch
WORTH_PARTS = 0.65  # share of the cores that parts must keep busy; below it, the undivided batch is as fast
IGNORED = -1  # a target that is no target: its loss is 0
PAD = 0  # any token would do: padding comes after a row's last input, where a causal model never looks


class LabelledTokens(Protocol):
    """What a batch needs of a row: token_rows.Encoded has it, and so do the rows that a method keeps."""

    @property
    def tokens(self) -> np.ndarray: ...  # int32[n]

    @property
    def supervised(self) -> np.ndarray: ...  # bool[n]; supervised[i] says that token i is a label


@dataclass(frozen=True, eq=False, kw_only=True)
class Batch:
    """Rows that go through the model together."""

    prefix: np.ndarray  # int32[P]; P is 0 if nothing is shared
    tokens: np.ndarray  # int32[rows, L], each row's inputs after the prefix, padded on the right
    lengths: np.ndarray  # int32[rows], how many of the L are real
    positions: np.ndarray  # int32[N], where logits are needed: flat indices into rows * L, ascending
    targets: np.ndarray  # int32[N], the token that is right there
    row_of: np.ndarray  # int32[N], the row (0 to rows - 1) that each target belongs to
    indices: tuple[int, ...]  # the rows' places in the task
    real_tokens: int  # prompt and completion tokens of the rows; the prefix counts once for each row
    part: int = 0  # number of the part, from 0, if the batch was split; part 0 computes the prefix for all parts

    @property
    def computed_tokens(self) -> int:
        """Tokens that a forward pass computes: the prefix once, and the rows with their padding."""
        return len(self.prefix) + self.tokens.size


def lengths_of(rows: Sequence[LabelledTokens]) -> Sequence[int] | np.ndarray:
    """Return the number of tokens of each row; `EncodedRows` need not be loaded for it."""
    return rows.lengths if isinstance(rows, EncodedRows) else [len(row.tokens) for row in rows]


class EpochBatches(Sequence[list[int]]):
    """The batches of an epoch, each a list of row indices that is made when it is asked for.

    Ten million rows as Python lists would need half a gigabyte.

    Args:
        rows: Row indices of one batch after the other, uint32 (rows,).
        ends: Where each batch ends in `rows`, int64 (batches,).
        order: The order in which the batches come, int64 (batches,).
    """

    def __init__(self, rows: np.ndarray, ends: np.ndarray, order: np.ndarray):
        self._rows, self._ends, self._order = rows, ends, order

    def __len__(self) -> int:
        return len(self._order)

    @overload
    def __getitem__(self, place: int) -> list[int]: ...
    @overload
    def __getitem__(self, place: slice) -> list[list[int]]: ...
    def __getitem__(self, place: int | slice) -> list[int] | list[list[int]]:
        if isinstance(place, slice):
            return [self[i] for i in range(*place.indices(len(self)))]
        batch = self._order[place]
        rows: list[int] = self._rows[self._ends[batch - 1] if batch else 0 : self._ends[batch]].tolist()
        return rows


def plan_batches(lengths: Sequence[int] | np.ndarray, batch_size: int, seed: int, epoch: int) -> EpochBatches:
    """Return the batches of one epoch as lists of row indices; every row is in exactly one batch.

    Rows of similar length (a bucket) go together. Which of them share a batch, and the order of the batches, is random.
    If the rows do not divide evenly, one batch at a random place is smaller.

    Args:
        lengths: Tokens of each row.
        batch_size: Rows of a batch.
        seed, epoch: Seed the draw, which depends on nothing else but the lengths.

    Raises:
        ValueError: batch_size < 1.
    """
    if batch_size < 1:
        raise ValueError(f"plan_batches: expected at least 1 row in a batch, got {batch_size}")
    rng = np.random.default_rng([seed, epoch])
    lengths = np.asarray(lengths, dtype=np.uint32)
    bucket_of = np.floor(BUCKETS_PER_DOUBLING * np.log2(np.maximum(np.arange(lengths.max(initial=1) + 1), 1)))
    buckets = bucket_of.astype(np.int16)[lengths]
    shuffled = rng.permutation(len(lengths)).astype(np.uint32)
    ordered = shuffled[np.argsort(buckets[shuffled], kind="stable")]
    sizes = [batch_size] * (len(ordered) // batch_size)
    if rest := len(ordered) % batch_size:
        # At the end it would always hold the longest rows, and the optimizer would give them more weight.
        sizes.insert(int(rng.integers(len(sizes) + 1)), rest)
    return EpochBatches(ordered, np.cumsum(sizes, dtype=np.int64), rng.permutation(len(sizes)))


def make_batch(encoded: Sequence[LabelledTokens], indices: Sequence[int], *, share_prefix: bool = True) -> Batch:
    """Return the rows `encoded[i]` for i in `indices` as one batch.

    A row is used up to its last supervised token: no target depends on what comes after it. A row's first token has no
    input before it and is never a target.

    Args:
        encoded: The task's rows.
        indices: The rows of this batch, at least one.
        share_prefix: Whether to keep the tokens that all rows start with apart, so that they are computed once. The
            prefix ends before the first input that predicts a target: every target keeps its input in `tokens`.

    Raises:
        ValueError: no indices.
    """
    if not len(indices):
        raise ValueError("make_batch: expected at least one row")
    rows = [encoded[i] for i in indices]
    labels = [np.flatnonzero(row.supervised[1:]) + 1 for row in rows]  # places of the targets, all of them >= 1
    inputs = [row.tokens[: places[-1]] if len(places) else row.tokens[:0] for row, places in zip(rows, labels)]
    shared = _shared_prefix(inputs, labels) if share_prefix else 0
    lengths = np.array([max(len(each) - shared, 0) for each in inputs], dtype=np.int32)
    tokens = np.full((len(rows), max(int(lengths.max()), 1)), PAD, dtype=np.int32)
    for line, each in zip(tokens, inputs):
        line[: max(len(each) - shared, 0)] = each[shared:]
    width = tokens.shape[1]
    positions = [r * width + places - 1 - shared for r, places in enumerate(labels)]
    return Batch(
        prefix=max(inputs, key=len)[:shared].astype(np.int32),
        tokens=tokens,
        lengths=lengths,
        positions=np.concatenate(positions).astype(np.int32),
        targets=np.concatenate([row.tokens[places] for row, places in zip(rows, labels)]).astype(np.int32),
        row_of=np.repeat(np.arange(len(rows)), [len(places) for places in labels]).astype(np.int32),
        indices=tuple(int(i) for i in indices),
        real_tokens=sum(len(row.tokens) for row in rows),
    )


def parts_of(rows: int, prefix: int, own: int, cores: int) -> int:
    """Return into how many parts a batch is split: `cores`, one part for each core, or 1.

    The first part computes the prefix for all parts, so a long prefix leaves the other cores waiting. In an undivided
    batch, each matrix product uses all cores.

    Args:
        rows: Rows of the batch.
        prefix: Tokens that all rows share, P.
        own: Tokens of the rows after the prefix, of all rows together.
        cores: CPU cores that compute at the same time.
    """
    largest = max(prefix + own / rows, (prefix + own) / cores)
    return cores if rows >= cores > 1 and prefix + own >= WORTH_PARTS * cores * largest else 1


def split(batch: Batch, cores: int) -> list[Batch]:
    """Split a batch into parts of neighbouring rows with about equally many tokens, one part for each core.

    The prefix counts as tokens of the first part. Tokens keep their order from part to part. A part's `real_tokens` is
    0: only whole batches are counted. A batch that is not worth splitting is returned as the only part.
    """
    rows, shared = len(batch.lengths), len(batch.prefix)
    ends = np.cumsum(batch.lengths)
    count = parts_of(rows, shared, int(ends[-1]), cores)
    if count == 1:
        return [batch]

    def cut(tokens: float) -> int:
        return int(np.abs(ends - tokens).argmin()) + 1

    own = max(int(ends[0]), (shared + int(ends[-1])) / count - shared)  # tokens of the first part after the prefix
    rest = (int(ends[-1]) - own) / (count - 1)
    cuts = [0, *(cut(own + rest * part) for part in range(count - 1)), rows]
    parts = [_part_of(batch, number, first, last) for number, (first, last) in enumerate(pairwise(cuts))]
    return parts if all(len(part.targets) for part in parts) else [batch]


def _part_of(batch: Batch, part: int, first: int, last: int) -> Batch:
    """Return the rows `first` to `last` - 1 as a batch of their own."""
    here = (batch.row_of >= first) & (batch.row_of < last)
    lengths, row_of = batch.lengths[first:last], batch.row_of[here] - first
    width = max(int(lengths.max(initial=0)), 1)
    return Batch(
        prefix=batch.prefix,
        tokens=batch.tokens[first:last, :width],
        lengths=lengths,
        positions=batch.positions[here] % batch.tokens.shape[1] + row_of * width,
        targets=batch.targets[here],
        row_of=row_of,
        indices=batch.indices[first:last],
        real_tokens=0,
        part=part,
    )


def without_prefix(batch: Batch, keep: int = 0) -> Batch:
    """Return the same batch with all but the first `keep` tokens of its prefix copied in front of every row."""
    moved = len(batch.prefix) - keep
    if moved <= 0:
        return batch
    ahead = np.broadcast_to(batch.prefix[keep:], (len(batch.tokens), moved))
    return replace(
        batch,
        prefix=batch.prefix[:keep],
        tokens=np.concatenate([ahead, batch.tokens], axis=1),
        lengths=batch.lengths + moved,
        positions=batch.positions + (batch.row_of + 1) * moved,
    )


def of_few_shapes(batch: Batch) -> Batch:
    """Return a batch with the same loss whose P, L and N take at most 8 values per doubling.

    Code that is compiled once for each shape then serves many batches. The prefix is shortened and its rest copied in
    front of the rows; L is padded; N is filled up with IGNORED targets of the last row.
    """
    batch = without_prefix(batch, _round_down(len(batch.prefix)))
    (rows, width), count = batch.tokens.shape, len(batch.targets)
    wider, more = _round_up(width) - width, _round_up(count) - count
    columns = batch.positions - batch.row_of * width
    return replace(
        batch,
        tokens=np.pad(batch.tokens, ((0, 0), (0, wider)), constant_values=PAD),
        positions=np.pad(columns + batch.row_of * (width + wider), (0, more), mode="edge"),
        targets=np.pad(batch.targets, (0, more), constant_values=IGNORED),
        row_of=np.pad(batch.row_of, (0, more), constant_values=rows - 1),
    )


def _round_down(count: int) -> int:
    step = 1 << max(0, count.bit_length() - 4)  # 8 steps from one power of two to the next
    return count // step * step


def _round_up(count: int) -> int:
    down = _round_down(count)
    return down if down == count else down + (1 << max(0, count.bit_length() - 4))


def _shared_prefix(inputs: list[np.ndarray], labels: list[np.ndarray]) -> int:
    """Return P: how many inputs all rows share at their start, none of them one that predicts a target."""
    inputs = [each for each in inputs if len(each)]  # rows without targets are not used at all
    if len(inputs) < 2:
        return 0
    first = inputs[0]
    shared = min(int(places[0]) - 1 for places in labels if len(places))
    for each in inputs[1:]:
        shared = min(shared, len(each))
        differ = np.flatnonzero(first[:shared] != each[:shared])
        shared = int(differ[0]) if len(differ) else shared
    return shared
