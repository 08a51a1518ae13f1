"""Quantized layers on devices that have no fast kernel for them, and evaluating what mlx computes lazily.

On a CPU mlx multiplies packed weights at a hundredth of the speed of plain float32 ones. So they are unpacked once; or,
if that does not fit in memory, in every pass.

Shapes: a weight is (out, in). Unpacked, it holds the values of the packed weight in float32.
"""

from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, ParamSpec, TypeVar, cast

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx.utils import tree_unflatten

from mbf_mlx.base.decode import BITS, decode
from mbf_mlx.device import backend
from mbf_mlx.device.backend import is_on_cpu
from mbf_mlx.device.budgets import PIECE_BYTES
from mbf_mlx.device.machine import cpu_count

Given = ParamSpec("Given")
Result = TypeVar("Result")


def unpack_all(model: nn.Module) -> None:
    """Replace every quantized linear layer and embedding of a model by the plain one, on all cores, largest first.

    A few layers for each core are in memory twice at a time.
    """
    kinds = (nn.QuantizedLinear, nn.QuantizedEmbedding)
    todo = [(name, module) for name, module in model.named_modules() if type(module) in kinds]
    todo.sort(key=lambda each: each[1].weight.size)
    pending: deque[tuple[str, nn.Module, Future[dict[str, mx.array]]]] = deque()
    use_device, cores = backend.same_device(), cpu_count()
    with ThreadPoolExecutor(cores) as pool:
        while todo or pending:
            if todo and len(pending) < 2 * cores:
                name, module = todo.pop()
                mx.eval(module.parameters())  # another thread cannot read what this one has only described
                pending.append((name, _unfilled(module), pool.submit(_plain_arrays, module, use_device)))
                del module
            else:
                name, made, arrays = pending.popleft()
                made.update(arrays.result())
                model.update_modules(tree_unflatten([(name, made)]))


def _unfilled(module: nn.Module) -> nn.Module:
    """Return the plain linear layer or embedding for a quantized one, without its numbers."""
    if isinstance(module, nn.QuantizedEmbedding):
        return nn.Embedding(1, 1)
    return nn.Linear(1, 1, bias="bias" in module)


def _plain_arrays(module: nn.Module, use_device: Callable[[], None]) -> dict[str, mx.array]:
    """Return the numbers of a quantized layer in float32, computed in this thread."""
    use_device()
    arrays = {"weight": _whole(module)}
    if "bias" in module:
        arrays["bias"] = to_float32(module.bias)
    mx.eval(arrays)
    return arrays


def _whole(module: nn.Module) -> mx.array:
    """Return the weight, (out, in)."""
    if module.mode != "affine" or module.bits not in BITS or not is_on_cpu():
        return _rows(module, 0, module.weight.shape[0])
    return decode(module.weight, to_float32(module.scales), to_float32(module.biases), module.bits)


def to_float32(value: mx.array) -> mx.array:
    """Return floating-point numbers in float32, and integers (packed codes, counts) as they are."""
    return value.astype(mx.float32) if mx.issubdtype(value.dtype, mx.floating) else value


def _rows(module: nn.Module, first: int, last: int) -> mx.array:
    """Return rows of the weight, (last - first, in)."""
    biases = module.get("biases")
    # Scales in float32 first: in float16 a code times its scale would be rounded, as kernels on a GPU do not.
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
    """A quantized linear layer that unpacks its weight in every forward and backward pass, and then drops it."""

    def __call__(self, x: mx.array) -> mx.array:
        """Return x W^T + bias for x (..., in)."""
        y = _product(self, x)
        return y + self["bias"] if "bias" in self else y


class UnpackingEmbedding(nn.QuantizedEmbedding):
    """A quantized embedding that unpacks itself when it serves as the model's head."""

    def as_linear(self, x: mx.array) -> mx.array:
        """Return the logits, x W^T, for x (..., dims)."""
        return _product(self, x)


def keep_packed(module: nn.Module) -> None:
    """Turn a quantized linear layer or embedding into one that unpacks itself, in place."""
    module.__class__ = UnpackingEmbedding if isinstance(module, nn.QuantizedEmbedding) else UnpackingLinear


class SteppingLinear(UnpackingLinear):
    """For forward passes only: unpacks one piece after another, and never two at a time."""

    def __call__(self, x: mx.array) -> mx.array:
        """Return x W^T + bias for x (..., in)."""
        y = product(self, x)
        return y + self["bias"] if "bias" in self else y


class SteppingEmbedding(UnpackingEmbedding):
    """For forward passes only: the same for an embedding that is also the model's head."""

    def as_linear(self, x: mx.array) -> mx.array:
        """Return the logits, x W^T, for x (..., dims)."""
        return product(self, x)


def step_by_step(model: nn.Module) -> None:
    """Make the layers that unpack themselves do so one after another. The model is then for forward passes only.

    Otherwise mlx unpacks ahead of the products, in the end the whole model.
    """
    for _, module in model.named_modules():
        if type(module) is UnpackingLinear:
            module.__class__ = SteppingLinear
        elif type(module) is UnpackingEmbedding:
            module.__class__ = SteppingEmbedding


def _product(module: nn.Module, x: mx.array) -> mx.array:
    """Return x W^T, differentiable with respect to x."""

    def forward(x: mx.array) -> mx.array:
        parts = [x @ rows.T for _, _, rows in _pieces(module)]
        return parts[0] if len(parts) == 1 else mx.concatenate(parts, axis=-1)

    def backward(_: mx.array, gradient: mx.array, __: mx.array) -> mx.array:
        parts = [gradient[..., first:last] @ rows for first, last, rows in _pieces(module)]
        return parts[0] if len(parts) == 1 else mx.stack(parts).sum(axis=0)

    # Differentiated by mlx, the product would keep every weight of the model until its backward pass.
    return with_gradient(forward, backward)(x)


def with_gradient(function: Callable[Given, Result], gradient: Callable[..., Any]) -> Callable[Given, Result]:
    """Return a function whose gradient mlx takes from another function instead of differentiating it.

    Args:
        function: From arrays to arrays.
        gradient: From the arguments, the gradients of the results, and the results, to the gradients of the arguments.
            Each is an array if it is one, and a tuple or list if there are several.
    """
    made = mx.custom_function(function)
    made.vjp(gradient)
    return cast(Callable[Given, Result], made)  # mlx's stub says that it returns an object


def product(module: nn.Module, x: mx.array) -> mx.array:
    """Return x W^T of a layer that unpacks itself, evaluated piece by piece: one piece is in memory at a time."""
    parts = [evaluated(x @ rows.T) for _, _, rows in _pieces(module)]
    return parts[0] if len(parts) == 1 else mx.concatenate(parts, axis=-1)


def product_back(module: nn.Module, d_y: mx.array) -> mx.array:
    """Return the gradient of x, d_y W, evaluated piece by piece."""
    d_x = mx.array(0.0)
    for first, last, rows in _pieces(module):
        d_x = evaluated(d_x + d_y[..., first:last] @ rows)
    return d_x


def evaluated(array: mx.array) -> mx.array:
    """Compute an array, and return it."""
    mx.eval(array)
    return array


def evaluate(model: nn.Module) -> None:
    """Compute every array that a model holds, also those that `parameters()` leaves out: their names start with "_".

    Another thread cannot compute an array that this thread has only described. Some rotary embeddings keep their
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
    """Return an evaluated copy that does not hold what the array was computed from.

    While mlx takes gradients, an array keeps all that for as long as it lives: here whole weights.
    """
    return mx.array(np.array(array.astype(mx.float32))).astype(array.dtype)  # NumPy has no bfloat16


def _pieces(module: nn.Module) -> Iterator[tuple[int, int, mx.array]]:
    """Yield the first and last + 1 of some rows of the weight, and these rows, unpacked: PIECE_BYTES at a time."""
    out, words = module.weight.shape
    step = max(1, PIECE_BYTES // (words * 32 // module.bits * 4))
    for first in range(0, out, step):
        last = min(first + step, out)
        yield first, last, _rows(module, first, last)
