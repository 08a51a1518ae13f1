"""Some layers of a model are called by way of a function that sees what goes in and out."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial

import mlx.core as mx
from mlx import nn
from mlx.utils import tree_unflatten

Call = Callable[[str, nn.Module, mx.array], mx.array]  # a layer's path in the model, the layer and its inputs


@contextmanager
def called_by(call: Call, model: nn.Module, layers: dict[str, nn.Module]) -> Iterator[None]:
    """Within this context, `call` stands for each of the layers; after it all is as it was."""
    model.update_modules(
        tree_unflatten([(name, _Called(layer, partial(call, name))) for name, layer in layers.items()])
    )
    try:
        yield
    finally:
        model.update_modules(tree_unflatten(list(layers.items())))


class _Called(nn.Module):
    def __init__(self, layer: nn.Module, call: Callable[[nn.Module, mx.array], mx.array]) -> None:
        super().__init__()
        self.layer = layer
        self._call = call

    def __call__(self, x: mx.array) -> mx.array:
        return self._call(self.layer, x)
