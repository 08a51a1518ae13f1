"""Quantized layers where there is no fast kernel for them.

On a CPU mlx multiplies packed weights at a hundredth of the speed of plain float32 ones. They are unpacked once, or,
where that does not fit in memory, anew in every pass.

Shapes: a weight is (out, in). The values are those of the packed weight, in float32.
"""

from collections.abc import Iterator
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from mbf_mlx.device.budgets import PIECE_BYTES


def plain(module: Any) -> nn.Module:
    """Return the linear layer or embedding whose weight a quantized one holds."""
    if isinstance(module, nn.QuantizedEmbedding):
        made: nn.Module = nn.Embedding(1, 1)
    else:
        made = nn.Linear(1, 1, bias="bias" in module)
        if "bias" in module:
            made.bias = to_float32(module.bias)
    made.weight = _rows(module, 0, module.weight.shape[0])
    return made


def to_float32(value: mx.array) -> mx.array:
    """Return numbers in float32, packed codes and counts as they are."""
    return value.astype(mx.float32) if mx.issubdtype(value.dtype, mx.floating) else value


def _rows(module: Any, first: int, last: int) -> mx.array:
    """Return rows of the weight, (last - first, in)."""
    biases = module.get("biases")
    # Scales in float32 first: in float16 a code times its scale is rounded, and the kernels on a GPU do not do that.
    return mx.dequantize(
        module.weight[first:last],
        to_float32(module.scales[first:last]),
        None if biases is None else to_float32(biases[first:last]),
        group_size=module.group_size,
        bits=module.bits,
        mode=module.mode,
        global_scale=module.get("global_scale"),
        dtype=mx.float32,
    )


class UnpackingLinear(nn.QuantizedLinear):
    """A quantized linear layer that unpacks its weight in every forward and backward pass and keeps nothing of it."""

    def __call__(self, x: mx.array) -> mx.array:
        """Return x W^T + bias for x (..., in)."""
        y = _product(self, x)
        return y + self["bias"] if "bias" in self else y


class UnpackingEmbedding(nn.QuantizedEmbedding):
    """The same for an embedding that is also the model's head."""

    def as_linear(self, x: mx.array) -> mx.array:
        """Return the logits, x W^T, for x (..., dims)."""
        return _product(self, x)


def keep_packed(module: nn.Module) -> None:
    """Turn a quantized linear layer or embedding into one that unpacks itself."""
    module.__class__ = UnpackingEmbedding if isinstance(module, nn.QuantizedEmbedding) else UnpackingLinear


class SteppingLinear(UnpackingLinear):
    """The same where nothing is differentiated: one piece after the other, and no second one begun before."""

    def __call__(self, x: mx.array) -> mx.array:
        """Return x W^T + bias for x (..., in)."""
        y = product(self, x)
        return y + self["bias"] if "bias" in self else y


class SteppingEmbedding(UnpackingEmbedding):
    """The same for an embedding that is also the model's head."""

    def as_linear(self, x: mx.array) -> mx.array:
        """Return the logits, x W^T, for x (..., dims)."""
        return product(self, x)


def step_by_step(model: nn.Module) -> None:
    """Let the layers that unpack themselves do so one after the other, for forward passes alone.

    Left to itself, mlx unpacks ahead of the products, in the end the whole model.
    """
    for _, module in model.named_modules():
        if type(module) is UnpackingLinear:
            module.__class__ = SteppingLinear
        elif type(module) is UnpackingEmbedding:
            module.__class__ = SteppingEmbedding


def _product(module: Any, x: mx.array) -> mx.array:
    def forward(x: mx.array) -> mx.array:
        parts = [x @ rows.T for _, _, rows in _pieces(module)]
        return parts[0] if len(parts) == 1 else mx.concatenate(parts, axis=-1)

    def backward(inputs: Any, gradient: mx.array, output: mx.array) -> mx.array:
        parts = [gradient[..., first:last] @ rows for first, last, rows in _pieces(module)]
        return parts[0] if len(parts) == 1 else mx.stack(parts).sum(axis=0)

    # Differentiated automatically, the product would keep every weight of the model until its backward pass.
    product: Any = mx.custom_function(forward)
    product.vjp(backward)
    return product(x)


def product(module: Any, x: mx.array) -> mx.array:
    """Return x W^T of a layer that unpacks itself, evaluated piece by piece, so that one piece is alive at a time."""
    parts = [evaluated(x @ rows.T) for _, _, rows in _pieces(module)]
    return parts[0] if len(parts) == 1 else mx.concatenate(parts, axis=-1)


def product_back(module: Any, d_y: mx.array) -> mx.array:
    """Return the gradient of x, d_y W, in the same way."""
    d_x = mx.array(0.0)
    for first, last, rows in _pieces(module):
        d_x = evaluated(d_x + d_y[..., first:last] @ rows)
    return d_x


def evaluated(array: mx.array) -> mx.array:
    """Return an array after it was computed."""
    mx.eval(array)
    return array


def evaluate(model: nn.Module) -> None:
    """Compute every array that a model holds, also those that `parameters()` leaves out: their names start with "_".

    Another thread cannot compute an array that this one has only described, and some rotary embeddings keep their
    frequencies in such a private array.
    """
    found: list[mx.array] = []
    todo: list[Any] = [model]
    seen: set[int] = set()
    while todo:
        each = todo.pop()
        if isinstance(each, mx.array):
            found.append(each)
        elif id(each) not in seen:
            seen.add(id(each))
            if isinstance(each, dict):  # a module is one, too
                todo.extend(each.values())
            elif isinstance(each, list | tuple | set):
                todo.extend(each)
            if type(each).__module__.startswith("mlx"):
                todo.extend(vars(each).values() if hasattr(each, "__dict__") else ())
    mx.eval(found)


def without_history(array: mx.array) -> mx.array:
    """Return an evaluated copy.

    While mlx takes gradients, an array holds all that it was made of for as long as it lives: here whole weights.
    """
    return mx.array(np.array(array.astype(mx.float32))).astype(array.dtype)  # NumPy has no bfloat16


def _pieces(module: Any) -> Iterator[tuple[int, int, mx.array]]:
    out, words = module.weight.shape
    step = max(1, PIECE_BYTES // (words * 32 // module.bits * 4))
    for first in range(0, out, step):
        last = min(first + step, out)
        yield first, last, _rows(module, first, last)
