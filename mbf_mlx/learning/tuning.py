"""What trains on a task, and what the model applies of it: its own factors, or pairs that a method makes of more.

Arrays are in our orientation, A (rank, in) and B (out, rank), in the named tuples that the method's `start` gives; each
goes by the name "<layer>.<field>". The hooks `rates`, `effective` and `penalty` are called here and nowhere else. Steps
are left to train.py, what happens to the result to after_training.py.
"""

from collections.abc import Mapping
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from mbf_mlx.engine.engine import Arrays
from mbf_mlx.engine.lora_layers import lora_layers, read_factors
from mbf_mlx.methods import Factors, Method, State


class Tuning:
    """The arrays that train on one task; the model applies what stands in `arrays`.

    Args:
        model: With factors attached.
        method, state: Whose task it is; without them the model's own factors train, at the full rate.
    """

    def __init__(self, model: nn.Module, method: Method | None = None, state: State | None = None) -> None:
        self.model = model
        self.method: Any = method
        start: dict[str, Any] = (
            dict(read_factors(model)) if method is None or state is None else dict(method.start(state))
        )
        self.kinds = {layer: type(fields) for layer, fields in start.items()}
        hooked = hasattr(self.method, "effective") or hasattr(method, "penalty")
        self._state: Any = state.to(mx) if hooked and state is not None else state
        self._layers = lora_layers(model)
        shares: dict[str, float] = getattr(self.method, "rates", lambda _: {})(state)
        self.arrays = _flat(start)
        self.rates = {name: float(shares.get(name.rpartition(".")[2], 1.0)) for name in self.arrays}
        penalty = getattr(self.method, "penalty", lambda *_: None)
        self.has_penalty = penalty(self._named(), self._state) is not None
        self.apply(self.arrays)

    @property
    def trained(self) -> Arrays:
        """The arrays that training changes: those whose rate is not 0."""
        return {name: array for name, array in self.arrays.items() if self.rates[name]}

    def update(self, arrays: Mapping[str, Any]) -> None:
        """Take new values of some arrays, and let the model apply them; the device may still compute them."""
        # Row by row in memory: a matrix product's last bits depend on the layout, and a save would lose another one.
        self.arrays |= {name: mx.contiguous(mx.array(array)) for name, array in arrays.items()}
        self.apply(self.arrays)
        mx.async_eval(self.arrays, [(layer.lora_a, layer.lora_b) for layer in self._layers.values()])

    def apply(self, arrays: Arrays) -> None:
        """Let the model apply these values, those that are missing as they are; differentiable."""
        tuned = self._named(arrays)
        pairs = self.method.effective(tuned, self._state) if hasattr(self.method, "effective") else tuned
        for name, pair in pairs.items():
            self._layers[name].lora_a, self._layers[name].lora_b = pair.a.T, pair.b.T

    def penalty(self, arrays: Arrays) -> mx.array:
        """Return what the method adds to a step's loss; there is such a thing only where `has_penalty` says so."""
        return self.method.penalty(self._named(arrays), self._state)

    def pull_back(self, pairs: Factors) -> Arrays:
        """Return gradients with respect to `arrays`, given those with respect to the pairs that the model applies."""
        if not hasattr(self.method, "effective"):
            return {f"{layer}.{field}": x for layer, pair in pairs.items() for field, x in pair._asdict().items()}
        names = list(self.arrays)

        def applied(*arrays: mx.array) -> list[mx.array]:
            found = self.method.effective(self._named(dict(zip(names, arrays))), self._state)
            return [x for layer in pairs for x in found[layer]]

        given = [x for pair in pairs.values() for x in pair]
        return dict(zip(names, mx.vjp(applied, [self.arrays[name] for name in names], given)[1]))

    def named(self, arrays: Mapping[str, Any] | None = None) -> dict[str, Any]:
        """Return NumPy copies of these arrays, or of those that train, in the named tuples of `start`."""
        values = self.arrays if arrays is None else arrays
        found = {name: np.ascontiguousarray(np.array(array)) for name, array in values.items()}
        return {
            layer: kind(*(found[f"{layer}.{field}"] for field in kind._fields)) for layer, kind in self.kinds.items()
        }

    def _named(self, arrays: Arrays | None = None) -> Factors:
        values = self.arrays | (arrays or {})
        return {
            layer: kind(*(values[f"{layer}.{field}"] for field in kind._fields)) for layer, kind in self.kinds.items()
        }


def _flat(fields: dict[str, Any]) -> Arrays:
    return {
        f"{layer}.{field}": mx.contiguous(mx.array(np.asarray(value, dtype=np.float32)))
        for layer, each in fields.items()
        for field, value in zip(each._fields, each, strict=True)
    }
