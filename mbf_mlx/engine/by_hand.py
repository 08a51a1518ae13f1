"""The engine for a Llama on a CPU: forward and backward pass are our own, in llama_pass.py.

Letters: N supervised positions of a batch, D the hidden size, V the vocabulary. A batch is split into parts, one for
each core, that run in threads side by side; the first part computes the shared prefix for all.
"""

from collections.abc import Collection, Iterator, Sequence
from functools import partial
from typing import Any

import mlx.core as mx
import numpy as np
from mlx import nn

from mbf_mlx.base.unpack import evaluate, evaluated, with_gradient, without_history
from mbf_mlx.config import Precision
from mbf_mlx.data.batches import Batch, LabelledTokens, make_batch, split
from mbf_mlx.device import bfloat16
from mbf_mlx.device.blas import load_blas
from mbf_mlx.engine import cpu_ops
from mbf_mlx.engine.answers import Question
from mbf_mlx.engine.bfloat16_weights import Bfloat16Weights
from mbf_mlx.engine.engine import KNOWN_WELL, Engine, Note
from mbf_mlx.engine.llama_answers import PROMPTS, KeptRows, answers_of
from mbf_mlx.engine.llama_attention import PrefixHandover
from mbf_mlx.engine.llama_pass import Head, Pass, base_of, linears_of
from mbf_mlx.engine.lora_layers import trained_arrays
from mbf_mlx.errors import InputError, MemoryLimitError

WATCHED_TOKENS = 384  # watch more rows at a time only while they have at most so many tokens together


class ByHand(Engine):
    """Computes losses and gradients with `llama_pass.Pass`.

    Args:
        model: One that `llama_pass.fits` accepts.
        checkpoint, logits_bytes: As `Engine` explains.

    Attributes:
        cores: Into how many parts a batch is split at most.
    """

    by_hand = True
    notes_training = True

    def __init__(self, model: nn.Module, *, checkpoint: bool, logits_bytes: int) -> None:
        super().__init__(model, checkpoint=checkpoint, logits_bytes=logits_bytes)
        self.cores = min(cpu_ops.CORES, load_blas().threads)
        self._head = Head(model)
        self._bfloat16: Bfloat16Weights | None = None  # what training and measuring multiply with; None is float32
        self._packed: Bfloat16Weights | None = None  # made once, where a run has asked for it

    @property
    def vocabulary(self) -> int:
        return self._head.vocabulary

    def multiply_in(self, precision: Precision) -> None:
        if precision == "bfloat16" and self._packed is None:
            if (library := bfloat16.library()) is None:
                raise InputError(f"precision: expected float32, got bfloat16: {bfloat16.reason()}")
            frozen = [base_of(each) for block in self.model.layers for each in linears_of(block)]
            frozen.append(self._head.module)
            self._packed = Bfloat16Weights(library, (m for m in frozen if type(m) in (nn.Linear, nn.Embedding)))
        self._bfloat16 = self._packed if precision == "bfloat16" else None

    def watched_together(self, rows: Sequence[LabelledTokens], start: int, batch_size: int) -> list[Batch]:
        """Return the next rows to watch, split into a batch for each core.

        Short rows go together, because that is faster: as many as train together, and at least one for each core. If
        memory has no room for them, a row goes alone.
        """
        most = max(self.cores, batch_size)
        stop, tokens = start + 1, len(rows[start].tokens)
        while stop < min(len(rows), start + most):
            tokens += len(rows[stop].tokens)
            if stop - start >= self.cores and tokens > WATCHED_TOKENS:
                break
            stop += 1
        batch = make_batch(rows, range(start, stop), share_prefix=False)
        try:
            self.before(batch, True)
        except MemoryLimitError:
            batch = make_batch(rows, [start], share_prefix=False)
            self.before(batch, True)
        return split(batch, self.cores)

    def _states(self, batch: Batch) -> mx.array:
        """Return the hidden states at the supervised positions, (N, D)."""
        parts, handovers = self._parts(batch)

        def run(part: Batch) -> mx.array:
            return evaluated(Pass(self.model, {}, part, keep=False, handovers=handovers).forward())

        return mx.concatenate(cpu_ops.on_own_cores([partial(run, part) for part in parts]))

    def _logits(self, states: mx.array) -> mx.array:
        return self._head(states)

    def _answers(self, questions: Sequence[Question], ends: Collection[int]) -> Iterator[tuple[int, list[int]]]:
        prefix = len(make_batch(questions, range(len(questions))).prefix)
        capacity, heads = max(each.longest for each in questions) - prefix, self.model.layers[0].self_attn
        bytes_a_token = 2 * 4 * heads.n_kv_heads * heads.head_dim * len(self.model.layers)
        slots = min(len(questions), self.answered_together(bytes_a_token, capacity))
        kept = KeptRows(self.model, slots, capacity, prefix)

        def batch(some: Sequence[Question]) -> tuple[list[Batch], list[PrefixHandover]]:
            return self._parts(self.prompts_together(some, PROMPTS, share_prefix=True))

        return answers_of(kept, questions, ends, batch)

    def _loss(self, batch: Batch) -> mx.array:
        """Return the loss. To mlx it is one function of the trained factors, with a gradient of its own."""
        trained = trained_arrays(self.model)
        # Copies without history: on arrays that mlx differentiates it would keep every intermediate result.
        factors = {name: without_history(value.astype(mx.float32)) for name, value in trained.items()}
        parts, handovers = self._parts(batch)
        note = self.training_note

        def run(number: int, part: Batch) -> tuple[np.ndarray, mx.array, Pass]:
            def pass_on(name: str, x: mx.array, gradients: mx.array) -> None:
                if note is not None:
                    note(number, len(parts), name, x, gradients, way.layout.rows_at(len(x)))

            way = Pass(
                self.model,
                factors,
                part,
                checkpoint=self.checkpoint,
                handovers=handovers,
                note=None if note is None else pass_on,
                bfloat16=self._bfloat16,
            )
            return *self._loss_and_d_hidden(way.forward(), part.targets, len(parts)), way

        done = cpu_ops.on_own_cores([partial(run, number, part) for number, part in enumerate(parts)])
        losses = np.concatenate([losses for losses, _, _ in done])
        value = mx.array(losses.sum(dtype=np.float64).astype(np.float32))

        def loss(*_: mx.array) -> mx.array:
            return value

        def gradients(_: Any, cotangent: mx.array, __: mx.array) -> list[mx.array]:
            backs = [partial(way.backward, without_history(cotangent * d_hidden)) for _, d_hidden, way in done]
            first, *others = cpu_ops.on_own_cores(backs)
            found = {name: sum((other[name] for other in others), first[name]) for name in first}
            return [found[name].astype(value.dtype) for name, value in trained.items()]

        return with_gradient(loss, gradients)(*trained.values())

    def _watch(self, batches: list[tuple[int, Batch]], note: Note, logarithm: bool) -> None:
        """Watch all batches at the same time, each in a thread."""
        factors = {name: value.astype(mx.float32) for name, value in trained_arrays(self.model).items()}
        evaluate(self.model)  # a thread cannot evaluate what another has begun
        mx.eval(factors)

        def run(place: int, batch: Batch) -> None:
            def pass_on(name: str, x: mx.array, gradients: mx.array) -> None:
                note(place, name, x, gradients, way.layout.rows_at(len(x)))

            checkpoint, halves = self.checkpoint, self._bfloat16
            way = Pass(self.model, factors, batch, checkpoint=checkpoint, note=pass_on, bfloat16=halves)
            losses, d_hidden = self._loss_and_d_hidden(way.forward(), batch.targets, len(batches))
            of_rows = np.bincount(batch.row_of, losses if logarithm else None)[batch.row_of]
            sizes = of_rows + KNOWN_WELL if logarithm else of_rows
            way.backward(d_hidden / mx.array(sizes.astype(np.float32))[:, None])

        cpu_ops.on_own_cores([partial(run, place, batch) for place, batch in batches])

    def _parts(self, batch: Batch) -> tuple[list[Batch], list[PrefixHandover]]:
        """Return the parts of a batch that run side by side, and for each block how they share the prefix."""
        evaluate(self.model)  # a thread cannot evaluate what another has begun
        parts = split(batch, self.cores)
        several = len(parts) > 1 and len(batch.prefix)
        return parts, [PrefixHandover(len(parts)) for _ in self.model.layers] if several else []

    def _loss_and_d_hidden(self, hidden: mx.array, targets: np.ndarray, sharing: int) -> tuple[np.ndarray, mx.array]:
        """Return the losses (N,) of hidden states (N, D) and the gradient of their sum, one chunk of logits at a time.

        Args:
            hidden: One part's.
            targets: Its tokens that are right, (N,).
            sharing: How many threads do this at the same time and share the budget.
        """
        losses, gradients = [], []
        for start, stop in self.chunks(len(targets), sharing):
            part = hidden[start:stop]
            logits = self._head(part, self._bfloat16)
            mx.eval(logits)
            losses.append(cpu_ops.cross_entropy_(logits, targets[start:stop]))
            gradient = self._head.backward(part, logits, self._bfloat16)
            mx.eval(gradient)
            gradients.append(gradient)
        return np.concatenate(losses), evaluated(mx.concatenate(gradients))
