"""A Llama's greedy answers on a CPU, many rows at a time, with the keys and values of all earlier tokens kept.

The prompts go through llama_pass.py. Then each step computes one token of every row that has not ended. A row that
ends leaves its slot to the last row, so that the rows that go on stand together; a waiting row takes a free slot.

Letters: S slots; n rows that go on, in slots 0 to n - 1; P tokens that all prompts start with, kept once; C tokens that
a slot holds at most after them; L of them that are looked at; G groups of heads that share keys and values, m heads to
a group; d the size of a head; D the hidden size. Everything is float32.
"""

from collections.abc import Callable, Collection, Iterator, Sequence
from functools import partial

import mlx.core as mx
import numpy as np
from mlx import nn

from mbf_mlx.base.unpack import evaluated
from mbf_mlx.data.batches import Batch
from mbf_mlx.engine import cpu_ops
from mbf_mlx.engine.answers import Question
from mbf_mlx.engine.cpu_ops import blank, for_each, view
from mbf_mlx.engine.llama_attention import Attended, PrefixHandover, rotate
from mbf_mlx.engine.llama_pass import Block, Head, Pass, angles, together, weight_of

PROMPTS = 16  # that go through the model together: enough for fast products, and with little memory


def answers_of(
    kept: "KeptRows",
    questions: Sequence[Question],
    ends: Collection[int],
    batch: Callable[[Sequence[Question]], tuple[list[Batch], list[PrefixHandover]]],
) -> Iterator[tuple[int, list[int]]]:
    """Yield each question's place and its greedy answer without the end token, in the order in which they end.

    Args:
        kept: Without rows so far.
        questions: At least one.
        ends: The tokens at which an answer ends.
        batch: Returns the first few of some prompts as parts of a batch, and how these share its prefix.
    """
    begun = 0  # questions
    rows: list[tuple[int, list[int]]] = []  # of each slot: the question's place, and its answer so far
    newest = np.zeros(0, np.int32)
    while rows or begun < len(questions):
        while min(PROMPTS, kept.slots, len(questions) - begun) <= kept.slots - len(rows) and begun < len(questions):
            parts, handovers = batch(questions[begun : begun + kept.slots - len(rows)])
            newest = np.concatenate([newest, kept.add(parts, handovers)])
            rows += [(begun + i, []) for part in parts for i in part.indices]
            begun = rows[-1][0] + 1
        ended = []
        for slot, ((place, answer), token) in enumerate(zip(rows, newest.tolist(), strict=True)):
            if token not in ends:
                answer.append(token)
            if token in ends or len(answer) == questions[place].most:
                ended.append(slot)
                yield place, answer
        stay = kept.remove(ended)
        rows, newest = [rows[slot] for slot in stay], newest[stay]
        if rows:
            newest = kept.step(newest)


class KeptRows:
    """The rows that are being answered, and what every block keeps of them.

    Args:
        model: One that `llama_pass.fits` accepts.
        slots: S, how many rows there can be at a time.
        capacity: C, the most tokens of a prompt and its answer after the prefix.
        prefix: P, fewer than the shortest prompt has.
    """

    def __init__(self, model: nn.Module, slots: int, capacity: int, prefix: int) -> None:
        heads = model.layers[0].self_attn
        self._model, self._head, self._prefix, self.slots = model, Head(model), prefix, slots
        self._angles = angles(heads, prefix + capacity)
        self._scale = np.float32(heads.head_dim**-0.5)
        self._keys, self._values = (
            [np.zeros((slots, heads.n_kv_heads, capacity, heads.head_dim), np.float32) for _ in model.layers]
            for _ in range(2)
        )
        self._prefix_keys, self._prefix_values = (
            [np.zeros((heads.n_kv_heads, prefix, heads.head_dim), np.float32) for _ in model.layers] for _ in range(2)
        )
        self._lengths = np.zeros(slots, np.int64)  # tokens of each row after the prefix
        self._blocks = [Block(each, f"model.layers.{i}", {}, None, None) for i, each in enumerate(model.layers)]
        self.count = 0  # n

    def add(self, parts: Sequence[Batch], handovers: Sequence[PrefixHandover]) -> np.ndarray:
        """Put prompts into the next slots, and return the first token of each answer, (rows,).

        Args:
            parts: The batch of the prompts, split for the cores; each row has one target, the one behind its prompt.
            handovers: For each block, how the parts share the batch's prefix.
        """
        slots = self.count + np.cumsum([0, *(len(part.lengths) for part in parts)])

        def run(part: Batch, slot: int) -> mx.array:
            way = Pass(self._model, {}, part, keep=False, handovers=handovers, attended=partial(self._keep, part, slot))
            return evaluated(way.forward())

        hidden = cpu_ops.on_own_cores([partial(run, *each) for each in zip(parts, slots[:-1].tolist(), strict=True)])
        for part, slot in zip(parts, slots[:-1], strict=True):
            self._lengths[slot : slot + len(part.lengths)] = len(part.prefix) + part.lengths - self._prefix
        self.count = int(slots[-1])
        return self._best(mx.concatenate(hidden))

    def _keep(self, part: Batch, slot: int, block: int, found: Attended) -> None:
        """Copy a block's keys and values of a part's prompts into the slots from `slot` on."""
        ahead = len(part.prefix) - self._prefix  # negative for a prompt that is alone in its batch: it has no prefix
        pairs = [
            (self._keys[block], self._prefix_keys[block], found.k),
            (self._values[block], self._prefix_values[block], found.v),
        ]
        for kept, kept_prefix, places in pairs:
            own, *prefix = (view(each) for each in places)  # (G, rows, W, d) and (G, 1, prefix, d)
            if ahead > 0:
                kept[slot : slot + len(part.lengths), :, :ahead] = prefix[0][:, 0, self._prefix :]
            for row, length in enumerate(part.lengths):
                kept[slot + row, :, max(ahead, 0) : ahead + length] = own[:, row, max(-ahead, 0) : length]
            if slot == 0:
                kept_prefix[...] = (prefix[0][:, 0] if prefix else own[:, 0])[:, : self._prefix]

    def remove(self, slots: Sequence[int]) -> list[int]:
        """Forget the rows of these slots, and return for each of the first n slots which slot its row had before."""
        places = list(range(self.count))
        for slot in sorted(slots, reverse=True):
            last = len(places) - 1
            if slot != last:
                length = self._lengths[last]
                for kept in (*self._keys, *self._values):
                    kept[slot, :, :length] = kept[last, :, :length]
                self._lengths[slot] = length
                places[slot] = places[last]
            places.pop()
        self.count = len(places)
        return places

    def step(self, tokens: np.ndarray) -> np.ndarray:
        """Return the token that comes next in each row, (n,), after adding `tokens` (n,) to the rows."""
        x = self._model.model.embed_tokens(mx.array(tokens)).astype(mx.float32)
        at = self._lengths[: self.count]
        turn = self._angles[0][self._prefix + at], self._angles[1][self._prefix + at]
        for number, block in enumerate(self._blocks):
            norm = block.block.input_layernorm
            normed, _ = cpu_ops.rms_norm(x, weight_of(norm), norm.eps)
            q, k, v = together(normed, block.q, block.k, block.v)
            mx.eval(q, k, v)
            mixed = self._attend(number, view(q), view(k), view(v), turn)
            x = block.mlp(block.o(mixed, onto=x))[0]
        at += 1
        norm = self._model.model.norm
        return self._best(cpu_ops.rms_norm(x, weight_of(norm), norm.eps)[0])

    def _attend(
        self, block: int, q: np.ndarray, k: np.ndarray, v: np.ndarray, turn: tuple[np.ndarray, np.ndarray]
    ) -> mx.array:
        """Return attention's output (n, H * d) for one new token in each row, whose key and value are kept."""
        count, at = self.count, self._lengths[: self.count]
        keys, values, (cos, sin) = self._keys[block], self._values[block], turn
        groups, size = keys.shape[1], keys.shape[3]
        q, k, v = (each.reshape(count, groups, -1, size) for each in (q, k, v))
        out = blank(count, q.shape[1] * q.shape[2] * size)
        mixed = view(out).reshape(q.shape)
        rows = -(-count // cpu_ops.CORES)

        def some(first: int) -> None:
            stop = min(first + rows, count)
            slots, here = np.arange(first, stop), at[first:stop]
            angles_here = cos[first:stop], sin[first:stop]
            turned_q, turned_k = np.empty_like(q[first:stop]), np.empty_like(k[first:stop])
            for heads, turned in ((q, turned_q), (k, turned_k)):
                rotate(heads[first:stop].transpose(1, 2, 0, 3), *angles_here, turned.transpose(1, 2, 0, 3))
            turned_q *= self._scale
            keys[slots, :, here] = turned_k[:, :, 0]
            values[slots, :, here] = v[first:stop, :, 0]
            seen = int(here.max()) + 1
            later = np.where(np.arange(seen) > here[:, None], np.float32(-np.inf), np.float32(0))[:, None, None]
            kept = [(keys[first:stop, :, :seen], values[first:stop, :, :seen])]
            kept += [(self._prefix_keys[block], self._prefix_values[block])] * bool(self._prefix)
            # One small product for each row and group, also with the prefix: NumPy's BLAS shares larger products among
            # threads of its own, which are in the way of ours.
            scores = [np.matmul(turned_q, each.swapaxes(-1, -2)) for each, _ in kept]  # (rows, G, m, L or P)
            scores[0] += later
            most = np.max([each.max(axis=-1, keepdims=True) for each in scores], axis=0)
            for each in scores:
                each -= most
                np.exp(each, out=each)
            total = sum(each.sum(axis=-1, keepdims=True) for each in scores)
            result = sum(np.matmul(each, value) for each, (_, value) in zip(scores, kept, strict=True))
            np.divide(result, total, out=mixed[first:stop])

        for_each(some, ((first,) for first in range(0, count, rows)))
        return out

    def _best(self, hidden: mx.array) -> np.ndarray:
        """Return the most likely token after each of the hidden states (rows, D)."""
        logits = view(self._head(hidden))
        best = np.empty(len(logits), np.intp)

        def some(logits: np.ndarray, best: np.ndarray) -> None:
            np.argmax(logits, axis=1, out=best)

        cpu_ops.by_rows(some, logits, best)
        return best.astype(np.int32)
