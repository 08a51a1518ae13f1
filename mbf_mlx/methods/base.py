"""What every continual method shares: factors, the state between tasks, and what a method has to answer.

Shapes: A (rank, in), B (out, rank). A layer is named by its path in the MLX model, "model.layers.0.self_attn.q_proj".
`start`, `finish` and `after_task` may be given NumPy arrays or MLX arrays on the CPU; `penalty` and `effective` run in
the training step, on arrays of the library that trains.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple, Protocol

import numpy as np

from mbf_mlx.device.threads import side_by_side
from mbf_mlx.errors import InputError
from mbf_mlx.reference import Array, namespace, orthogonal_init


class Pair(NamedTuple):
    """The two factors of one layer."""

    a: Array  # (rank, in)
    b: Array  # (out, rank)


Factors = dict[str, Pair]
Layers = dict[str, tuple[int, int]]  # layer -> (out, in)
MEASURED_ROWS = 128  # of a task, that `measure` is shown at most: each costs as much as in training
STREAM = "stream"  # stands for a layer where something kept belongs to none
FIRST_A = ("uniform", "orthonormal")  # how the first A may be drawn


@dataclass(frozen=True, kw_only=True)
class State:
    """All that a stream keeps between two tasks."""

    t: int  # tasks learned so far; 0 is the empty stream
    layers: Layers
    rank: int
    seed: int = 0  # of whatever is drawn; the stream's own: the first draw is made again from it after every task
    deployed: Factors = field(default_factory=dict)  # what is evaluated, fused and exported; empty at t = 0
    kept: dict[str, dict[str, Array]] = field(default_factory=dict)  # name -> layer -> what only the next task needs

    def kept_bytes(self) -> int:
        """Bytes of the arrays held between tasks, deployed pair included."""
        arrays = [array for pair in self.deployed.values() for array in pair]
        arrays += [array for tensors in self.kept.values() for array in tensors.values()]
        return sum(int(array.nbytes) for array in arrays)

    def to(self, xp: Any) -> "State":
        """Return the same state with every array in the library `xp`: done once a task, before its training steps."""
        deployed = {name: Pair(xp.asarray(a), xp.asarray(b)) for name, (a, b) in self.deployed.items()}
        kept = {key: {name: xp.asarray(x) for name, x in tensors.items()} for key, tensors in self.kept.items()}
        return replace(self, deployed=deployed, kept=kept)


class Row(NamedTuple):
    """One tokenized training row, as `encode` gives it."""

    tokens: np.ndarray  # int32[n]
    supervised: np.ndarray  # bool[n]; supervised[i] says that token i is a label


class Seen(NamedTuple):
    """A task's inputs of one layer, as `measure` asked for them."""

    directions: Array  # P (k, in)
    moments: Array  # (k, in): the mean over rows of the sum of w (P x) x^T over tokens x; see `conclude.input_moments`


def measured_rows(count: int) -> range:
    """Return which of a task's rows stand for all where `measure` asks for inputs: MEASURED_ROWS at most."""
    return range(0, count, max(1, math.ceil(count / MEASURED_ROWS)))


class Method(Protocol):
    """A continual method: `start` and `finish` are all that the paper's needs.

    Others have some of these besides, which learning/learn.py and learning/train.py look for by name:

    - `rates(state) -> dict[str, float]`: the learning rate of each field ("a", "b") as a share of the task's own; 0 for
      one that does not train. Without it every field has the whole rate.
    - `effective(tuned, state) -> Factors`: the pairs that the model applies while training, made of what trains and of
      what `state` holds; differentiated through. Without it what trains is itself what is applied. A method that has
      it may train other named tuples than `Pair`, and none at all in some layers.
    - `penalty(tuned, state)`: a scalar that is added to the loss of every step, or None where there is none.
    - `measure(state, tuned) -> dict[str, Array]`: a matrix P (k, in) for each layer; `finish` is then called with
      `inputs=`, a `Seen` for each layer: what its inputs are in the task's rows (128 of them at most), the model
      applying what was tuned.
    - `needs` and `after_task(state, what) -> State`, called after `finish`: for `needs` "gradients", `what` has, for
      each array that trained, the mean over the task's rows of the squared gradient of the row's loss (its mean
      cross-entropy); for "rows" it is the task's training rows, a list of `Row`.
    - `absorb(state, tuned, inputs) -> State`, beside `measure`: called in place of `finish` where a task was trained
      elsewhere, and nothing of the method took part.
    - `extra_rows(state, count) -> list[Row]`: rows to mix into the `count` rows of the task.
    """

    name: str
    options: dict[str, Any]  # what the manifest keeps, enough for `make(name, options)`
    grows: bool  # whether what it keeps grows with the number of tasks

    def start(self, state: State) -> Any:
        """Return what task state.t + 1 starts from: Factors, or other named tuples where there is an `effective`."""
        ...

    def finish(self, state: State, tuned: Any) -> State:
        """Return the state after task state.t + 1, given what `start` returned as training left it."""
        ...


HOOKS = ("rates", "effective", "penalty", "measure", "after_task", "extra_rows")


def hooks(method: Method) -> list[str]:
    """Return which of the hooks a method has: one without any needs nothing of training but the tuned factors."""
    return [hook for hook in HOOKS if hasattr(method, hook)]


def empty_state(layers: Layers, rank: int, seed: int = 0) -> State:
    """Return the state of a stream that has learned nothing.

    Raises:
        InputError: a layer is smaller than the rank.
    """
    if small := _smaller(layers, rank, rank):
        raise InputError(f"rank {rank} is larger than these layers; choose a smaller rank:\n{small}")
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


def pad_rank(pair: Pair, rank: int) -> Pair:
    """Return the pair with zero rows in A and columns in B up to `rank`: an adapter has one rank for all layers."""
    missing = rank - pair.a.shape[0]
    if missing == 0:
        return pair
    xp = namespace(pair.a)
    rows = xp.zeros((missing, pair.a.shape[1]), dtype=pair.a.dtype)
    columns = xp.zeros((pair.b.shape[0], missing), dtype=pair.b.dtype)
    return Pair(xp.concatenate([pair.a, rows], axis=0), xp.concatenate([pair.b, columns], axis=1))


def each_layer(function: Callable[[str], Any], factors: Factors) -> dict[str, Any]:
    """Return what `function` makes of every layer's name, in the order of `factors`.

    NumPy's layers are worked on side by side. MLX's are not: its streams belong to a thread.
    """
    numpy = all(isinstance(pair.a, np.ndarray) for pair in factors.values())
    return dict(zip(factors, side_by_side(function, factors) if numpy else map(function, factors)))


def not_finite(state: State) -> list[str]:
    """Return the layers whose deployed or kept tensors have numbers that are not finite."""
    tensors = {name: list(pair) for name, pair in state.deployed.items()}
    for kept in state.kept.values():
        for name, tensor in kept.items():
            tensors.setdefault(name, []).append(tensor)
    good = side_by_side(lambda each: all(np.isfinite(a).all() for a in each), tensors.values(), products=False)
    return [name for name, finite in zip(tensors, good) if not finite]


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


def check_number(method: str, key: str, value: Any, least: float, most: float = math.inf) -> None:
    """Refuse an option that is not a number in [least, most].

    Raises:
        InputError: naming the method, the option, what it may be and what it is.
    """
    number = isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
    if not number or not least <= value <= most:
        expected = f"a number of at least {least}" if most == math.inf else f"a number in [{least}, {most}]"
        raise InputError(f"{method}: {key}: expected {expected}, got {value!r}")


def check_choices(method: str, options: Mapping[str, Any], choices: Mapping[str, tuple[str, ...]]) -> None:
    """Refuse options outside their choices.

    Raises:
        InputError: naming the method, the option, what it may be and what it is.
    """
    for key, allowed in choices.items():
        if options[key] not in allowed:
            raise InputError(f"{method}: {key}: expected one of {', '.join(allowed)}, got {options[key]!r}")


def check_sizes(method: str, layers: Layers, least_out: int, least_in: int, why: str) -> None:
    """Refuse, before anything is trained, layers that are too small for what a method does with them.

    Raises:
        InputError: naming the method, the sizes that it needs and why, and every layer that is smaller.
    """
    if small := _smaller(layers, least_out, least_in):
        sizes = f"at least {least_out} outputs and {least_in} inputs"
        raise InputError(f"{method}: expected layers with {sizes}, {why}, got\n{small}")


def check_two_pairs(method: str, state: State) -> None:
    """Refuse layers in which two pairs have more rows together than there are inputs.

    Raises:
        InputError: naming the method and every such layer.
    """
    why = "twice the rank, to merge two updates by their inputs"
    check_sizes(method, state.layers, state.rank, 2 * state.rank, why)


def _smaller(layers: Layers, least_out: int, least_in: int) -> str:
    """Return the layers with fewer outputs or inputs, a line each."""
    return "\n".join(f"  {name}: {o} x {i}" for name, (o, i) in layers.items() if o < least_out or i < least_in)
