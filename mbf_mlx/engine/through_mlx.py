"""The engine for every architecture and device: mlx-lm's own forward pass (mlx_forward.py), differentiated by mlx.

Letters: N supervised positions of a batch, D the hidden size, V the vocabulary. Where the architecture allows it,
logits are computed at supervised positions only, in chunks, and a shared prefix is computed once.
"""

from collections.abc import Callable, Collection, Iterator, Sequence
from functools import partial
from typing import Any

import mlx.core as mx
import numpy as np
from mlx import nn
from mlx.utils import tree_unflatten

from mbf_mlx.base.unpack import with_gradient, without_history
from mbf_mlx.data.batches import IGNORED, Batch, LabelledTokens, make_batch, of_few_shapes
from mbf_mlx.engine import mlx_answers
from mbf_mlx.engine.answers import Question
from mbf_mlx.engine.engine import KNOWN_WELL, Arrays, Engine, LossAndGrad, Note, cross_entropy
from mbf_mlx.engine.lora_layers import lora_layers, trained_arrays
from mbf_mlx.engine.mlx_forward import Forward
from mbf_mlx.engine.taps import called_by


class ThroughMlx(Engine):
    """Computes losses with mlx-lm's own pass, and gradients with mlx.

    Args:
        model, checkpoint, logits_bytes: As `Engine` explains.
        compiled: Whether `loss_and_grad` compiles the pass, once for each shape of a batch. Batches are then padded to
            few shapes.
    """

    by_hand = False

    def __init__(self, model: nn.Module, *, checkpoint: bool, logits_bytes: int, compiled: bool) -> None:
        super().__init__(model, checkpoint=checkpoint, logits_bytes=logits_bytes)
        self.compiled = compiled
        self.forward = Forward(model)
        # If more than the blocks is trained, the head needs a gradient of its own.
        in_blocks = sum(len(trained_arrays(block)) for block in model.layers)
        self._head_is_trained = len(trained_arrays(model)) > in_blocks

    @property
    def vocabulary(self) -> int:
        return self.forward.vocabulary

    def loss_and_grad(self, apply: Callable[[Arrays], None]) -> LossAndGrad:
        plain = super().loss_and_grad(apply)
        return self._compiled_loss_and_grad(apply, plain) if self.compiled else plain

    def _compiled_loss_and_grad(self, apply: Callable[[Arrays], None], plain: LossAndGrad) -> LossAndGrad:
        """Return `plain`, compiled; what cannot be compiled goes through `plain` itself."""

        def loss_at(arrays: Arrays, prefix: mx.array, tokens: mx.array, at: mx.array, targets: mx.array) -> mx.array:
            apply(arrays)
            return self._chunked_loss(self.forward.hidden_at(prefix, tokens, at, self.checkpoint), targets)

        compilations: dict[tuple[bool, bool], Callable[..., tuple[mx.array, Arrays]]] = {}  # by what a trace depends on

        def compiled(arrays: Arrays, batch: Batch) -> tuple[mx.array, Arrays]:
            padded = of_few_shapes(batch)
            count = len(padded.targets)
            if not count or not self.forward.picks_positions or self._takes_two_passes(count):
                return plain(arrays, batch)
            self.before(batch, True)
            traced = (self.checkpoint, self.model.training)
            if traced not in compilations:
                state = mx.random.state  # of dropout: it goes in and comes out, or all steps would drop the same inputs
                compilations[traced] = mx.compile(mx.value_and_grad(loss_at), inputs=state, outputs=state)
            found = compilations[traced](arrays, *self.forward.inputs(padded), mx.array(padded.targets))
            apply(arrays)  # tracing has left arrays without values in the model
            return found

        return compiled

    def watched_together(self, rows: Sequence[LabelledTokens], start: int, batch_size: int) -> list[Batch]:
        """Return the row at `start` alone: `_watch` cannot tell the rows of a batch apart."""
        batch = make_batch(rows, [start], share_prefix=False)
        self.before(batch, True)
        return [batch]

    def _watch(self, batches: list[tuple[int, Batch]], note: Note, logarithm: bool) -> None:
        """Watch one batch after another."""
        layers = lora_layers(self.model)

        def call(place: int, name: str, layer: nn.Module, x: mx.array) -> mx.array:
            def same(y: mx.array) -> mx.array:
                return y

            def pass_on(_: Any, gradient: mx.array, __: Any) -> mx.array:
                inputs, gradients = (each.reshape(-1, each.shape[-1]) for each in (x, gradient))
                note(place, name, inputs, gradients, np.zeros(len(inputs), np.int32))  # a batch is one row here
                return gradient

            return with_gradient(same, pass_on)(layer(x))

        for place, batch in batches:

            def loss(pairs: dict[str, tuple[mx.array, mx.array]], batch: Batch = batch) -> mx.array:
                for name, (a, b) in pairs.items():
                    layers[name].lora_a, layers[name].lora_b = a, b
                total = self._loss(batch)
                return mx.log(total + KNOWN_WELL) if logarithm else total / len(batch.targets)

            pairs = {name: (layer.lora_a, layer.lora_b) for name, layer in layers.items()}
            with called_by(partial(call, place), self.model, layers):
                mx.eval(mx.grad(loss)(pairs))
            for name, (a, b) in pairs.items():
                layers[name].lora_a, layers[name].lora_b = a, b

    def _answers(self, questions: Sequence[Question], ends: Collection[int]) -> Iterator[tuple[int, list[int]]]:
        bytes_a_token = mlx_answers.bytes_a_token(self.model)
        if bytes_a_token is None:
            return mlx_answers.one_by_one(self.model, questions, ends)
        together = self.answered_together(bytes_a_token, max(each.longest for each in questions))
        prompts = self.prompts_together(questions, min(together, mlx_answers.PROMPTS), share_prefix=False)
        return mlx_answers.in_batches(self.model, questions, ends, together, len(prompts.lengths))

    def _states(self, batch: Batch) -> mx.array:
        """Return the hidden states (N, D), or the logits (N, V) if the architecture gives only those."""
        return self.forward.hidden(batch) if self.forward.picks_positions else self.forward.logits(batch)

    def _logits(self, states: mx.array) -> mx.array:
        return self.forward.head(states) if self.forward.picks_positions else states

    def _loss(self, batch: Batch) -> mx.array:
        targets = mx.array(batch.targets)
        if not self.forward.picks_positions:
            return cross_entropy(self.forward.logits(batch, self.checkpoint), targets)[0].sum()
        if self._takes_two_passes(len(targets)):
            return self._loss_within_budget(batch, targets)
        return self._chunked_loss(self.forward.hidden(batch, self.checkpoint), targets)

    def _takes_two_passes(self, count: int) -> bool:
        return self.checkpoint and not self._head_is_trained and len(list(self.chunks(count))) > 1

    def _chunked_loss(self, hidden: mx.array, targets: mx.array) -> mx.array:
        """Return the loss of picked hidden states (N, D); the gradient of each chunk is computed in the forward pass.

        The gradient with respect to the hidden states is known as soon as the logits are. So logits are not kept for
        the backward pass, and only one chunk of them is in memory at a time.
        """
        if self._head_is_trained:  # it needs a gradient of its own: leave that to mlx, in recomputed chunks
            chunk = nn.utils.checkpoint(self.model, lambda h, t: cross_entropy(self.forward.head(h), t)[0].sum())
            losses = [chunk(hidden[a:b], targets[a:b]) for a, b in self.chunks(len(targets))]
            return mx.stack(losses).sum()

        def loss_and_d_hidden(states: mx.array) -> tuple[mx.array, mx.array]:
            losses: list[mx.array] = []
            gradients: list[mx.array] = []
            for start, stop in self.chunks(len(targets)):
                part, right = states[start:stop], targets[start:stop]
                if losses:  # the next chunk waits for this one's gradient, or mlx would be free to mix them
                    part = mx.depends([part], [gradients[-1]])[0]
                value, gradient = self._loss_and_d_hidden(part, right)
                losses.append(value)
                gradients.append(gradient)
            return mx.stack(losses).sum(), mx.concatenate(gradients)

        def backward(_: Any, cotangents: tuple[mx.array, mx.array], outputs: tuple[mx.array, mx.array]) -> mx.array:
            return (cotangents[0] * outputs[1]).astype(hidden.dtype)

        return with_gradient(loss_and_d_hidden, backward)(hidden)[0]

    def _loss_within_budget(self, batch: Batch, targets: mx.array) -> mx.array:
        """Return the loss with only one chunk of logits in memory, at the cost of one more forward pass.

        While mlx takes gradients it keeps all that it has evaluated, and otherwise it allocates ahead of what it
        computes. So a first pass, without gradients, gives the hidden states that the loss is made of.
        """
        trained, seed = trained_arrays(self.model), seed_of_now()
        copies = {name: without_history(value) for name, value in trained.items()}
        try:
            self.model.update(tree_unflatten(copies))
            mx.random.seed(seed)
            states = self.forward.hidden(batch)
            mx.eval(states)
        finally:
            self.model.update(tree_unflatten(trained))
            mx.random.seed(seed)  # the pass that is differentiated drops the same inputs
        losses, gradients = [], []
        for start, stop in self.chunks(len(targets)):
            value, gradient = self._loss_and_d_hidden(states[start:stop], targets[start:stop])
            mx.eval(value, gradient)
            losses.append(without_history(value))
            gradients.append(without_history(gradient))
        total, d_hidden = mx.stack(losses).sum(), mx.concatenate(gradients)

        def loss(_: mx.array) -> mx.array:
            return total

        def backward(_: Any, cotangent: mx.array, __: mx.array) -> mx.array:
            return (cotangent * d_hidden).astype(states.dtype)

        return with_gradient(loss, backward)(self.forward.hidden(batch, self.checkpoint))

    def _loss_and_d_hidden(self, hidden: mx.array, targets: mx.array) -> tuple[mx.array, mx.array]:
        """Return the summed loss of one chunk, and its gradient with respect to the hidden states (N, D)."""
        raw = self.forward.head(hidden)
        losses, logits = cross_entropy(raw, targets)
        # Written out: mlx's own gradient would hold seven arrays of this size instead of LOGITS_COPIES.
        right = mx.arange(logits.shape[-1]) == targets[:, None]
        counted = (targets != IGNORED)[:, None]
        d_logits = mx.where(counted, mx.softmax(logits, axis=-1) - right, 0).astype(raw.dtype)
        (gradient,) = mx.vjp(self.forward.head, [hidden], [d_logits])[1]
        return losses.sum(), gradient


def seed_of_now() -> int:
    """Return a seed that is a function of the state of mlx's random numbers."""
    state: Any = mx.random.state  # a list of one array; mlx's stub does not know it
    return int.from_bytes(np.array(state[0]).tobytes(), "little")
