"""What trains on a task, and which pairs the model applies: the trained factors themselves, or pairs made of them.

Arrays have our orientation, A (rank, in) and B (out, rank), in the named tuples that the method's `start` returns. Each
array is called "<layer>.<field>". train.py takes the steps; after_training.py decides what becomes of the result.
"""

from collections.abc import Mapping
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from mbf_mlx.engine.engine import Arrays
from mbf_mlx.engine.lora_layers import lora_layers, read_factors
from mbf_mlx.methods import Factors, Method, State, Tuned
from mbf_mlx.methods.sequential import Sequential


class Tuning:
    """The arrays that train on one task. The model always applies the current `arrays`.

    Args:
        model: With factors attached.
        method, state: The method and the state that the task starts from; without them the factors that the model has
            train on, at the full rate.
    """

    def __init__(self, model: nn.Module, method: Method | None = None, state: State | None = None) -> None:
        if method is None or state is None:
            method, state = Sequential(), State(t=1, layers={}, rank=0, deployed=read_factors(model))
        self.model, self.method = model, method
        start, rates = method.start(state), method.rates(state)
        self.is_plain = method.effective(start, state) is start  # the model applies just what trains
        self.has_penalty = method.penalty(start, state) is not None
        self._state = state if self.is_plain and not self.has_penalty else state.to(mx)
        self._kinds = {layer: type(fields) for layer, fields in start.items()}
        self._layers = lora_layers(model)
        self.arrays = _flat(start)
        self.rates = {name: float(rates.get(name.rpartition(".")[2], 1.0)) for name in self.arrays}
        self.apply(self.arrays)

    @property
    def trained(self) -> Arrays:
        """The arrays that training changes: those whose rate is not 0."""
        return {name: array for name, array in self.arrays.items() if self.rates[name]}

    def update(self, arrays: Mapping[str, Any]) -> None:
        """Take new values of some arrays and let the model apply them; the device may still be computing them."""
        # Row by row in memory: the last bits of a matrix product depend on the layout, and a save keeps only this one.
        self.arrays |= {name: mx.contiguous(mx.array(array)) for name, array in arrays.items()}
        self.apply(self.arrays)
        mx.async_eval(self.arrays, [(layer.lora_a, layer.lora_b) for layer in self._layers.values()])

    def take(self, tuned: Tuned) -> None:
        """Take the values of factors that were tuned, in the named tuples of `start`, and let the model apply them."""
        self.update(_flat(tuned))

    def apply(self, arrays: Arrays) -> None:
        """Let the model apply these values, and the current ones of arrays that are missing; differentiable."""
        for name, pair in self._effective(arrays).items():
            self._layers[name].lora_a, self._layers[name].lora_b = pair.a.T, pair.b.T

    def penalty(self, arrays: Arrays) -> mx.array:
        """Return what the method adds to a step's loss; call it only where `has_penalty` is true.

        Raises:
            ValueError: the method has no penalty in this task.
        """
        found = self.method.penalty(self._tuned(arrays), self._state)
        if not isinstance(found, mx.array):
            raise ValueError(f"{self.method.name}: expected a penalty that is a scalar of mlx, got {found!r}")
        return found

    def pull_back(self, pairs: Factors) -> Arrays:
        """Return the gradients with respect to `arrays`, from those with respect to the pairs that are applied."""
        if self.is_plain:
            return {f"{layer}.{field}": x for layer, pair in pairs.items() for field, x in pair._asdict().items()}
        names = list(self.arrays)

        def applied(*arrays: mx.array) -> list[mx.array]:
            found = self._effective(dict(zip(names, arrays)))
            return [x for layer in pairs for x in found[layer]]

        given = [x for pair in pairs.values() for x in pair]
        return dict(zip(names, mx.vjp(applied, [self.arrays[name] for name in names], given)[1]))

    def named(self, arrays: Mapping[str, Any] | None = None) -> Tuned:
        """Return NumPy copies of `arrays`, or of these arrays, in the named tuples of `start`."""
        values = self.arrays if arrays is None else arrays
        return self._tuples({name: np.ascontiguousarray(np.array(array)) for name, array in values.items()})

    def _effective(self, arrays: Arrays) -> Factors:
        tuned = self._tuned(arrays)
        return tuned if self.is_plain else self.method.effective(tuned, self._state)

    def _tuned(self, arrays: Arrays) -> Tuned:
        return self._tuples(self.arrays | arrays)

    def _tuples(self, values: Mapping[str, Any]) -> Tuned:
        return {
            layer: kind(*(values[f"{layer}.{field}"] for field in kind._fields)) for layer, kind in self._kinds.items()
        }


def _flat(tuned: Tuned) -> Arrays:
    return {
        f"{layer}.{field}": mx.contiguous(mx.array(np.asarray(value, dtype=np.float32)))
        for layer, fields in tuned.items()
        for field, value in fields._asdict().items()
    }
