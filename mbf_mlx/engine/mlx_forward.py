"""mlx-lm's forward pass for training: hidden states, the shared prefix once, the model's own head on picked positions.

Shapes: a batch has R rows, a shared prefix of P tokens, L tokens a row after it (data/batches.py); hidden states are
(R, L, D), picked ones (N, D), logits (N, V). Everything is differentiable with respect to the trainable parameters.

What an architecture does after its last block (a tied or separate head, soft-capping, a logit scale) is not repeated
here: `head` runs the model's own code on the hidden states that were picked. `Forward` compares the result with the
model's full logits on a few tokens. A shortcut that does not agree with them stays off.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import mlx.core as mx
from mlx import nn
from mlx_lm.models.base import create_causal_mask
from mlx_lm.models.cache import KVCache, make_prompt_cache

from mbf_mlx.data.batches import Batch, without_prefix

BACKBONES = ("model", "transformer", "backbone")  # what mlx-lm's models call the part below their head
PROBE_TOKENS = 6
PROBE_TOLERANCE = (1e-3, 3e-2)  # relative, between two ways to the same logits, in float32 and in 16 bits


class Forward:
    """mlx-lm's pass from a batch to hidden states and logits, on one model.

    With `checkpoint`, a block's activations are computed again in the backward pass instead of kept.

    Attributes:
        picks_positions: Whether logits can be computed at supervised positions only.
        shares_prefix: Whether a batch's prefix can be computed once for all rows.
        vocabulary: The number of tokens that the model knows, V.
    """

    def __init__(self, model: nn.Module):
        self.model = model
        self.picks_positions = False
        self.shares_prefix = False
        self._text = getattr(model, "language_model", model)  # the part of a multimodal model that we train
        self._backbone = next((name for name in BACKBONES if callable(getattr(self._text, name, None))), None)
        with _without_dropout(model):  # with it two passes never agree
            self.vocabulary = self._try()

    def _try(self) -> int:
        """Try on a few tokens which shortcuts lead to the model's own logits; return its vocabulary."""
        tokens = mx.arange(1, PROBE_TOKENS + 1)[None]
        full: mx.array = self.model(tokens)
        if self._backbone is None:
            return full.shape[-1]
        try:
            self.picks_positions = same(self.head(self._flat_hidden(tokens)[2:]), full[0, 2:])
            if self.picks_positions and self._has_plain_caches():
                behind = self._flat_hidden(tokens[:, 2:], tokens[0, :2])
                self.shares_prefix = same(self.head(behind), full[0, 2:])
        except (TypeError, ValueError, AttributeError, LookupError, RuntimeError):
            pass  # an architecture with another interface: the shortcuts stay off
        return full.shape[-1]

    def inputs(self, batch: Batch) -> tuple[mx.array, mx.array, mx.array]:
        """Return the arguments of `hidden_at` for a batch: prefix (P,), tokens (R, L) and positions (N,)."""
        if not self.shares_prefix:
            batch = without_prefix(batch)
        return mx.array(batch.prefix), mx.array(batch.tokens), mx.array(batch.positions)

    def hidden_at(self, prefix: mx.array, tokens: mx.array, positions: mx.array, checkpoint: bool = False) -> mx.array:
        """Return the hidden states at the supervised positions, (N, D)."""
        return self._flat_hidden(tokens, prefix if prefix.size else None, checkpoint)[positions]

    def hidden(self, batch: Batch, checkpoint: bool = False) -> mx.array:
        """Return the hidden states at a batch's supervised positions, (N, D)."""
        prefix, tokens, positions = self.inputs(batch)
        return self.hidden_at(prefix, tokens, positions, checkpoint)

    def logits(self, batch: Batch, checkpoint: bool = False) -> mx.array:
        """Return the logits at the supervised positions, (N, V), after computing them at all positions."""
        batch = without_prefix(batch)
        with _checkpointed(self.model.layers if checkpoint else []):
            logits: mx.array = self.model(mx.array(batch.tokens))
        return logits.reshape(-1, logits.shape[-1])[mx.array(batch.positions)]

    def _hidden(self, tokens: mx.array, prefix: mx.array | None, checkpoint: bool) -> mx.array:
        """Return the backbone's hidden states (R, L, D) for `tokens` (R, L) behind `prefix` (P,)."""
        backbone = getattr(self._text, self._backbone or "")
        with _checkpointed(self.model.layers if checkpoint else []):
            hidden: mx.array
            if prefix is None:
                hidden = backbone(tokens)
                return hidden
            caches = [SharedPrefix() for _ in self.model.layers]
            backbone(prefix[None], caches)  # its output is not used, so its last block's MLP is never computed
            for cache in caches:
                cache.offset = prefix.shape[0]
            hidden = backbone(tokens, caches)
            return hidden

    def _flat_hidden(self, tokens: mx.array, prefix: mx.array | None = None, checkpoint: bool = False) -> mx.array:
        hidden = self._hidden(tokens, prefix, checkpoint)
        return hidden.reshape(-1, hidden.shape[-1])

    def head(self, hidden: mx.array) -> mx.array:
        """Return the logits (N, V) of picked hidden states (N, D)."""
        text = self._text
        backbone = getattr(text, self._backbone or "")
        # Run the model's own code on a stand-in for the model, whose backbone returns the hidden states that we have.
        known = _StandIn(backbone, lambda *_, **__: hidden[None])
        stand_in = _StandIn(text, None, **{self._backbone or "": known})
        logits: mx.array = type(text).__call__(stand_in, mx.zeros((1, 1), mx.int32))
        return logits[0]

    def _has_plain_caches(self) -> bool:
        caches = make_prompt_cache(self.model)
        return len(caches) == len(self.model.layers) and all(type(cache) is KVCache for cache in caches)


class SharedPrefix:
    """One layer's keys and values of the prefix, given to mlx-lm's forward pass as that layer's `cache`.

    The first call (offset 0) stores the prefix's keys and values, (1, heads, P, D). The next call (offset P) puts them
    before every row's own. Unlike mlx-lm's caches it writes nothing in place, so gradients go through it.
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
def _without_dropout(model: nn.Module) -> Iterator[None]:
    training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(training)


@contextmanager
def _checkpointed(blocks: list[nn.Module]) -> Iterator[None]:
    """Inside this context, the graphs that `blocks` build keep only the blocks' inputs for the backward pass."""
    own = [type(block) for block in blocks]
    try:
        for block in blocks:
            # A class for this block only: mlx-lm's own `grad_checkpoint` changes the class for all models, for good.
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

        # The prefix's keys and values are arguments and results: mlx differentiates nothing else.
        def run(keys: Any, values: Any, *args: Any, **kwargs: Any) -> Any:
            inner = SharedPrefix()
            inner.offset, inner.keys, inner.values = offset, keys, values
            args = tuple(inner if isinstance(each, SharedPrefix) else each for each in args)
            kwargs = {name: inner if isinstance(each, SharedPrefix) else each for name, each in kwargs.items()}
            return block_class.__call__(block, *args, **kwargs), inner.keys, inner.values

        out: mx.array
        out, keys, values = nn.utils.checkpoint(block, run)(cache.keys, cache.values, *args, **kwargs)
        if not offset:
            cache.keys, cache.values = keys, values
        return out

    return call


class _StandIn:
    """Looks like a module, but calls go to `answer`, and attributes in `replaced` come before the module's own."""

    def __init__(self, module: Any, answer: Any, **replaced: Any):
        self.__dict__.update(_module=module, _answer=answer, **replaced)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self._answer(*args, **kwargs)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.__dict__["_module"], name)


def same(one: mx.array, other: mx.array) -> bool:
    """Return whether logits that were computed in two ways agree, up to rounding."""
    if one.shape != other.shape:
        return False
    tolerance = PROBE_TOLERANCE[other.dtype in (mx.float16, mx.bfloat16)]
    one, other = one.astype(mx.float32), other.astype(mx.float32)
    return bool((mx.abs(one - other).max() <= tolerance * mx.abs(other).max()).item())
