"""What every continual method shares: factors, the state between tasks, and what a method has to answer.

Shapes: A (rank, in), B (out, rank). A layer is named by its path in the MLX model, "model.layers.0.self_attn.q_proj".
"""

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
    `extra_rows(state)`, token rows mixed into the task's own.
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


def first_factors(state: State, first_a: str) -> Factors:
    """Return a random A and a zero B for every layer, drawn with NumPy so that every backend starts alike.

    Args:
        state: Its seed, task number and layers decide the draw.
        first_a: "uniform", in +-1/sqrt(in) as LoRA has it, or "orthonormal", an orthonormal basis of such rows.
    """
    generator = np.random.default_rng([state.seed, state.t])
    factors = {}
    for name, (out, inner) in state.layers.items():
        a = generator.uniform(-1.0, 1.0, size=(state.rank, inner)) / np.sqrt(inner)
        if first_a == "orthonormal":
            a = orthogonal_init(a)
        factors[name] = Pair(a.astype(np.float32), np.zeros((out, state.rank), dtype=np.float32))
    return factors
