"""Layers whose weights stay in a file and are read a few rows at a time, in every forward pass.

So a model is asked for its answers that is larger than the memory an export may take: one in 16 or 32 bits, or a GGUF
file, which mlx-lm itself does not read. Whoever stored the rows says what they mean; here they are float32, (rows, in).
"""

from collections.abc import Mapping
from typing import Protocol

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx.utils import tree_unflatten

from mbf_mlx.base.unpack import without_history

PIECE_ELEMENTS = 1 << 23  # of a weight in memory at a time: 32 MB
LINEAR = (nn.Linear, nn.QuantizedLinear)
EMBEDDINGS = (nn.Embedding, nn.QuantizedEmbedding)


class Rows(Protocol):
    """A weight (out, in) somewhere; checkpoint.Layer is one."""

    @property
    def shape(self) -> tuple[int, ...]:
        """(out, in)."""

    def rows(self, first: int = 0, last: int | None = None) -> np.ndarray:
        """Return rows `first` to `last` (all by default), (rows, in) float32."""


class LinearOnDisk(nn.Module):
    """A linear layer; its own bias, if any, is in memory.

    Args:
        weight: Where the weight is.
        bias: (out,), or None.
    """

    def __init__(self, weight: Rows, bias: mx.array | None) -> None:
        super().__init__()
        self._rows = weight
        if bias is not None:
            self.bias = bias

    def __call__(self, x: mx.array) -> mx.array:
        """Return x W^T + bias for x (..., in)."""
        y = _product(self._rows, x)
        return y + self["bias"].astype(y.dtype) if "bias" in self else y


class EmbeddingOnDisk(nn.Module):
    """An embedding, which may be the model's head, too."""

    def __init__(self, weight: Rows, dtype: mx.Dtype) -> None:
        super().__init__()
        self._rows, self._dtype = weight, dtype

    def __call__(self, tokens: mx.array) -> mx.array:
        """Return the rows of tokens (...), (..., dims)."""
        wanted = np.array(tokens)
        different, places = np.unique(wanted, return_inverse=True)
        found = np.concatenate([self._rows.rows(int(token), int(token) + 1) for token in different])
        return mx.array(found[places.reshape(wanted.shape)]).astype(self._dtype)

    def as_linear(self, x: mx.array) -> mx.array:
        """Return the logits, x W^T, for x (..., dims)."""
        return _product(self._rows, x)


def _product(weight: Rows, x: mx.array) -> mx.array:
    """Return x W^T in the type of x, evaluated piece by piece, so that one piece is alive at a time."""
    out, inner = weight.shape
    step = max(1, PIECE_ELEMENTS // inner)
    x32, parts = x.astype(mx.float32), []
    for first in range(0, out, step):
        rows = mx.array(weight.rows(first, min(first + step, out)))
        parts.append(without_history(x32 @ rows.T).astype(x.dtype))
    return parts[0] if len(parts) == 1 else mx.concatenate(parts, axis=-1)


def leave_on_disk(model: nn.Module, weights: Mapping[str, Rows], dtype: mx.Dtype | None = None) -> None:
    """Put layers that read their weights from a file in place of a model's own, whose weights were not read yet.

    Args:
        model: As mlx-lm loads it lazily; a layer with factors keeps them.
        weights: By the layer's path in the model. One that the model does not have, or has otherwise, is left out.
        dtype: Of what embeddings give; None is what they give now.
    """
    replaced: list[tuple[str, nn.Module]] = []
    for path, module in model.named_modules():
        weight = weights.get(path, weights.get(path.removesuffix(".linear")))  # where mlx-lm has factors beside it
        if type(module) not in LINEAR + EMBEDDINGS or weight is None or module.weight.shape[0] != weight.shape[0]:
            continue
        if type(module) in LINEAR:
            replaced.append((path, LinearOnDisk(weight, module.get("bias"))))
        else:
            replaced.append((path, EmbeddingOnDisk(weight, dtype or module.get("scales", module.weight).dtype)))
    model.update_modules(tree_unflatten(replaced))
