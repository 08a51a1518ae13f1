"""Temporarily route chosen layers of a model through a callback that sees their inputs and outputs."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial

import mlx.core as mx
from mlx import nn
from mlx.utils import tree_unflatten

Call = Callable[[str, nn.Module, mx.array], mx.array]  # the layer's path, the layer, its inputs -> its outputs


@contextmanager
def called_by(call: Call, model: nn.Module, layers: dict[str, nn.Module]) -> Iterator[None]:
    """Run `call` in place of each of the layers inside this context; afterwards the model is as before.

    Args:
        call: Has to return the layer's outputs, and may call the layer itself.
        model: The model that holds the layers.
        layers: The layers by their path in the model.
    """
    model.update_modules(tree_unflatten([(name, _Tap(layer, partial(call, name))) for name, layer in layers.items()]))
    try:
        yield
    finally:
        model.update_modules(tree_unflatten(list(layers.items())))


class _Tap(nn.Module):
    def __init__(self, layer: nn.Module, call: Callable[[nn.Module, mx.array], mx.array]) -> None:
        super().__init__()
        self.layer = layer
        self._call = call

    def __call__(self, x: mx.array) -> mx.array:
        return self._call(self.layer, x)
