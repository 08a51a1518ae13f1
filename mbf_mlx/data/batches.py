"""Batches: which rows go together, what the model reads of them, and where it is asked for a token.

Letters: rows of a batch; P tokens that all of them start with (the shared prefix); L input tokens of the longest row
after it; N supervised tokens of the batch. A row of n tokens has the inputs tokens[:-1] and the targets tokens[1:]:
token i is predicted at input i - 1. The forward pass is left to engine/, and mlx is not imported here.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Protocol, overload

import numpy as np

BUCKETS_PER_DOUBLING = 8  # rows of one bucket differ by at most 9 % in length; they mix freely from epoch to epoch
WORTH_PARTS = 0.65  # of the cores have to be busy if a batch is computed in parts; undivided, it is about as fast then
IGNORED = -1  # a target that stands for none: its loss is 0
PAD = 0  # any token does: padding stands behind a row's last input, where a causal model never sees it


class Row(Protocol):
    """What a batch needs of an encoded row; `tasks.Encoded` is one."""

    @property
    def tokens(self) -> np.ndarray: ...  # int32[n]

    @property
    def supervised(self) -> np.ndarray: ...  # bool[n]; [i] says that token i is a label


@dataclass(frozen=True, eq=False, kw_only=True)
class Batch:
    """Rows that go through the model together."""

    prefix: np.ndarray  # int32[P]; P is 0 where nothing is shared
    tokens: np.ndarray  # int32[rows, L], each row's inputs after the prefix, padded on the right
    lengths: np.ndarray  # int32[rows], how many of the L are real
    positions: np.ndarray  # int32[N], where logits are needed: flat indices into rows * L, ascending
    targets: np.ndarray  # int32[N], the token that is right there
    row_of: np.ndarray  # int32[N], the row (0 to rows - 1) that each of them belongs to
    indices: tuple[int, ...]  # the rows' places in the task
    real_tokens: int  # prompt and completion tokens of the rows, the prefix counted for each
    part: int = 0  # of a batch that is computed in parts, from 0; the first computes the prefix for all

    @property
    def computed_tokens(self) -> int:
        """Tokens that a plain forward pass computes: the prefix once, and the rows with their padding."""
        return len(self.prefix) + self.tokens.size


def lengths_of(rows: Sequence[Row]) -> Sequence[int] | np.ndarray:
    """Return the tokens of each row; rows that know them are not read for that."""
    known: np.ndarray | None = getattr(rows, "lengths", None)
    return [len(row.tokens) for row in rows] if known is None else known


class Plan(Sequence[list[int]]):
    """The batches of an epoch, each a list of row indices that is made when it is asked for.

    Ten million rows as lists of Python's own numbers would be half a gigabyte.
    """

    def __init__(self, rows: np.ndarray, ends: np.ndarray, order: np.ndarray):
        self._rows = rows  # uint32, of one batch after the other
        self._ends = ends  # of each batch among them
        self._order = order  # in which the batches come

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
        return self._rows[self._ends[batch - 1] if batch else 0 : self._ends[batch]].tolist()


def plan_batches(lengths: Sequence[int] | np.ndarray, batch_size: int, seed: int, epoch: int) -> Plan:
    """Return the batches of one epoch as lists of row indices; every row stands in exactly one.

    Rows of similar length (a bucket) go together; which of them, and the order of the batches, is drawn from `seed` and
    `epoch`. Where the rows do not divide evenly, one batch, at a place that is drawn too, is smaller.

    Args:
        lengths: Tokens of each row.
        batch_size: Rows of a batch.
        seed, epoch: What the draw depends on, besides the lengths.
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
        # Always at the end, it would always hold the longest rows, and an optimizer step would weigh them more.
        sizes.insert(int(rng.integers(len(sizes) + 1)), rest)
    return Plan(ordered, np.cumsum(sizes, dtype=np.int64), rng.permutation(len(sizes)))


def make_batch(encoded: Sequence[Row], indices: Sequence[int], *, share_prefix: bool = True) -> Batch:
    """Return the rows `encoded[i]` for i in `indices` as one batch.

    What no target depends on is left out: a row is read up to its last supervised token. A row's first token has no
    input before it and is never a target.

    Args:
        encoded: The task's rows.
        indices: Those of this batch, at least one.
        share_prefix: Whether the tokens that all rows start with are kept apart, to be computed once. They end
            before the first input that predicts a target, so that every target keeps its input in `tokens`.
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
    """Return into how many parts a batch is split so that each core computes one: `cores`, or 1.

    The first part computes the prefix for all, so a long one leaves the others waiting; undivided, each product runs on
    all cores.

    Args:
        rows: Of the batch.
        prefix: Tokens that they share, P.
        own: Tokens of the rows after it.
        cores: What can compute at the same time.
    """
    largest = max(prefix + own / rows, (prefix + own) / cores)
    return cores if rows >= cores > 1 and prefix + own >= WORTH_PARTS * cores * largest else 1


def split(batch: Batch, cores: int) -> list[Batch]:
    """Return a batch as parts of neighbouring rows with about as many tokens each, one for each core, or as it is.

    The prefix counts as the first part's. Tokens keep their order from part to part. `real_tokens` is left at 0: nobody
    asks a part for it.
    """
    rows, shared = len(batch.lengths), len(batch.prefix)
    ends = np.cumsum(batch.lengths)
    count = parts_of(rows, shared, int(ends[-1]), cores)
    if count == 1:
        return [batch]

    def cut(tokens: float) -> int:
        return int(np.abs(ends - tokens).argmin()) + 1

    own = max(int(ends[0]), (shared + int(ends[-1])) / count - shared)  # the first part's, behind the prefix
    rest = (int(ends[-1]) - own) / (count - 1)
    cuts = [0, *(cut(own + rest * part) for part in range(count - 1)), rows]
    parts = [_rows_of(batch, number, first, last) for number, (first, last) in enumerate(pairwise(cuts))]
    return parts if all(len(part.targets) for part in parts) else [batch]


def _rows_of(batch: Batch, part: int, first: int, last: int) -> Batch:
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
    """Return the same batch with all but the first `keep` tokens of its prefix written out in front of every row."""
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
    """Return a batch with the same loss whose P, L and N have at most 8 values per doubling.

    What is compiled once for each shape then serves many batches. The prefix is cut, the rest is written in front of
    the rows; L is padded; N is filled up with IGNORED targets, whose row is the last.
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
    """Return P: how many inputs all rows with targets start with, and no target is predicted at."""
    inputs = [each for each in inputs if len(each)]  # a row without targets is not read at all
    if len(inputs) < 2:
        return 0
    first = inputs[0]
    shared = min(int(places[0]) - 1 for places in labels if len(places))
    for each in inputs[1:]:
        shared = min(shared, len(each))
        differ = np.flatnonzero(first[:shared] != each[:shared])
        shared = int(differ[0]) if len(differ) else shared
    return shared
