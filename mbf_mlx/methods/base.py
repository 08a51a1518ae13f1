"""What every continual method shares: factors, the state between tasks, and what a method has to answer.

Shapes: A (rank, in), B (out, rank). A layer is named by its path in the MLX model, "model.layers.0.self_attn.q_proj".
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple, Protocol

import numpy as np

from mbf_mlx.errors import InputError
from mbf_mlx.reference import Array, orthogonal_init


class Pair(NamedTuple):
    """The two factors of one layer."""

    a: Array  # (rank, in)
    b: Array  # (out, rank)


Factors = dict[str, Pair]
Layers = dict[str, tuple[int, int]]  # layer -> (out, in)
FIRST_A = ("uniform", "orthonormal")  # how the first A may be drawn


@dataclass(frozen=True, kw_only=True)
class State:
    """All that a stream keeps between two tasks."""

    t: int  # tasks learned so far; 0 is the empty stream
    layers: Layers
    rank: int
    seed: int = 0  # of whatever the next start draws
    deployed: Factors = field(default_factory=dict)  # what is evaluated, fused and exported; empty at t = 0
    kept: dict[str, dict[str, Array]] = field(default_factory=dict)  # name -> layer -> what only the next task needs

    def kept_bytes(self) -> int:
        """Bytes of the arrays held between tasks, deployed pair included."""
        arrays = [array for pair in self.deployed.values() for array in pair]
        arrays += [array for tensors in self.kept.values() for array in tensors.values()]
        return sum(int(array.nbytes) for array in arrays)


class Method(Protocol):
    """A continual method. `start` and `finish` are all that the paper's needs; train.py looks for the rest by name.

    Optional, where a method has them: `penalty(factors, state)`, a scalar added to the loss and differentiated in the
    namespace of `factors`; `after_task(state, gradients)`, called with mean squared gradients of the task's rows;
    `extra_rows(state)`, token rows mixed into the task's own; `trains`, the factors that get gradients, ("a", "b")
    where a method has none.
    """

    name: str
    options: dict[str, Any]  # what the manifest keeps, enough for `make(name, options)`

    def start(self, state: State) -> Factors:
        """Return the factors that task state.t + 1 starts from."""
        ...

    def finish(self, state: State, tuned: Factors) -> State:
        """Return the state after task state.t + 1, whose tuned factors are given."""
        ...


def empty_state(layers: Layers, rank: int, seed: int = 0) -> State:
    """Return the state of a stream that has learned nothing.

    Raises:
        InputError: a layer is smaller than the rank.
    """
    small = [f"  {name}: {out} x {inner}" for name, (out, inner) in layers.items() if rank > min(out, inner)]
    if small:
        raise InputError(f"rank {rank} is larger than these layers; choose a smaller rank:\n" + "\n".join(small))
    return State(t=0, layers=dict(layers), rank=rank, seed=seed)


def first_factors(state: State, first_a: str, zero: str = "b") -> Factors:
    """Return a random factor and a zero one for every layer, drawn with NumPy so that every backend starts alike.

    Args:
        state: Its seed, task number and layers decide the draw.
        first_a: "uniform", in +-1/sqrt(in) as mlx-lm's LoRA has it, or "orthonormal", a basis of such rows.
        zero: The factor that is zero, "b"; for "a" the random one is B, drawn as A is with (out) in the place of (in).
    """
    generator = np.random.default_rng([state.seed, state.t])
    factors = {}
    for name in sorted(state.layers):  # not in the order of the dict: a stream read from disk has to draw the same
        out, inner = state.layers[name]
        dims = inner if zero == "b" else out
        drawn = generator.uniform(-1.0, 1.0, size=(state.rank, dims)) / np.sqrt(dims)
        if first_a == "orthonormal":
            drawn = orthogonal_init(drawn)
        drawn = drawn.astype(np.float32)
        if zero == "b":
            factors[name] = Pair(drawn, np.zeros((out, state.rank), dtype=np.float32))
        else:
            factors[name] = Pair(np.zeros((state.rank, inner), dtype=np.float32), drawn.T.copy())
    return factors


def in_double(function: Callable[..., Any], *arrays: Array) -> Any:
    """Return what `function` makes of the arrays, for NumPy's computed in double precision and cast back.

    So every machine starts and merges alike to float32's last bit; other libraries stay in their own precision.
    """
    if not all(isinstance(array, np.ndarray) for array in arrays):
        return function(*arrays)
    results = function(*(array.astype(np.float64) for array in arrays))
    if isinstance(results, tuple):
        return tuple(result.astype(arrays[0].dtype) for result in results)
    return results.astype(arrays[0].dtype)


def check_choices(method: str, options: Mapping[str, Any], choices: Mapping[str, tuple[str, ...]]) -> None:
    """Refuse options outside their choices.

    Raises:
        InputError: naming the method, the option, what it may be and what it is.
    """
    for key, allowed in choices.items():
        if options[key] not in allowed:
            raise InputError(f"{method}: {key}: expected one of {', '.join(allowed)}, got {options[key]!r}")
