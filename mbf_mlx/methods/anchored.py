"""Anchored: a penalty holds in place what the update does to old tasks' inputs while the next task trains.

A layer with the update M = B A adds M x to its output for an input x. Training changes M by D; old tasks notice only
D x on their own inputs. If g is the gradient of a row's loss with respect to the layer's output for a token, D
changes the loss by about g^T D x, which is at most |g| |D x|. So a token counts by w = |g|^2 / (sum of |g|^2 over its
row), and old rows see a change of tr(D G D^T). G is the mean over rows of the sum of w x x^T over tokens
(`measure.input_moments`). A step's loss is

    loss + strength * mean over layers of tr(D G D^T) / tr(M G M^T)

with M and G as they were after the last task. The penalty equals the strength when the change of the old outputs is
as large as the outputs themselves. In directions that old inputs do not have, the new task learns freely. Nothing is
merged: what was tuned is deployed.

G stays small. Grams of tasks add up, so the mean over t tasks is (1 - 1/t) times the old mean plus 1/t times the new
task's. Only its largest directions are kept: S (k, in) with S^T S near G (`reference.sketch_gram`,
`reference.merge_sketches`). k = 2 rank (in + out) / in, in half precision, takes the bytes of a second pair.

A task that was trained elsewhere trained without the penalty. It is merged as `products` merges by inputs: the old
tasks' update and its own, each judged on its own inputs.

Keeps: one pair and S, together no more than two pairs. Constant in the number of tasks.

Source: ours. Others bar these directions altogether and keep more of them with every task: GPM, Saha et al. 2021,
arXiv:2103.09762; InfLoRA, Liang and Li 2024, arXiv:2404.00228. EWC (`ewc`) weights single factors instead.
"""

from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np

from mbf_mlx.methods.base import Inputs, Need
from mbf_mlx.methods.checks import check_number, check_two_pairs
from mbf_mlx.methods.factors import Factors, Pair, each_layer, in_double
from mbf_mlx.methods.sequential import Sequential
from mbf_mlx.methods.state import State
from mbf_mlx.reference import Array, in_basis, input_basis, merge_by_inputs, merge_sketches, namespace, sketch_gram

OVERSAMPLING = 3  # a task's inputs are measured in this many random directions for each one that is kept
LARGEST = 65504.0  # the largest number in half precision


class Anchored(Sequential):
    """Sequential LoRA with a penalty on changing what the update does to old inputs.

    Args:
        strength: Weight of the penalty, in units of the loss (nats).
        first_a: A of the first task: "orthonormal", or "uniform" as in LoRA.

    Raises:
        InputError: an argument outside its choices.
    """

    name = "anchored"
    needs: frozenset[Need] = frozenset({"inputs"})
    measures_in_training = True

    def __init__(self, strength: float = 10.0, first_a: str = "orthonormal") -> None:
        super().__init__(first_a)
        self.options = {"strength": strength} | self.options
        check_number(self.name, "strength", strength, 0)

    def penalty(self, tuned: Factors, state: State) -> Array | None:
        """Return the penalty, None in the first task."""
        if state.t == 0:
            return None
        total: Any = 0.0
        for name, (a, b) in tuned.items():
            inputs, pair = state.kept["sketch"][name].T, state.deployed[name]
            old = pair.b @ (pair.a @ inputs)
            moved, size = b @ (a @ inputs) - old, (old * old).sum()
            total = total + (moved * moved).sum() / (size + (size == 0))  # where size is 0, divide by 1
        return self.options["strength"] / len(tuned) * total

    def measure(self, state: State, tuned: Factors) -> dict[str, Array]:
        """Return random directions of each layer's input, (OVERSAMPLING k, in); all directions if that is fewer."""
        generator, directions = np.random.default_rng([state.seed, state.t]), {}
        for name in sorted(tuned):
            inner = state.layers[name][1]
            count = OVERSAMPLING * _kept(state, name)
            drawn = np.eye(inner) if count >= inner else generator.normal(size=(count, inner)) / np.sqrt(inner)
            directions[name] = drawn.astype(np.float32)
        return directions

    def finish(self, state: State, tuned: Factors, inputs: Inputs | None = None) -> State:
        """Deploy what was tuned, and take the task's inputs into the sketch.

        Raises:
            ValueError: no inputs.
        """
        if inputs is None:
            raise ValueError(f"{self.name}: `finish` needs the inputs that `measure` asks for")
        t = state.t + 1

        def mixed(count: int, directions: Array, moments: Array, *old: Array) -> Array:
            new = sketch_gram(moments, directions)
            mean = merge_sketches([*old, new], [1 - 1 / t, 1 / t] if old else [1.0], count)
            return namespace(mean).clip(mean, -LARGEST, LARGEST)

        def sketched(name: str) -> Array:
            old = [state.kept["sketch"][name]] if state.t else []
            mean = in_double(partial(mixed, _kept(state, name)), *inputs[name], *old)
            return mean.astype(namespace(mean).float16)

        return replace(super().finish(state, tuned), kept={"sketch": each_layer(sketched, tuned)})

    def absorb(self, state: State, tuned: Factors, inputs: Inputs | None = None) -> State:
        """Return the state after a task that was trained elsewhere, merged with weight 1/sqrt(t).

        Raises:
            InputError: a layer with fewer inputs than both pairs have rows.
            ValueError: no inputs.
        """
        return self.merge(state, tuned, inputs, (state.t + 1) ** -0.5)

    def merge(self, state: State, tuned: Factors, inputs: Inputs | None, weight: float) -> State:
        """Return the state after a task, its update merged with the old one by the inputs of both.

        Args:
            state, tuned, inputs: As for `finish`.
            weight: How much the new task counts, in [0, 1].
        """
        after = Anchored.finish(self, state, tuned, inputs)
        if state.t == 0 or inputs is None:
            return after
        check_two_pairs(self.name, state.layers, state.rank)

        def merged(*arrays: Array) -> tuple[Array, Array]:
            old_a, old_b, a, b, sketch, directions, moments = arrays
            basis = input_basis(old_a, a)
            new, old = sketch_gram(moments, directions) @ basis.T, sketch @ basis.T
            a, b, _ = merge_by_inputs((old_a, old_b), (a, b), weight, state.rank, old.T @ old, new.T @ new)
            return in_basis(a, b, "qr-preserving")

        def layer(name: str) -> Pair:
            old = *state.deployed[name], *tuned[name], state.kept["sketch"][name]
            return Pair(*in_double(merged, *old, *inputs[name]))

        return replace(after, deployed=each_layer(layer, tuned))


def _kept(state: State, name: str) -> int:
    """Return how many directions of a layer's inputs are kept: in half precision, the bytes of a pair; at most all."""
    out, inner = state.layers[name]
    return min(inner, 2 * state.rank * (inner + out) // inner)
