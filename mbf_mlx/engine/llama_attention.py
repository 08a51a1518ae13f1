"""Attention over packed rows behind a shared prefix, for CPUs: forward, and backward by hand.

Letters: T tokens of a batch, the prefix's P first and then each row's own, without padding; Q query tokens, all T of
them or the supervised ones; R rows of at most W tokens; G groups of heads that share keys and values, m heads to a
group (H = G * m); d the size of a head. Scores and weights have keys before queries, so that maxima and sums over keys
run along contiguous memory.

mlx computes the matrix products. The rest is NumPy, in place, by the rules of cpu_ops.py. Where tokens stand is said by
llama_layout.py.
"""

from collections.abc import Iterator, Sequence
from concurrent.futures import Future, InvalidStateError
from contextlib import contextmanager, suppress
from dataclasses import dataclass

import mlx.core as mx
import numpy as np

from mbf_mlx.device.budgets import KEPT_WEIGHTS
from mbf_mlx.engine.cpu_ops import blank, for_each, view
from mbf_mlx.engine.llama_layout import RowLayout, Tokens

KeysValues = tuple[mx.array, mx.array]  # or their gradients


class PrefixHandover:
    """Hands a prefix's keys and values in one block from the first part of a batch to the other parts.

    Each part runs in its own thread. In the forward pass the other parts wait for the keys and values. In the backward
    pass the first part waits for the gradients that the others compute.

    Args:
        parts: How many parts the batch has.
    """

    def __init__(self, parts: int):
        self._there: Future[KeysValues] = Future()
        self._back: list[Future[KeysValues]] = [Future() for _ in range(1, parts)]

    def give(self, k: mx.array, v: mx.array) -> None:
        """Hand out the prefix's keys and values, (G, 1, P, d); doing it again changes nothing."""
        with suppress(InvalidStateError):
            self._there.set_result((k, v))

    def take(self) -> KeysValues:
        """Wait for the prefix's keys and values, and return them."""
        return self._there.result()

    def give_back(self, part: int, d_k: mx.array, d_v: mx.array) -> None:
        """Hand another part's gradients of the keys and values, evaluated, to the first part."""
        with suppress(InvalidStateError):
            self._back[part - 1].set_result((d_k, d_v))

    def take_back(self) -> list[KeysValues]:
        """Wait for the gradients of the other parts, return them and forget them."""
        found = [each.result() for each in self._back]
        self._back = []
        return found

    def stop(self, error: BaseException) -> None:
        """Raise the error in every part that waits, now or later."""
        for each in (self._there, *self._back):
            with suppress(InvalidStateError):
                each.set_exception(error)


@contextmanager
def failing_together(blocks: Sequence[PrefixHandover | None]) -> Iterator[None]:
    """If this part of a batch fails, stop the other parts, which may be waiting for it."""
    try:
        yield
    except BaseException as error:
        for block in blocks:
            if block is not None:
                block.stop(error)
        raise


@dataclass
class Attended:
    """What the backward pass needs; in each list the rows come first, then the prefix if there is one."""

    q: list[mx.array]  # (G, R, m * W, d), turned and scaled; the prefix's only if its tokens are queries
    k: list[mx.array]  # (G, R, W, d)
    v: list[mx.array]  # (G, R, W, d)
    weights: list[list[mx.array] | None]  # as `_weigh` returns them; None if they were too large to keep


def attend(
    q: mx.array,
    k: mx.array,
    v: mx.array,
    queries: Tokens,
    keys: Tokens,
    groups: int,
    size: int,
    handover: PrefixHandover | None = None,
) -> tuple[mx.array, Attended]:
    """Return attention's output (Q, H * d), and what the backward pass needs.

    Args:
        q: Projections (Q, H * d).
        k, v: Projections (T, G * d).
        queries, keys: Where their tokens stand.
        groups, size: G and d.
        handover: How this part of a batch and the others share the prefix, if there are others.
    """
    cos, sin = queries.turn
    scale = np.float32(size**-0.5)
    scaled = cos * scale, sin * scale
    saved = Attended(
        q=[to_rows(q, rows, groups, size, scaled) for rows in queries.parts],
        k=[to_rows(k, rows, groups, size, keys.turn) for rows in keys.parts],
        v=[to_rows(v, rows, groups, size) for rows in keys.parts],
        weights=[],
    )
    if handover is not None and keys.prefix is not None:
        handover.give(saved.k[1], saved.v[1])
    elif handover is not None:
        prefix_k, prefix_v = handover.take()
        saved.k.append(prefix_k)
        saved.v.append(prefix_v)
    mixed = blank(*q.shape)
    for i, rows in enumerate(queries.parts):
        weights = _weigh(saved, i, rows)
        out = weights[0].swapaxes(-1, -2) @ saved.v[i]
        if len(weights) > 1:
            out = out + (_flat_weights(weights[1]).swapaxes(-1, -2) @ saved.v[1][:, 0]).reshape(out.shape)
        to_tokens(out, rows, mixed)
        saved.weights.append(weights if sum(each.nbytes for each in weights) <= KEPT_WEIGHTS else None)
    return mixed, saved


def _weigh(saved: Attended, i: int, rows: RowLayout) -> list[mx.array]:
    """Return the attention weights of the queries in the rows (i is 0) or in the prefix (1).

    The first array is for the rows' own keys, (G, R, W, m * W). If the rows stand behind a prefix, a second one is for
    its keys, (G, P, R, m * W).
    """
    scores = [saved.k[i] @ saved.q[i].swapaxes(-1, -2)]
    if i == 0 and len(saved.k) > 1:
        seen = saved.k[1][:, 0] @ _flat(saved.q[0]).swapaxes(-1, -2)
        scores.append(seen.reshape(*seen.shape[:2], len(rows.starts), -1))
    mx.eval(scores)
    softmax_(rows.mask, *scores)
    return scores


def attend_backward(
    d_mixed: mx.array,
    saved: Attended,
    queries: Tokens,
    keys: Tokens,
    handover: PrefixHandover | None = None,
    part: int = 0,
) -> tuple[mx.array, mx.array, mx.array]:
    """Return the gradients of the projections q, k and v.

    Args:
        d_mixed: The gradient of the output, (Q, H * d).
        saved: What `attend` returned.
        queries, keys, handover: As `attend` took them.
        part: The number of this part of the batch, from 0.
    """
    groups, _, _, size = saved.k[0].shape
    d_k = [mx.array(0.0) for _ in saved.k]
    d_v = [mx.array(0.0) for _ in saved.v]
    d_q: list[mx.array] = []
    for i, rows in enumerate(queries.parts):
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
    if handover is not None and part == 0:
        for others_k, others_v in handover.take_back():
            d_k[1], d_v[1] = d_k[1] + others_k, d_v[1] + others_v
        mx.eval(d_k, d_v)
    elif handover is not None:
        handover.give_back(part, d_k.pop(), d_v.pop())
    scale = np.float32(size**-0.5)
    tokens, heads = len(keys.turn[0]), groups * size
    outs = blank(*d_mixed.shape), blank(tokens, heads), blank(tokens, heads)
    for d_rows, rows in zip(d_q, queries.parts, strict=True):
        to_tokens(d_rows, rows, outs[0], (queries.turn[0] * scale, queries.turn[1] * scale))
    for d_k_rows, d_v_rows, rows in zip(d_k, d_v, keys.parts, strict=True):
        to_tokens(d_k_rows, rows, outs[1], keys.turn)
        to_tokens(d_v_rows, rows, outs[2])
    return outs


def _flat(rows: mx.array) -> mx.array:
    """Return (G, R, m * W, d) as (G, R * m * W, d)."""
    return rows.reshape(rows.shape[0], -1, rows.shape[-1])


def _flat_weights(weights: mx.array) -> mx.array:
    """Return (G, P, R, m * W) as (G, P, R * m * W)."""
    return weights.reshape(*weights.shape[:2], -1)


def softmax_(mask: np.ndarray, own_: mx.array, prefix_: mx.array | None = None) -> None:
    """Turn scores into weights, in place. A row's own keys and the prefix's keys share one softmax.

    Args:
        mask: The rows' mask, (1 or R, keys, W).
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
    """Turn the gradients `d_` of the weights into gradients of the scores, in place; lists as `_weigh` returns them."""
    ps, ds = [view(each) for each in weights], [view(each) for each in d_]

    def block(g: int, r: int) -> None:
        at: list[tuple[int | slice, ...]] = [(g, r), (g, slice(None), r)][: len(ps)]
        total = np.zeros(ps[0].shape[-1], np.float32)
        for p, d, part in zip(ps, ds, at, strict=True):
            d[part] *= p[part]
            total += d[part].sum(axis=0)
        for p, d, part in zip(ps, ds, at, strict=True):
            d[part] -= p[part] * total

    for_each(block, np.ndindex(*ps[0].shape[:2]))


def to_rows(
    x: mx.array, rows: RowLayout, groups: int, size: int, turn: tuple[np.ndarray, np.ndarray] | None = None
) -> mx.array:
    """Return projections (T, H * d) as padded rows (G, R, m * W, d), turned by the rotary angles `turn`."""
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
            rotate(here, turn[0][tokens], turn[1][tokens], there)

    for_each(block, np.ndindex(count))
    return out


def to_tokens(y: mx.array, rows: RowLayout, out_: mx.array, turn: tuple[np.ndarray, np.ndarray] | None = None) -> None:
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
            rotate(here, turn[0][tokens], -turn[1][tokens], there)

    for_each(block, np.ndindex(count))


def rotate(x: np.ndarray, cos: np.ndarray, sin: np.ndarray, out: np.ndarray) -> None:
    """Turn heads (…, tokens, d) by each token's angles, (tokens, d / 2)."""
    half = x.shape[-1] // 2
    a, b, to_a, to_b = x[..., :half], x[..., half:], out[..., :half], out[..., half:]
    np.multiply(a, cos, out=to_a)
    to_a -= b * sin
    np.multiply(b, cos, out=to_b)
    to_b += a * sin
