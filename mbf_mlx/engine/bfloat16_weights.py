"""A model's frozen weights in bfloat16, packed for the CPU's own products (device/bfloat16.py).

Weights and what is multiplied with them are rounded to bfloat16; sums are float32. Everything else stays float32:
hidden states, norms, softmax, LoRA factors, the loss and the optimizer. Dequantized weights are rounded once.

Letters: T tokens; a weight is (out, in). Its product is x W^T for x (T, in), and backward d_y W for d_y (T, out).
"""

from collections.abc import Iterator

import mlx.core as mx
import numpy as np
from mlx import nn

from mbf_mlx.device.bfloat16 import Library, Packed
from mbf_mlx.engine.cpu_ops import CORES, blank, for_each, view

LEAST_ROWS = 32  # of a product that is worth sharing between cores

Rounded = np.ndarray  # bfloat16 numbers as uint16, row after row


class PackedWeight:
    """One frozen weight, for products and for the gradients of their inputs.

    Args:
        library: What multiplies.
        weight: float32 (out, in).
    """

    def __init__(self, library: Library, weight: mx.array) -> None:
        halves = rounded(weight)
        self._forward, self._backward = library.pack(halves), library.pack(halves, turned=True)

    def product(self, x: mx.array | Rounded, onto: mx.array | None = None) -> mx.array:
        """Return x W^T, (T, out), added to `onto`, for x (T, in)."""
        return _product(self._forward, self._forward.shape[0], x, onto)

    def product_back(self, d_y: mx.array, onto: mx.array | None = None) -> mx.array:
        """Return d_y W, (T, in), added to `onto`, for d_y (T, out)."""
        return _product(self._backward, self._backward.shape[1], d_y, onto)


class Bfloat16Weights:
    """The packed weights of a model, by module.

    Args:
        library: What multiplies.
        modules: The linear layers, and the embedding if it is the head, whose weights are float32 (out, in).
    """

    def __init__(self, library: Library, modules: Iterator[nn.Module]) -> None:
        self._modules = list(modules)  # keeps them alive: their addresses are the keys
        self._packed = {id(module): PackedWeight(library, module.weight) for module in self._modules}

    def of(self, module: nn.Module) -> PackedWeight | None:
        """Return a module's packed weight; None for a module that has none."""
        return self._packed.get(id(module))


def rounded(x: mx.array) -> Rounded:
    """Return an array's nearest bfloat16 numbers, ties to even."""
    halves: np.ndarray = view(mx.contiguous(x.astype(mx.bfloat16)).view(mx.uint16))
    return halves


def _product(packed: Packed, width: int, x: mx.array | Rounded, onto: mx.array | None) -> mx.array:
    halves = x if isinstance(x, np.ndarray) else rounded(x)
    count = len(halves)
    if onto is None:
        out = blank(count, width)
    else:
        out = onto + 0  # a copy to add to
        mx.eval(out)
    target = view(out)
    rows = max(LEAST_ROWS, -(-count // CORES))

    def block(first: int) -> None:
        some = slice(first, first + rows)
        packed.multiply(halves[some], target[some], add=onto is not None)

    for_each(block, ((first,) for first in range(0, count, rows)))
    return out
