"""What a stream keeps between two tasks, and how an empty stream begins."""

from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from mbf_mlx.device.threads import side_by_side
from mbf_mlx.errors import InputError
from mbf_mlx.methods.checks import layers_below
from mbf_mlx.methods.factors import Factors, Layers, Pair, draw_factors
from mbf_mlx.reference import Array

STREAM = "stream"  # used in place of a layer's name for a kept array that belongs to no layer


@dataclass(frozen=True, kw_only=True)
class State:
    """Everything that a stream keeps between two tasks."""

    t: int  # tasks learned so far; 0 is an empty stream
    layers: Layers
    rank: int
    seed: int = 0  # of everything drawn at random; the stream keeps it, because the first draw is repeated later
    deployed: Factors = field(default_factory=dict)  # what is evaluated, fused and exported; empty at t = 0
    kept: dict[str, dict[str, Array]] = field(
        default_factory=dict
    )  # name -> layer -> array; only the next task needs it

    def kept_bytes(self) -> int:
        """Return the bytes of all arrays held between tasks, the deployed pair included."""
        arrays = [array for pair in self.deployed.values() for array in pair]
        arrays += [array for tensors in self.kept.values() for array in tensors.values()]
        return sum(int(array.nbytes) for array in arrays)

    def to(self, xp: Any) -> "State":
        """Return the same state with every array in the library `xp`."""
        deployed = {name: Pair(xp.asarray(a), xp.asarray(b)) for name, (a, b) in self.deployed.items()}
        kept = {key: {name: xp.asarray(x) for name, x in tensors.items()} for key, tensors in self.kept.items()}
        return replace(self, deployed=deployed, kept=kept)


def empty_state(layers: Layers, rank: int, seed: int = 0) -> State:
    """Return the state of a stream that has learned nothing.

    Raises:
        InputError: a layer is smaller than the rank.
    """
    if small := layers_below(layers, rank, rank):
        raise InputError(f"rank {rank} is larger than these layers; choose a smaller rank:\n{small}")
    return State(t=0, layers=dict(layers), rank=rank, seed=seed)


def first_factors(state: State, first_a: str, zero: str = "b") -> Factors:
    """Return the factors that `draw_factors` draws from the state's seed and task number.

    For the draw of the first task, call it with `replace(state, t=0)`.
    """
    return draw_factors(state.layers, state.rank, (state.seed, state.t), first_a, zero)


def keep_factors(name: str, factors: Factors) -> dict[str, dict[str, Array]]:
    """Return factors in the form that `State.kept` holds: all A under "<name>_a", all B under "<name>_b"."""
    return {f"{name}_a": {n: p.a for n, p in factors.items()}, f"{name}_b": {n: p.b for n, p in factors.items()}}


def kept_factors(state: State, name: str) -> Factors:
    """Return the factors that `keep_factors` stored under `name`, a pair for every layer."""
    a, b = state.kept[f"{name}_a"], state.kept[f"{name}_b"]
    return {layer: Pair(a[layer], b[layer]) for layer in state.layers}


def not_finite(state: State) -> list[str]:
    """Return the layers whose deployed or kept arrays hold a number that is not finite."""
    tensors = {name: list(pair) for name, pair in state.deployed.items()}
    for kept in state.kept.values():
        for name, tensor in kept.items():
            tensors.setdefault(name, []).append(tensor)
    good = side_by_side(lambda each: all(np.isfinite(a).all() for a in each), tensors.values(), products=False)
    return [name for name, finite in zip(tensors, good) if not finite]
