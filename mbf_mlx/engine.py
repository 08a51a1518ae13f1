"""The loss of a batch: mlx-lm's forward pass, logits only where they are needed, the shared prefix computed once.

Shapes: a batch has R rows, a shared prefix of P tokens, L tokens a row after it, N supervised positions (batches.py);
hidden states are (R, L, D), picked ones (N, D), logits (N, V). Everything is differentiable with respect to the model's
trainable parameters, which are LoRA factors as mlx-lm attaches them. The optimizer and the steps are left to train.py.

What an architecture does after its last block (a tied or separate head, soft-capping, a logit scale) is not written
down again here: `_Head` runs the model's own code on the hidden states that were picked. `prepare` compares it with the
model's full logits on a few tokens, and what does not agree is computed in full.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import mlx.core as mx
import numpy as np
from mlx import nn
from mlx.utils import tree_flatten
from mlx_lm.models.base import create_causal_mask
from mlx_lm.models.cache import KVCache, make_prompt_cache

from mbf_mlx.batches import Batch, without_prefix

LOGITS_BYTES = 256 * 2**20  # what all arrays of the size of the logits may hold together
LOGITS_COPIES = 3  # of them at a time: logits, their exponentials, their gradient; all in float32
BACKBONES = ("model", "transformer", "backbone")  # what mlx-lm's models call the part below their head
PROBE_TOKENS = 6
PROBE_TOLERANCE = (1e-3, 3e-2)  # relative, between two ways to the same logits, in float32 and in 16 bits


def prepare(model: nn.Module, *, checkpoint: bool = False, logits_bytes: int = LOGITS_BYTES) -> "Engine":
    """Return the engine for a model with its LoRA layers attached.

    Args:
        model: A model as mlx-lm loads it.
        checkpoint: Recompute a block's activations in the backward pass instead of keeping them.
        logits_bytes: The budget of `LOGITS_BYTES`.
    """
    engine = Engine(model, checkpoint=checkpoint, logits_bytes=logits_bytes)
    engine.probe()
    return engine


class Engine:
    """Losses and scores of batches, on one model."""

    def __init__(self, model: nn.Module, *, checkpoint: bool, logits_bytes: int):
        self.model = model
        self.checkpoint = checkpoint
        self.logits_bytes = logits_bytes
        self.picks_positions = False  # else logits are computed everywhere; what `probe` finds
        self.shares_prefix = False  # else every row computes it again; what `probe` finds
        self._text = getattr(model, "language_model", model)  # the part of a multimodal model that we train
        self._backbone = next((name for name in BACKBONES if callable(getattr(self._text, name, None))), None)
        self._vocabulary = 0
        self._head_is_trained = False

    def probe(self) -> None:
        """Find out, on a few tokens, what holds for this architecture."""
        tokens = mx.arange(1, PROBE_TOKENS + 1)[None]
        full = self.model(tokens)
        self._vocabulary = full.shape[-1]
        if self._backbone is None:
            return
        try:
            hidden = self._hidden(tokens)
            self.picks_positions = _same(self._head(hidden.reshape(PROBE_TOKENS, -1)[2:]), full[0, 2:])
            if self.picks_positions and self._has_plain_caches():
                hidden = self._hidden(tokens[:, 2:], tokens[0, :2])
                self.shares_prefix = _same(self._head(hidden.reshape(PROBE_TOKENS - 2, -1)), full[0, 2:])
        except (TypeError, ValueError, AttributeError, LookupError, RuntimeError):
            return  # an architecture with another interface: what was not shown to agree stays off
        blocks = sum(_count_trained(block) for block in self.model.layers)
        self._head_is_trained = _count_trained(self.model) > blocks

    def loss_sum(self, batch: Batch) -> mx.array:
        """Return the sum of the cross-entropy over the batch's N supervised tokens: a float32 scalar.

        The cross-entropy itself is in float32 whatever the model computes in. Dropout, where the model has any, is on
        or off as `model.train()` and `model.eval()` left it.
        """
        if not len(batch.targets):
            return mx.array(0.0)
        targets = mx.array(batch.targets)
        if not self.picks_positions:
            return _cross_entropy(self._picked_logits(batch), targets)[0].sum()
        return self._chunked_loss(self._picked_hidden(batch), targets)

    def score(self, batch: Batch) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Return what the model says at each supervised position.

        Returns:
            The cross-entropy of the target, float32[N]; the most likely token, int32[N]; and by how much its logit
            exceeds the second, float32[N].
        """
        if not len(batch.targets):
            return np.zeros(0, np.float32), np.zeros(0, np.int32), np.zeros(0, np.float32)
        targets = mx.array(batch.targets)
        states = self._picked_hidden(batch) if self.picks_positions else self._picked_logits(batch)
        parts: list[tuple[np.ndarray, np.ndarray, np.ndarray]] = []
        for start, stop in self._chunks(len(batch.targets)):
            logits = self._head(states[start:stop]) if self.picks_positions else states[start:stop]
            losses, logits = _cross_entropy(logits, targets[start:stop])
            best = mx.argmax(logits, axis=-1, keepdims=True)
            second = mx.where(mx.arange(logits.shape[-1]) == best, -mx.inf, logits).max(axis=-1)
            margin = mx.take_along_axis(logits, best, axis=-1)[:, 0] - second
            mx.eval(losses, best, margin)  # chunk by chunk, or all logits would be alive at once
            parts.append((np.array(losses), np.array(best[:, 0].astype(mx.int32)), np.array(margin)))
        all_losses, all_best, all_margins = zip(*parts)
        return np.concatenate(all_losses), np.concatenate(all_best), np.concatenate(all_margins)

    # -- the forward pass ------------------------------------------------------------------------------------------

    def _picked_hidden(self, batch: Batch) -> mx.array:
        """Return the hidden states at the supervised positions, (N, D)."""
        if not self.shares_prefix:
            batch = without_prefix(batch)
        prefix = mx.array(batch.prefix) if len(batch.prefix) else None
        hidden = self._hidden(mx.array(batch.tokens), prefix)
        return hidden.reshape(-1, hidden.shape[-1])[mx.array(batch.positions)]

    def _picked_logits(self, batch: Batch) -> mx.array:
        """Return the logits at the supervised positions, (N, V), by way of all of them."""
        batch = without_prefix(batch)
        with _checkpointed(self.model.layers if self.checkpoint else []):
            logits = self.model(mx.array(batch.tokens))
        return logits.reshape(-1, logits.shape[-1])[mx.array(batch.positions)]

    def _hidden(self, tokens: mx.array, prefix: mx.array | None = None) -> mx.array:
        """Return what the backbone gives for `tokens` (R, L) behind `prefix` (P,): (R, L, D)."""
        backbone = getattr(self._text, self._backbone or "")
        with _checkpointed(self.model.layers if self.checkpoint else []):
            if prefix is None:
                return backbone(tokens)
            caches = [SharedPrefix() for _ in self.model.layers]
            backbone(prefix[None], caches)  # its output is not used, so its last block's MLP is never computed
            for cache in caches:
                cache.offset = prefix.shape[0]
            return backbone(tokens, caches)

    def _head(self, hidden: mx.array) -> mx.array:
        """Return the logits (N, V) of picked hidden states (N, D)."""
        text = self._text
        backbone = getattr(text, self._backbone or "")
        # The model's own code after its backbone, with a backbone that answers what we already have.
        answered = _Stand(backbone, lambda *_, **__: hidden[None])
        return type(text).__call__(_Stand(text, None, **{self._backbone or "": answered}), mx.zeros((1, 1), mx.int32))[
            0
        ]

    def _has_plain_caches(self) -> bool:
        caches = make_prompt_cache(self.model)
        return len(caches) == len(self.model.layers) and all(type(cache) is KVCache for cache in caches)

    # -- the loss --------------------------------------------------------------------------------------------------

    def _chunks(self, count: int) -> Iterator[tuple[int, int]]:
        rows = max(1, self.logits_bytes // (4 * LOGITS_COPIES * self._vocabulary))
        for start in range(0, count, rows):
            yield start, min(start + rows, count)

    def _chunked_loss(self, hidden: mx.array, targets: mx.array) -> mx.array:
        """Return the loss of picked hidden states (N, D); the gradient of each chunk is taken on the way forward.

        The sum's gradient with respect to the hidden states is known as soon as the logits are, so they are not
        kept for the backward pass, and never more than one chunk of them is alive.
        """
        if self._head_is_trained:  # its own gradient is needed as well: leave it to mlx, in recomputed chunks
            chunk = nn.utils.checkpoint(self.model, lambda h, t: _cross_entropy(self._head(h), t)[0].sum())
            losses = [chunk(hidden[a:b], targets[a:b]) for a, b in self._chunks(len(targets))]
            return mx.stack(losses).sum()

        def both(states: mx.array) -> tuple[mx.array, mx.array]:
            losses: list[mx.array] = []
            gradients: list[mx.array] = []
            for start, stop in self._chunks(len(targets)):
                part, right = states[start:stop], targets[start:stop]
                if losses:  # the next chunk waits for this one's gradient, or mlx would be free to mix them
                    part = mx.depends([part], [gradients[-1]])[0]

                def loss(h: mx.array, right: mx.array = right) -> mx.array:
                    return _cross_entropy(self._head(h), right)[0].sum()

                value, gradient = mx.value_and_grad(loss)(part)
                losses.append(value)
                gradients.append(gradient)
            return mx.stack(losses).sum(), mx.concatenate(gradients)

        loss_and_gradient = mx.custom_function(both)

        @loss_and_gradient.vjp
        def backward(_: Any, cotangents: tuple[mx.array, mx.array], outputs: tuple[mx.array, mx.array]) -> mx.array:
            return (cotangents[0] * outputs[1]).astype(hidden.dtype)

        loss_of_all: mx.array = loss_and_gradient(hidden)[0]  # type: ignore[index]
        return loss_of_all


class SharedPrefix:
    """One layer's keys and values of the prefix, given to mlx-lm's forward pass as that layer's `cache`.

    On the first call (offset 0) it takes in the prefix's keys and values, (1, heads, P, D); on the next (offset P) it
    puts them before every row's own. Unlike mlx-lm's caches it writes nothing in place, so gradients go through it.
    """

    def __init__(self) -> None:
        self.offset = 0
        self.keys: mx.array | None = None
        self.values: mx.array | None = None

    def update_and_fetch(self, keys: mx.array, values: mx.array) -> tuple[mx.array, mx.array]:
        if not self.offset:
            self.keys, self.values = keys, values
            return keys, values
        return _behind(self.keys, keys), _behind(self.values, values)

    def make_mask(self, length: int, return_array: bool = False, window_size: int | None = None) -> Any:
        if return_array or (window_size and self.offset + length > window_size):
            return create_causal_mask(length, self.offset, window_size=window_size)
        return "causal" if self.offset + length > 1 else None


def _behind(prefix: mx.array | None, own: mx.array) -> mx.array:
    assert prefix is not None, "the prefix goes through the model before the rows"
    return mx.concatenate([mx.broadcast_to(prefix, (own.shape[0], *prefix.shape[1:])), own], axis=2)


@contextmanager
def _checkpointed(blocks: list[nn.Module]) -> Iterator[None]:
    """While the graph is built, let `blocks` keep only their inputs for the backward pass."""
    own = [type(block) for block in blocks]
    try:
        for block in blocks:
            # A class for this block alone: mlx-lm's own `grad_checkpoint` changes the class for good, for all models.
            block.__class__ = type(type(block).__name__, (type(block),), {"__call__": _recomputed(type(block))})
        yield
    finally:
        for block, its_class in zip(blocks, own):
            block.__class__ = its_class


def _recomputed(block_class: type) -> Callable[..., mx.array]:
    """Return a `__call__` for a block that recomputes it in the backward pass, its prefix cache included."""

    def call(block: nn.Module, *args: Any, **kwargs: Any) -> mx.array:
        cache = next((each for each in (*args, *kwargs.values()) if isinstance(each, SharedPrefix)), SharedPrefix())
        offset = cache.offset

        # The prefix's keys and values go in as arguments and out as results: mlx only differentiates what it is shown.
        def run(keys: Any, values: Any, *args: Any, **kwargs: Any) -> Any:
            inner = SharedPrefix()
            inner.offset, inner.keys, inner.values = offset, keys, values
            args = tuple(inner if isinstance(each, SharedPrefix) else each for each in args)
            kwargs = {name: inner if isinstance(each, SharedPrefix) else each for name, each in kwargs.items()}
            return block_class.__call__(block, *args, **kwargs), inner.keys, inner.values

        out, keys, values = nn.utils.checkpoint(block, run)(cache.keys, cache.values, *args, **kwargs)
        if not offset:
            cache.keys, cache.values = keys, values
        return out

    return call


class _Stand:
    """Stands in for a module: answers calls with `answer`, has `replaced` attributes, and the module's otherwise."""

    def __init__(self, module: Any, answer: Any, **replaced: Any):
        self.__dict__.update(_module=module, _answer=answer, **replaced)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self._answer(*args, **kwargs)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.__dict__["_module"], name)


def _cross_entropy(logits: mx.array, targets: mx.array) -> tuple[mx.array, mx.array]:
    """Return the cross-entropy of each target, float32 (N,), and the logits (N, V) in float32."""
    logits = logits.astype(mx.float32)
    targets = mx.stop_gradient(targets)  # a checkpointed call would ask for their gradient
    right = mx.take_along_axis(logits, targets[:, None], axis=-1)[:, 0]
    return mx.logsumexp(logits, axis=-1) - right, logits


def _same(one: mx.array, other: mx.array) -> bool:
    if one.shape != other.shape:
        return False
    tolerance = PROBE_TOLERANCE[other.dtype in (mx.float16, mx.bfloat16)]
    one, other = one.astype(mx.float32), other.astype(mx.float32)
    return bool((mx.abs(one - other).max() <= tolerance * mx.abs(other).max()).item())


def _count_trained(module: nn.Module) -> int:
    return len(tree_flatten(module.trainable_parameters()))
