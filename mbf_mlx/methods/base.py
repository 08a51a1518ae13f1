"""The base class of every continual method. Its hooks do nothing; a method overrides the ones that it needs.

Here is the one place that says what each hook is for, who calls it and when. The order of one task:

    extra_rows, start, rates        before training
    effective, penalty              in every step
    measure, finish, after_task     after training

A task that was trained elsewhere has two hooks: `start`, which hands out the start, and `absorb`, which takes the
result.

Shapes: A (rank, in), B (out, rank). `effective` and `penalty` run inside the training step, on arrays of the library
that trains; they use the array's own namespace. All other hooks are given NumPy arrays, or MLX arrays on the CPU.
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any, Literal, NamedTuple

import numpy as np

from mbf_mlx.methods.factors import Factors
from mbf_mlx.methods.state import State
from mbf_mlx.reference import Array

# layer -> the named tuple of arrays that trains: a Pair, or whatever other named tuple the method's `start` returns
Tuned = dict[str, Any]
Need = Literal["inputs", "gradients", "rows"]
MEASURED_ROWS = 128  # of a task, at most, are measured for their inputs: each row costs as much as in training


class TokenRow(NamedTuple):
    """One tokenized training row."""

    tokens: np.ndarray  # int32[n]
    supervised: np.ndarray  # bool[n]; supervised[i] says that token i is a label


class Seen(NamedTuple):
    """What the inputs of one layer are in a task, measured in the directions that `measure` returned."""

    directions: Array  # P (k, in)
    moments: Array  # (k, in): mean over rows of the sum of w (P x) x^T over tokens x; w as in `measure.input_moments`


Inputs = Mapping[str, Seen]  # layer -> its measured inputs


def measured_rows(count: int) -> range:
    """Return the indices of the rows that are measured, of a task with `count` rows: at most MEASURED_ROWS."""
    return range(0, count, max(1, math.ceil(count / MEASURED_ROWS)))


class Method(ABC):
    """A continual method: how a task starts, what takes part in its training, and what is deployed after it.

    A method must have `start` and `finish`; these two are all that the paper's method needs.
    """

    name: str  # as `make` and the entry point know it
    options: dict[str, Any]  # plain JSON values; make(name, options) makes the same method again
    grows: bool = False  # whether what it keeps grows with the number of tasks
    absorbs: bool = False  # whether a task may be trained elsewhere: only if the method adds nothing to the training
    from_scratch: bool = False  # whether each task ends as if it were the only training, whatever was trained before
    measures_in_training: bool = (
        False  # whether `measure` returns the same whatever was tuned: then training may measure
    )
    needs: frozenset[Need] = frozenset()  # what it needs of a task's rows: "inputs" for `measure`, others `after_task`

    @abstractmethod
    def start(self, state: State) -> Tuned:
        """Return what task state.t + 1 starts from, float32: a pair for each layer, or another named tuple.

        Called once before training, by learning/tuning.py, and by exchange.py for a task that is trained elsewhere. It
        may be called again with the same state and must return the same.

        Raises:
            InputError: the layers do not fit the method.
        """

    @abstractmethod
    def finish(self, state: State, tuned: Tuned, inputs: Inputs | None = None) -> State:
        """Return the state after task state.t + 1, with what is deployed.

        Called once after training, by learning/after_training.py.

        Args:
            state: The state that the task started from.
            tuned: What `start` returned, as training left it.
            inputs: What `measure` asked for; None where `needs` does not have "inputs".
        """

    def rates(self, state: State) -> dict[str, float]:
        """Return the learning rate of each field ("a", "b") as a share of the task's own rate.

        A field that is left out has the whole rate; one with rate 0 does not train. Called once before training, by
        learning/tuning.py.
        """
        return {}

    def effective(self, tuned: Tuned, state: State) -> Factors:
        """Return the pairs that the model applies while it trains, computed from what trains and from the state.

        Called in every forward pass, by learning/tuning.py; gradients go through it. It may leave out layers whose
        factors do not change. It returns `tuned` itself where the model applies just what trains.
        """
        return tuned

    def penalty(self, tuned: Tuned, state: State) -> Array | None:
        """Return a scalar that is added to the loss (nats per supervised token) of every step; None adds nothing.

        Called in every step, by learning/train.py through learning/tuning.py, and differentiated. Whether it is None
        must depend on the state alone.
        """
        return None

    def extra_rows(self, state: State, count: int) -> list[TokenRow]:
        """Return kept rows of earlier tasks to train on, beside the task's own `count` rows.

        Called once before training, by learning/after_training.py.
        """
        return []

    def measure(self, state: State, tuned: Tuned) -> dict[str, Array]:
        """Return P (k, in) for each layer: the directions in which the layer's inputs are measured.

        Called once where `needs` has "inputs", by learning/measure.py after training: at most MEASURED_ROWS of the
        task's rows then run through the model with the tuned factors, and `finish` or `absorb` is given the result.
        Where `measures_in_training` is true it may be called before training, by learning/inputs_in_training.py.
        """
        return {}

    def after_task(self, state: State, rows: Sequence[TokenRow], gradients: Tuned) -> State:
        """Return the state with what the method keeps of the task's rows or gradients.

        Called once after `finish` where `needs` has "rows" or "gradients", by learning/after_training.py.

        Args:
            state: What `finish` returned.
            rows: All training rows of the task; empty where `needs` does not have "rows".
            gradients: For each array that trained, the mean over the task's rows of the squared gradient of the row's
                loss (its mean cross-entropy); empty where `needs` does not have "gradients".
        """
        return state

    def absorb(self, state: State, tuned: Factors, inputs: Inputs | None = None) -> State:
        """Return the state after a task that was trained elsewhere, without the method's own penalty.

        Called by exchange.py in place of `finish`, where `absorbs` is true. Arguments as for `finish`.
        """
        return self.finish(state, tuned, inputs)
