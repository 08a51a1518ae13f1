"""Attention over packed rows behind a shared prefix, for CPUs: forward, and backward by hand.

Letters: T tokens of a batch, the prefix's P first and then each row's own, without padding; R rows of at most W tokens;
heads come in G groups of the same keys and values, m queries to a group (H = G * m); d is a head's size. Scores and
weights have keys before queries, so that maxima and sums over keys run along contiguous memory.

mlx does the matrix products; the rest is NumPy, in place, by the rules of cpu_ops.py.
"""

from collections.abc import Iterator, Sequence
from concurrent.futures import Future, InvalidStateError
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Any

import mlx.core as mx
import numpy as np

from mbf_mlx.data.batches import Batch
from mbf_mlx.device.budgets import KEPT_WEIGHTS
from mbf_mlx.engine.cpu_ops import blank, for_each, view


@dataclass(frozen=True, kw_only=True)
class Rows:
    """Where rows stand among tokens: row r has lengths[r] of them from starts[r] on, and none is longer than width."""

    starts: list[int]
    lengths: list[int]
    width: int
    mask: np.ndarray  # added to their scores as queries of their row's own keys, (1 or R, keys, W): 0, -inf if later


@dataclass(frozen=True, kw_only=True)
class Tokens:
    """The tokens that ask in one block; all of them are also asked, in every block."""

    own: Rows
    shared: Rows | None  # the prefix as a row; None where there is none or it does not ask, or another part has it
    turn: tuple[np.ndarray, np.ndarray]  # cosines and sines of each token's rotary angles, (T, d / 2)

    @property
    def parts(self) -> list[Rows]:
        return [self.own] if self.shared is None else [self.own, self.shared]


class Layout:
    """Where each token of a batch stands.

    Args:
        angles: Cosines and sines of the rotary angles of positions 0, 1, …, two arrays (at least P + W, d / 2).
    """

    def __init__(self, batch: Batch, angles: tuple[np.ndarray, np.ndarray]):
        shared, width = len(batch.prefix), batch.tokens.shape[1]
        here = shared if batch.part == 0 else 0  # of the prefix's tokens
        self.part = batch.part
        real = np.arange(width) < batch.lengths[:, None]
        place = np.nonzero(real)[1]  # of each token after the prefix, in its row
        self.tokens = np.concatenate([batch.prefix[:here], batch.tokens[real]])
        number = np.cumsum(real).reshape(real.shape) - 1 + here
        self.picked = number.reshape(-1)[batch.positions]  # which of the T tokens are supervised inputs

        prefix = None
        if here:
            prefix = Rows(starts=[0], lengths=[shared], width=shared, mask=_mask(np.arange(shared)[None], shared))
        everything = np.concatenate([np.arange(here), shared + place])
        causal = _mask(np.arange(width)[None], width)
        rows = Rows(starts=_starts(batch.lengths, here), lengths=batch.lengths.tolist(), width=width, mask=causal)
        self.all = Tokens(own=rows, shared=prefix, turn=(angles[0][everything], angles[1][everything]))

        counts = np.bincount(batch.row_of, minlength=len(real))
        chosen = place[self.picked - here]
        asks_at = np.zeros((len(real), int(counts.max())), np.int64)  # an unused place asks as a row's first token
        asks_at[batch.row_of, np.arange(len(chosen)) - np.repeat(_starts(counts, 0), counts)] = chosen
        mask = causal if len(chosen) == len(place) else _mask(asks_at, width)
        rows = Rows(starts=_starts(counts, 0), lengths=counts.tolist(), width=asks_at.shape[1], mask=mask)
        angles = angles[0][shared + chosen], angles[1][shared + chosen]
        self.supervised = Tokens(own=rows, shared=None, turn=angles)

    def row_of(self, tokens: int) -> np.ndarray:
        """Return the row of each token after the prefix: of all, or of the supervised ones, whichever are as many."""
        lengths = next(each.own.lengths for each in (self.all, self.supervised) if sum(each.own.lengths) == tokens)
        return np.repeat(np.arange(len(lengths)), lengths)


def _starts(lengths: np.ndarray, first: int) -> list[int]:
    return [first, *(first + np.cumsum(lengths)[:-1]).tolist()]


def _mask(places: np.ndarray, keys: int) -> np.ndarray:
    """Return the mask of queries at `places` (R, W), (R, keys, W)."""
    later = np.arange(keys)[:, None] > places[:, None, :]
    return np.where(later, np.float32(-np.inf), np.float32(0))


KeysAndValues = tuple[mx.array, mx.array]


class Shared:
    """A prefix's keys and values in one block: a batch's first part computes them for all, in threads of their own.

    The others wait for them, and on the way back the first waits for the gradients that the others give.

    Args:
        parts: Of the batch.
    """

    def __init__(self, parts: int):
        self._there: Future[KeysAndValues] = Future()
        self._back: list[Future[KeysAndValues]] = [Future() for _ in range(1, parts)]

    def give(self, k: mx.array, v: mx.array) -> None:
        """Let the other parts have the prefix's keys and values, (G, 1, P, d); the same again changes nothing."""
        with suppress(InvalidStateError):
            self._there.set_result((k, v))

    def take(self) -> KeysAndValues:
        """Return the prefix's keys and values as soon as they are there."""
        return self._there.result()

    def give_back(self, part: int, d_k: mx.array, d_v: mx.array) -> None:
        """Let the first part have the gradients, evaluated, that another part has of them."""
        with suppress(InvalidStateError):
            self._back[part - 1].set_result((d_k, d_v))

    def take_back(self) -> list[KeysAndValues]:
        """Return the gradients of the other parts as soon as they are there; they are not kept."""
        found = [each.result() for each in self._back]
        self._back = []
        return found

    def stop(self, error: BaseException) -> None:
        """Let nobody wait any more: who does gets the error."""
        for each in (self._there, *self._back):
            with suppress(InvalidStateError):
                each.set_exception(error)


@contextmanager
def together(blocks: Sequence[Shared | None]) -> Iterator[None]:
    """Stop the other parts of a batch, which may be waiting for this one, where this one fails."""
    try:
        yield
    except BaseException as error:
        for block in blocks:
            if block is not None:
                block.stop(error)
        raise


@dataclass
class Attended:
    """What the way back needs; the second of each list is the prefix's, where there is one."""

    q: list[mx.array]  # (G, R, m * W, d), turned and scaled; of the prefix only where it asks
    k: list[mx.array]  # (G, R, W, d)
    v: list[mx.array]
    weights: list[list[mx.array] | None]  # as `_weigh` gives them; None where they were too large to keep


def attend(
    q: mx.array,
    k: mx.array,
    v: mx.array,
    asking: Tokens,
    asked: Tokens,
    groups: int,
    size: int,
    shared: Shared | None = None,
) -> tuple[mx.array, Attended]:
    """Return attention's output (asking, H * d), from projections (asking, H * d), (T, G * d) and (T, G * d).

    Where a batch is computed in parts, `shared` is how they come by the prefix.
    """
    cos, sin = asking.turn
    scale = np.float32(size**-0.5)
    scaled = cos * scale, sin * scale
    saved = Attended(
        q=[to_rows(q, rows, groups, size, scaled) for rows in asking.parts],
        k=[to_rows(k, rows, groups, size, asked.turn) for rows in asked.parts],
        v=[to_rows(v, rows, groups, size) for rows in asked.parts],
        weights=[],
    )
    if shared is not None and asked.shared is not None:
        shared.give(saved.k[1], saved.v[1])
    elif shared is not None:
        prefix_k, prefix_v = shared.take()
        saved.k.append(prefix_k)
        saved.v.append(prefix_v)
    mixed = blank(*q.shape)
    for i, rows in enumerate(asking.parts):
        weights = _weigh(saved, i, rows)
        out = weights[0].swapaxes(-1, -2) @ saved.v[i]
        if len(weights) > 1:
            out = out + (_flat_weights(weights[1]).swapaxes(-1, -2) @ saved.v[1][:, 0]).reshape(out.shape)
        to_tokens(out, rows, mixed)
        saved.weights.append(weights if sum(each.nbytes for each in weights) <= KEPT_WEIGHTS else None)
    return mixed, saved


def _weigh(saved: Attended, i: int, rows: Rows) -> list[mx.array]:
    """Return the weights of the rows (i is 0) or of the prefix (1).

    They are those of the rows' own keys, (G, R, W, m * W), and, for the rows behind a prefix, of its keys,
    (G, P, R, m * W).
    """
    scores = [saved.k[i] @ saved.q[i].swapaxes(-1, -2)]
    if i == 0 and len(saved.k) > 1:
        seen = saved.k[1][:, 0] @ _flat(saved.q[0]).swapaxes(-1, -2)
        scores.append(seen.reshape(*seen.shape[:2], len(rows.starts), -1))
    mx.eval(scores)
    softmax_(rows.mask, *scores)
    return scores


def attend_backward(
    d_mixed: mx.array, saved: Attended, asking: Tokens, asked: Tokens, shared: Shared | None = None, part: int = 0
) -> tuple[mx.array, mx.array, mx.array]:
    """Return the gradients of the projections q, k and v, from that of the output; `part` of its batch, if `shared`."""
    groups, _, _, size = saved.k[0].shape
    d_k: list[Any] = [0.0 for _ in saved.k]
    d_v: list[Any] = [0.0 for _ in saved.v]
    d_q = []
    for i, rows in enumerate(asking.parts):
        q, weights = saved.q[i], saved.weights[i] or _weigh(saved, i, rows)
        d_out = to_rows(d_mixed, rows, groups, size)
        d_weights = [saved.v[i] @ d_out.swapaxes(-1, -2)]
        d_v[i] = d_v[i] + weights[0] @ d_out
        if len(weights) > 1:
            d_seen = saved.v[1][:, 0] @ _flat(d_out).swapaxes(-1, -2)
            d_weights.append(d_seen.reshape(weights[1].shape))
            d_v[1] = (_flat_weights(weights[1]) @ _flat(d_out))[:, None]
        mx.eval(d_weights, d_v)
        softmax_backward_(weights, d_weights)
        d_k[i] = d_k[i] + d_weights[0] @ q
        d_rows = d_weights[0].swapaxes(-1, -2) @ saved.k[i]
        if len(weights) > 1:
            d_seen = _flat_weights(d_weights[1])
            d_k[1] = (d_seen @ _flat(q))[:, None]
            d_rows = d_rows + (d_seen.swapaxes(-1, -2) @ saved.k[1][:, 0]).reshape(d_rows.shape)
        d_q.append(d_rows)
    mx.eval(d_q, d_k, d_v)
    if shared is not None and part == 0:
        for others_k, others_v in shared.take_back():
            d_k[1], d_v[1] = d_k[1] + others_k, d_v[1] + others_v
        mx.eval(d_k, d_v)
    elif shared is not None:
        shared.give_back(part, d_k.pop(), d_v.pop())
    scale = np.float32(size**-0.5)
    tokens, heads = len(asked.turn[0]), groups * size
    outs = blank(*d_mixed.shape), blank(tokens, heads), blank(tokens, heads)
    for d_rows, rows in zip(d_q, asking.parts, strict=True):
        to_tokens(d_rows, rows, outs[0], (asking.turn[0] * scale, asking.turn[1] * scale))
    for d_k_rows, d_v_rows, rows in zip(d_k, d_v, asked.parts, strict=True):
        to_tokens(d_k_rows, rows, outs[1], asked.turn)
        to_tokens(d_v_rows, rows, outs[2])
    return outs


def _flat(rows: mx.array) -> mx.array:
    """Return (G, R, m * W, d) as (G, R * m * W, d)."""
    return rows.reshape(rows.shape[0], -1, rows.shape[-1])


def _flat_weights(weights: mx.array) -> mx.array:
    """Return (G, P, R, m * W) as (G, P, R * m * W)."""
    return weights.reshape(*weights.shape[:2], -1)


def softmax_(mask: np.ndarray, own_: mx.array, prefix_: mx.array | None = None) -> None:
    """Turn scores into weights, over each row's own keys and those of the shared prefix together.

    Args:
        mask: Of the rows, (1 or R, keys, W).
        own_: Scores of each row's own keys, (G, R, keys, m * W).
        prefix_: Scores of the prefix's keys, (G, P, R, m * W).
    """
    own, prefix = view(own_), None if prefix_ is None else view(prefix_)

    def block(g: int, r: int) -> None:
        parts = [own[g, r]] if prefix is None else [own[g, r], prefix[g, :, r]]
        with_mask = parts[0].reshape(*mask.shape[1:2], -1, mask.shape[2])
        with_mask += mask[r % len(mask)][:, None]
        most = parts[0].max(axis=0)
        for part in parts[1:]:
            np.maximum(most, part.max(axis=0), out=most)
        total = np.zeros_like(most)
        for part in parts:
            part -= most
            np.exp(part, out=part)
            total += part.sum(axis=0)
        np.reciprocal(total, out=total)
        for part in parts:
            part *= total

    for_each(block, np.ndindex(*own.shape[:2]))


def softmax_backward_(weights: list[mx.array], d_: list[mx.array]) -> None:
    """Turn the gradients of the weights, own and the prefix's, into those of the scores."""
    ps, ds = [view(each) for each in weights], [view(each) for each in d_]

    def block(g: int, r: int) -> None:
        at: list[Any] = [(g, r), (g, slice(None), r)][: len(ps)]
        total = np.zeros(ps[0].shape[-1], np.float32)
        for p, d, part in zip(ps, ds, at, strict=True):
            d[part] *= p[part]
            total += d[part].sum(axis=0)
        for p, d, part in zip(ps, ds, at, strict=True):
            d[part] -= p[part] * total

    for_each(block, np.ndindex(*ps[0].shape[:2]))


def to_rows(
    x: mx.array, rows: Rows, groups: int, size: int, turn: tuple[np.ndarray, np.ndarray] | None = None
) -> mx.array:
    """Return projections (T, H * d) as (G, R, m * W, d), turned by the rotary angles `turn`, padded with zeros."""
    source = view(x).reshape(x.shape[0], groups, -1, size)
    count, repeats = len(rows.starts), source.shape[2]
    out = blank(groups, count, repeats * rows.width, size)
    target = view(out).reshape(groups, count, repeats, rows.width, size)

    def block(r: int) -> None:
        tokens = slice(rows.starts[r], rows.starts[r] + rows.lengths[r])
        there, here = target[:, r, :, : rows.lengths[r]], source[tokens].transpose(1, 2, 0, 3)
        if turn is None:
            there[...] = here
        else:
            _rotate(here, turn[0][tokens], turn[1][tokens], there)

    for_each(block, np.ndindex(count))
    return out


def to_tokens(y: mx.array, rows: Rows, out_: mx.array, turn: tuple[np.ndarray, np.ndarray] | None = None) -> None:
    """Write (G, R, m * W, d) to its tokens in `out_` (T, H * d), turned back by the rotary angles `turn`."""
    groups, count, _, size = y.shape
    source = view(y).reshape(groups, count, -1, rows.width, size)
    target = view(out_).reshape(out_.shape[0], groups, -1, size)

    def block(r: int) -> None:
        tokens = slice(rows.starts[r], rows.starts[r] + rows.lengths[r])
        there, here = target[tokens].transpose(1, 2, 0, 3), source[:, r, :, : rows.lengths[r]]
        if turn is None:
            there[...] = here
        else:
            _rotate(here, turn[0][tokens], -turn[1][tokens], there)

    for_each(block, np.ndindex(count))


def _rotate(x: np.ndarray, cos: np.ndarray, sin: np.ndarray, out: np.ndarray) -> None:
    """Turn heads (…, tokens, d) by each token's angles, (tokens, d / 2)."""
    half = x.shape[-1] // 2
    a, b, to_a, to_b = x[..., :half], x[..., half:], out[..., :half], out[..., half:]
    np.multiply(a, cos, out=to_a)
    to_a -= b * sin
    np.multiply(b, cos, out=to_b)
    to_b += a * sin
