"""Layers whose weights stay in a file; each forward pass reads them a few rows at a time.

This lets an export query a model larger than its memory budget: one of 16 or 32 bits, or a GGUF file, which mlx-lm
itself does not read. The rows come as float32, (rows, in), from the class that knows how they are stored.
"""

from collections.abc import Mapping
from typing import Protocol

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx.utils import tree_unflatten

from mbf_mlx.base.unpack import without_history

PIECE_ELEMENTS = 1 << 23  # of a weight in memory at a time: 32 MB in float32
LINEAR = (nn.Linear, nn.QuantizedLinear)
EMBEDDINGS = (nn.Embedding, nn.QuantizedEmbedding)


class Rows(Protocol):
    """A weight (out, in) that is read row by row; checkpoint.Layer is one."""

    @property
    def shape(self) -> tuple[int, ...]:
        """(out, in)."""

    def rows(self, first: int = 0, last: int | None = None) -> np.ndarray:
        """Return rows `first` to `last` (all by default), (rows, in) float32."""


class LinearOnDisk(nn.Module):
    """A linear layer with its weight on disk and its own bias, if any, in memory.

    Args:
        weight: Gives the weight's rows.
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
    """An embedding on disk, which may also be the model's head."""

    def __init__(self, weight: Rows, dtype: mx.Dtype) -> None:
        super().__init__()
        self._rows, self._dtype = weight, dtype

    def __call__(self, tokens: mx.array) -> mx.array:
        """Return the rows of tokens (...) as (..., dims)."""
        wanted = np.array(tokens)
        different, places = np.unique(wanted, return_inverse=True)
        found = np.concatenate([self._rows.rows(int(token), int(token) + 1) for token in different])
        return mx.array(found[places.reshape(wanted.shape)]).astype(self._dtype)

    def as_linear(self, x: mx.array) -> mx.array:
        """Return the logits, x W^T, for x (..., dims)."""
        return _product(self._rows, x)


def _product(weight: Rows, x: mx.array) -> mx.array:
    """Return x W^T in the type of x, evaluated piece by piece, so that only one piece is in memory."""
    out, inner = weight.shape
    step = max(1, PIECE_ELEMENTS // inner)
    x32, parts = x.astype(mx.float32), []
    for first in range(0, out, step):
        rows = mx.array(weight.rows(first, min(first + step, out)))
        parts.append(without_history(x32 @ rows.T).astype(x.dtype))
    return parts[0] if len(parts) == 1 else mx.concatenate(parts, axis=-1)


def leave_on_disk(model: nn.Module, weights: Mapping[str, Rows], dtype: mx.Dtype | None = None) -> None:
    """Replace layers of a model, whose weights were not read yet, by layers that read theirs from a file.

    Args:
        model: As mlx-lm loads it lazily; a layer with factors keeps them.
        weights: By the layer's path in the model. A weight that fits no layer of the model is ignored.
        dtype: The type of what embeddings return; None keeps the present one.
    """
    replaced: list[tuple[str, nn.Module]] = []
    for path, module in model.named_modules():
        weight = weights.get(path, weights.get(path.removesuffix(".linear")))  # the path in a layer with factors
        if type(module) not in LINEAR + EMBEDDINGS or weight is None or module.weight.shape[0] != weight.shape[0]:
            continue
        if type(module) in LINEAR:
            replaced.append((path, LinearOnDisk(weight, module.get("bias"))))
        else:
            replaced.append((path, EmbeddingOnDisk(weight, dtype or module.get("scales", module.weight).dtype)))
    model.update_modules(tree_unflatten(replaced))
