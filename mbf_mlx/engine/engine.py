"""The loss and the scores of a batch: logits only where they are needed, in chunks, the shared prefix computed once.

Shapes: N supervised positions (data/batches.py), D the hidden size, V the vocabulary; hidden states there are (N, D),
logits (N, V). Losses are differentiable with respect to the model's trainable parameters, which are LoRA factors as
mlx-lm attaches them. The optimizer and the steps are left to learning/train.py.

Two ways lead to the hidden states: mlx-lm's own forward pass (mlx_forward.py), for every architecture and device; and
for a Llama on a CPU a pass of our own (llama_pass.py), with its gradients by hand. `prepare` chooses, and is the only
switch.
"""

from collections.abc import Callable, Iterator, Sequence
from functools import cached_property, partial
from typing import Any

import mlx.core as mx
import numpy as np
from mlx import nn
from mlx.utils import tree_flatten, tree_unflatten

from mbf_mlx.base.unpack import evaluate, evaluated, without_history
from mbf_mlx.data.batches import IGNORED, Batch, LabelledTokens, make_batch, of_few_shapes, split
from mbf_mlx.device.blas import load_blas
from mbf_mlx.device.budgets import LOGITS_BYTES, LOGITS_COPIES
from mbf_mlx.engine import cpu_ops
from mbf_mlx.engine import llama_pass as llama
from mbf_mlx.engine.llama_attention import Shared
from mbf_mlx.engine.lora_layers import lora_layers
from mbf_mlx.engine.mlx_forward import Forward
from mbf_mlx.engine.taps import called_by
from mbf_mlx.errors import MemoryLimitError

Arrays = dict[str, mx.array]  # by name: what is differentiated, and its gradients
KNOWN_WELL = 1e-6  # nats: a loss below this is taken for it where its logarithm is
WATCHED_TOKENS = 384  # of several rows that are watched at the same time
# A batch's place among those watched at the same time, a layer, its inputs (T, in), the gradients with respect to its
# outputs (T, out), and the row of the batch that each token is of (T,).
Note = Callable[[int, str, mx.array, mx.array, np.ndarray], None]
LossAndGrad = Callable[[Arrays, Batch], tuple[mx.array, Arrays]]


def prepare(
    model: nn.Module,
    *,
    checkpoint: bool = False,
    logits_bytes: int = LOGITS_BYTES,
    by_hand: bool | None = None,
    compiled: bool | None = None,
) -> "Engine":
    """Return the engine for a model with its LoRA layers attached.

    Args:
        model: A model as mlx-lm loads it.
        checkpoint: Recompute a block's activations in the backward pass instead of keeping them.
        logits_bytes: The budget of `memory.LOGITS_BYTES`.
        by_hand: Whether llama_pass.py computes the pass; None is wherever it fits and the device is a CPU.
        compiled: Whether `loss_and_grad` compiles mlx-lm's pass, once for each shape; None is on a GPU.
    """
    on_cpu = mx.default_device() == mx.Device(mx.cpu)
    if by_hand is None:
        by_hand = on_cpu and llama.fits(model)
    if compiled is None:
        compiled = not on_cpu
    return Engine(model, checkpoint=checkpoint, logits_bytes=logits_bytes, by_hand=by_hand, compiled=compiled)


class Engine:
    """Losses and scores of batches, on one model."""

    def __init__(self, model: nn.Module, *, checkpoint: bool, logits_bytes: int, by_hand: bool, compiled: bool):
        self.model = model
        self.logits_bytes = logits_bytes
        self.checkpoint = checkpoint  # may be set anew between two batches
        self.before: Callable[[Batch, bool], None] = lambda batch, training: None  # called before each batch
        self.by_hand = by_hand
        self.compiled = compiled and not by_hand
        self.cores = min(cpu_ops.CORES, load_blas().threads)  # each computes a part of a batch, by hand
        self.head = llama.Head(model) if by_hand else self.forward.head
        self.vocabulary = llama.Head(model).vocabulary if by_hand else self.forward.vocabulary
        # Where more than the blocks is trained, the head's own gradient is needed as well.
        self._head_is_trained = _count_trained(model) > sum(_count_trained(block) for block in model.layers)

    @cached_property
    def forward(self) -> Forward:
        """mlx-lm's pass; it is tried on a few tokens when it is first asked for."""
        return Forward(self.model)

    @property
    def shares_prefix(self) -> bool:
        """Whether a batch's prefix is computed once, not for every row."""
        return self.by_hand or self.forward.shares_prefix

    @property
    def picks_positions(self) -> bool:
        """Whether logits are computed at supervised positions alone."""
        return self.by_hand or self.forward.picks_positions

    def loss_sum(self, batch: Batch) -> mx.array:
        """Return the sum of the cross-entropy over the batch's N supervised tokens: a float32 scalar.

        The cross-entropy itself is in float32 whatever the model computes in. Dropout, where the model has any, is on
        or off as `model.train()` and `model.eval()` left it.
        """
        if not len(batch.targets):
            return mx.array(0.0)
        self.before(batch, True)
        return self._loss_by_hand(batch) if self.by_hand else self._loss(batch)

    def _loss(self, batch: Batch) -> mx.array:
        """Return the loss by mlx-lm's way."""
        targets = mx.array(batch.targets)
        if not self.picks_positions:
            return _cross_entropy(self.forward.logits(batch, self.checkpoint), targets)[0].sum()
        if self._takes_two_passes(len(targets)):
            return self._loss_within_budget(batch, targets)
        return self._chunked_loss(self.forward.hidden(batch, self.checkpoint), targets)

    def _takes_two_passes(self, count: int) -> bool:
        return self.checkpoint and not self._head_is_trained and len(list(self._chunks(count))) > 1

    def loss_and_grad(self, apply: Callable[[Arrays], None]) -> LossAndGrad:
        """Return a function from arrays and a batch to `loss_sum` of the batch and its gradients, by the arrays' names.

        Where the engine is compiled, that function is compiled once for each shape of a batch, and batches are padded
        to few shapes. It is made for one task: what `apply` reads besides the arrays is compiled in.

        Args:
            apply: Lets the model compute with these arrays.
        """

        def loss(arrays: Arrays, batch: Batch) -> mx.array:
            apply(arrays)
            return self.loss_sum(batch)

        def loss_at(arrays: Arrays, prefix: mx.array, tokens: mx.array, at: mx.array, targets: mx.array) -> mx.array:
            apply(arrays)
            return self._chunked_loss(self.forward.hidden_at(prefix, tokens, at, self.checkpoint), targets)

        plain: LossAndGrad = mx.value_and_grad(loss)
        compilations: dict[tuple[bool, bool], Callable[..., tuple[mx.array, Arrays]]] = {}  # by what a trace depends on

        def compiled(arrays: Arrays, batch: Batch) -> tuple[mx.array, Arrays]:
            padded = of_few_shapes(batch)
            count = len(padded.targets)
            if not count or not self.picks_positions or self._takes_two_passes(count):
                return plain(arrays, batch)
            self.before(batch, True)
            traced = (self.checkpoint, self.model.training)
            if traced not in compilations:
                state = mx.random.state  # of dropout: it goes in and comes out, or all steps would drop the same inputs
                compilations[traced] = mx.compile(mx.value_and_grad(loss_at), inputs=state, outputs=state)
            found = compilations[traced](arrays, *self.forward.inputs(padded), mx.array(padded.targets))
            apply(arrays)  # tracing has left arrays without values in the model
            return found

        return compiled if self.compiled else plain

    def watched_together(self, rows: Sequence[LabelledTokens], start: int, batch_size: int) -> list[Batch]:
        """Return the rows from `start` on that `watch` is to see at the same time, each core's in a batch.

        Short ones go together, for that is faster, but no more of them than train together, or one for each core;
        where memory has no room for that, a row is alone.
        """
        least, most = (self.cores, max(self.cores, batch_size)) if self.by_hand else (1, 1)
        stop, tokens = start + 1, len(rows[start].tokens)
        while stop < min(len(rows), start + most):
            tokens += len(rows[stop].tokens)
            if stop - start >= least and tokens > WATCHED_TOKENS:
                break
            stop += 1
        batch = make_batch(rows, range(start, stop), share_prefix=False)
        try:
            self.before(batch, True)
        except MemoryLimitError:
            batch = make_batch(rows, [start], share_prefix=False)
            self.before(batch, True)
        return split(batch, self.cores) if self.by_hand else [batch]

    def watch(self, batches: Sequence[Batch], note: Note, logarithm: bool = True) -> None:
        """Tell of each trained layer's inputs, and of the gradients with respect to its outputs.

        They are those of the sum over rows of a row's mean loss, or of its logarithm: a row's differ in size alone, and
        half precision does not lose those of the logarithm where a row is known well.

        Args:
            batches: As `watched_together` makes them. There is nothing to tell of one without a supervised token.
            note: What is told. It has to evaluate what it makes of it: it may be called in several threads.
            logarithm: Which of the two.
        """
        some = [(place, batch) for place, batch in enumerate(batches) if len(batch.targets)]
        if self.by_hand:
            trained = tree_flatten(self.model.trainable_parameters())
            factors = {name: value.astype(mx.float32) for name, value in trained}
            mx.eval(self.model.parameters(), factors)  # no thread can evaluate what another has begun

            def there(place: int, batch: Batch) -> None:
                def told(name: str, x: mx.array, gradients: mx.array) -> None:
                    note(place, name, x, gradients, run.layout.row_of(len(x)))

                run = llama.Pass(self.model, factors, batch, checkpoint=self.checkpoint, note=told)
                losses, d_hidden = self._loss_and_gradient(run.forward(), batch.targets, len(some))
                of_rows = np.bincount(batch.row_of, losses if logarithm else None)[batch.row_of]
                sizes = of_rows + KNOWN_WELL if logarithm else of_rows
                run.backward(d_hidden / mx.array(sizes.astype(np.float32))[:, None])

            cpu_ops.side_by_side([partial(there, place, batch) for place, batch in some])
            return
        _ = self.forward  # made now: it runs the model once, which nobody asked to watch

        def call(place: int, name: str, layer: nn.Module, x: mx.array) -> mx.array:
            @mx.custom_function
            def same(y: mx.array) -> mx.array:
                return y

            @same.vjp
            def told(_: Any, gradient: mx.array, __: Any) -> mx.array:
                inputs, gradients = (each.reshape(-1, each.shape[-1]) for each in (x, gradient))
                note(place, name, inputs, gradients, np.zeros(len(inputs), np.int32))  # of one row, here
                return gradient

            y: mx.array = same(layer(x))  # type: ignore[assignment]
            return y

        layers = lora_layers(self.model)
        for place, batch in some:

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

    def score(self, batch: Batch) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Return what the model says at each supervised position.

        Returns:
            The cross-entropy of the target, float32[N]; the most likely token, int32[N]; and by how much its logit
            exceeds the second, float32[N].
        """
        if not len(batch.targets):
            return np.zeros(0, np.float32), np.zeros(0, np.int32), np.zeros(0, np.float32)
        self.before(batch, False)
        targets = mx.array(batch.targets)
        if self.by_hand:
            states = self._hidden_by_hand(batch)
        else:
            states = self.forward.hidden(batch) if self.picks_positions else self.forward.logits(batch)
        parts: list[tuple[np.ndarray, np.ndarray, np.ndarray]] = []
        for start, stop in self._chunks(len(batch.targets)):
            logits = self.head(states[start:stop]) if self.picks_positions else states[start:stop]
            losses, logits = _cross_entropy(logits, targets[start:stop])
            best = mx.argmax(logits, axis=-1, keepdims=True)
            second = mx.where(mx.arange(logits.shape[-1]) == best, -mx.inf, logits).max(axis=-1)
            margin = mx.take_along_axis(logits, best, axis=-1)[:, 0] - second
            mx.eval(losses, best, margin)  # chunk by chunk, or all logits would be alive at once
            parts.append((np.array(losses), np.array(best[:, 0].astype(mx.int32)), np.array(margin)))
        all_losses, all_best, all_margins = zip(*parts)
        return np.concatenate(all_losses), np.concatenate(all_best), np.concatenate(all_margins)

    def _parts(self, batch: Batch) -> tuple[list[Batch], list[Shared]]:
        """Return the parts of a batch that are computed at the same time, and how they come by its prefix."""
        evaluate(self.model)  # no thread can evaluate what another has begun
        parts = split(batch, self.cores)
        several = len(parts) > 1 and len(batch.prefix)
        return parts, [Shared(len(parts)) for _ in self.model.layers] if several else []

    def _hidden_by_hand(self, batch: Batch) -> mx.array:
        """Return the hidden states at the supervised positions, (N, D)."""
        parts, shared = self._parts(batch)

        def there(part: Batch) -> mx.array:
            return evaluated(llama.Pass(self.model, {}, part, keep=False, shared=shared).forward())

        return mx.concatenate(cpu_ops.side_by_side([partial(there, part) for part in parts]))

    def _loss_by_hand(self, batch: Batch) -> mx.array:
        """Return the loss by way of llama_pass.py; mlx sees one function of the trained factors, and its gradient."""
        trained = tree_flatten(self.model.trainable_parameters())
        # Copies without history: on arrays that mlx differentiates it would keep every intermediate result.
        factors = {name: without_history(value.astype(mx.float32)) for name, value in trained}
        parts, shared = self._parts(batch)

        def there(part: Batch) -> tuple[np.ndarray, mx.array, llama.Pass]:
            run = llama.Pass(self.model, factors, part, checkpoint=self.checkpoint, shared=shared)
            return *self._loss_and_gradient(run.forward(), part.targets, len(parts)), run

        done = cpu_ops.side_by_side([partial(there, part) for part in parts])
        losses = np.concatenate([losses for losses, _, _ in done])
        value = mx.array(losses.sum(dtype=np.float64).astype(np.float32))

        @mx.custom_function
        def loss(*_: mx.array) -> mx.array:
            return value

        @loss.vjp
        def gradients(_: Any, cotangent: mx.array, __: mx.array) -> list[mx.array]:
            backs = [partial(run.backward, without_history(cotangent * d_hidden)) for _, d_hidden, run in done]
            first, *others = cpu_ops.side_by_side(backs)
            found = {name: sum((other[name] for other in others), first[name]) for name in first}
            return [found[name].astype(value.dtype) for name, value in trained]

        return loss(*(value for _, value in trained))  # type: ignore[return-value]

    def _loss_and_gradient(self, hidden: mx.array, targets: np.ndarray, sharing: int) -> tuple[np.ndarray, mx.array]:
        """Return the losses (N,) of hidden states (N, D) and their sum's gradient, chunk by chunk of logits.

        As many as are `sharing` the budget do this at the same time.
        """
        losses, gradients, head = [], [], llama.Head(self.model)
        for start, stop in self._chunks(len(targets), sharing):
            part = hidden[start:stop]
            logits = head(part)
            mx.eval(logits)
            losses.append(cpu_ops.cross_entropy_(logits, targets[start:stop]))
            gradient = head.backward(part, logits)
            mx.eval(gradient)
            gradients.append(gradient)
        return np.concatenate(losses), evaluated(mx.concatenate(gradients))

    def _chunks(self, count: int, sharing: int = 1) -> Iterator[tuple[int, int]]:
        most = max(1, self.logits_bytes // (4 * LOGITS_COPIES * self.vocabulary * sharing))
        rows = max(1, -(-count // max(1, -(-count // most))))  # as few chunks as can be, of one size
        for start in range(0, count, rows):
            yield start, min(start + rows, count)

    def _chunked_loss(self, hidden: mx.array, targets: mx.array) -> mx.array:
        """Return the loss of picked hidden states (N, D); the gradient of each chunk is taken on the way forward.

        The sum's gradient with respect to the hidden states is known as soon as the logits are, so they are not
        kept for the backward pass, and never more than one chunk of them is alive.
        """
        if self._head_is_trained:  # its own gradient is needed as well: leave it to mlx, in recomputed chunks
            chunk = nn.utils.checkpoint(self.model, lambda h, t: _cross_entropy(self.head(h), t)[0].sum())
            losses = [chunk(hidden[a:b], targets[a:b]) for a, b in self._chunks(len(targets))]
            return mx.stack(losses).sum()

        def both(states: mx.array) -> tuple[mx.array, mx.array]:
            losses: list[mx.array] = []
            gradients: list[mx.array] = []
            for start, stop in self._chunks(len(targets)):
                part, right = states[start:stop], targets[start:stop]
                if losses:  # the next chunk waits for this one's gradient, or mlx would be free to mix them
                    part = mx.depends([part], [gradients[-1]])[0]

                value, gradient = self._loss_and_d_hidden(part, right)
                losses.append(value)
                gradients.append(gradient)
            return mx.stack(losses).sum(), mx.concatenate(gradients)

        loss_and_gradient = mx.custom_function(both)

        @loss_and_gradient.vjp
        def backward(_: Any, cotangents: tuple[mx.array, mx.array], outputs: tuple[mx.array, mx.array]) -> mx.array:
            return (cotangents[0] * outputs[1]).astype(hidden.dtype)

        loss_of_all: mx.array = loss_and_gradient(hidden)[0]  # type: ignore[index]
        return loss_of_all

    def _loss_within_budget(self, batch: Batch, targets: mx.array) -> mx.array:
        """Return the loss with never more than one chunk of logits alive, for one more forward pass.

        While mlx takes gradients it keeps all that it has evaluated, and else it allocates ahead of what it computes:
        so the hidden states that the loss is made of come from a pass of their own, without gradients.
        """
        trained, seed = tree_flatten(self.model.trainable_parameters()), seed_of_now()
        copies = [(name, without_history(value)) for name, value in trained]
        try:
            self.model.update(tree_unflatten(copies))
            mx.random.seed(seed)
            states = self.forward.hidden(batch)
            mx.eval(states)
        finally:
            self.model.update(tree_unflatten(trained))
            mx.random.seed(seed)  # the pass that is differentiated drops the same inputs
        losses, gradients = [], []
        for start, stop in self._chunks(len(targets)):
            value, gradient = self._loss_and_d_hidden(states[start:stop], targets[start:stop])
            mx.eval(value, gradient)
            losses.append(without_history(value))
            gradients.append(without_history(gradient))
        total, d_hidden = mx.stack(losses).sum(), mx.concatenate(gradients)

        @mx.custom_function
        def loss(_: mx.array) -> mx.array:
            return total

        @loss.vjp
        def backward(_: Any, cotangent: mx.array, __: mx.array) -> mx.array:
            return (cotangent * d_hidden).astype(states.dtype)

        return loss(self.forward.hidden(batch, self.checkpoint))  # type: ignore[return-value]

    def _loss_and_d_hidden(self, hidden: mx.array, targets: mx.array) -> tuple[mx.array, mx.array]:
        """Return the summed loss of one chunk, and its gradient with respect to the hidden states (N, D)."""
        raw = self.head(hidden)
        losses, logits = _cross_entropy(raw, targets)
        # Written out: mlx's own gradient would hold seven arrays of this size instead of LOGITS_COPIES.
        right = mx.arange(logits.shape[-1]) == targets[:, None]
        counted = (targets != IGNORED)[:, None]
        d_logits = mx.where(counted, mx.softmax(logits, axis=-1) - right, 0).astype(raw.dtype)
        (gradient,) = mx.vjp(self.head, [hidden], [d_logits])[1]
        return losses.sum(), gradient


def seed_of_now() -> int:
    """Return a seed that is a function of the state of mlx's random numbers."""
    return int.from_bytes(np.array(mx.random.state[0]).tobytes(), "little")  # type: ignore[index]


def _cross_entropy(logits: mx.array, targets: mx.array) -> tuple[mx.array, mx.array]:
    """Return the cross-entropy of each target, float32 (N,) and 0 for IGNORED, and the logits (N, V) in float32."""
    logits = logits.astype(mx.float32)
    targets = mx.stop_gradient(targets)  # a checkpointed call would ask for their gradient
    right = mx.take_along_axis(logits, mx.maximum(targets, 0)[:, None], axis=-1)[:, 0]
    return mx.where(targets == IGNORED, 0, mx.logsumexp(logits, axis=-1) - right), logits


def _count_trained(module: nn.Module) -> int:
    return len(tree_flatten(module.trainable_parameters()))
