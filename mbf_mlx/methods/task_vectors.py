"""What MagMax, task arithmetic and DARE share: a task is a vector, and the vectors of all tasks are combined.

A vector is what training changed, as arrays of plain numbers, in one of two spaces:
- "factors": the entries of A - A0 and of B, where A0 is the first draw (B0 is zero). The result stays a pair of the
  same rank, so nothing is lost between tasks. But a rule that was made for entries of weights is applied to entries
  of factors.
- "delta": the entries of B @ A, one layer at a time. The rule is the published one. Its result can have any rank and
  is cut to the best approximation of the stream's rank after every task; the published rule does not do this.

Deployed is A0 + c * vector (factors) or c * vector (delta), with a coefficient c. The combined vector can be read
back from the deployed pair, and A0 drawn again from the seed, so neither is kept.
"""

from abc import abstractmethod
from dataclasses import replace
from typing import Any, Literal

import numpy as np

from mbf_mlx.errors import InputError
from mbf_mlx.methods.base import Inputs, Method
from mbf_mlx.methods.checks import check_choices, check_number
from mbf_mlx.methods.factors import FIRST_A, Factors, Pair, in_double
from mbf_mlx.methods.state import State, first_factors, keep_factors, kept_factors
from mbf_mlx.reference import Array, namespace, split_delta

STARTS = ("first", "tuned")
SPACES = ("factors", "delta")


class TaskVectors(Method):
    """A method that combines the vectors of tasks; a subclass says how, in `combine`."""

    absorbs = True

    def __init__(self, start: str, space: str, coefficient: float | Literal["1/t"], first_a: str, **more: Any) -> None:
        self.options = {"start": start, "space": space, "coefficient": coefficient, "first_a": first_a, **more}
        check_choices(self.name, self.options, {"start": STARTS, "space": SPACES, "first_a": FIRST_A})
        if coefficient != "1/t":
            check_number(self.name, "coefficient", coefficient, 0)
            if coefficient == 0:
                raise InputError(f"{self.name}: coefficient: expected a number above 0 or '1/t', got 0")

    @abstractmethod
    def combine(self, merged: Array, vector: Array, generator: np.random.Generator) -> Array:
        """Return the combined vector of all tasks so far, with the arrays' own shape.

        Args:
            merged: The combined vector of the earlier tasks, zeros for the first task.
            vector: The newest task's vector, of the same shape.
            generator: For a rule that draws at random; it depends on the seed, the task and the layer.
        """

    def start(self, state: State) -> Factors:
        """Return the first draw for the first task, with `start` "first" for every task; else the last tuned pair."""
        if state.t == 0 or self.options["start"] == "first":
            return self._first(state)
        return kept_factors(state, "tuned")

    def finish(self, state: State, tuned: Factors, inputs: Inputs | None = None) -> State:
        """Combine the vector of task state.t + 1 with those before."""
        first = self._first(state) if self.options["space"] == "factors" else {}
        deployed = {}
        for index, name in enumerate(sorted(tuned)):
            generator = np.random.default_rng([state.seed, state.t, index])
            if first:
                a, b = in_double(_subtract, tuned[name].a, _as(tuned[name].a, first[name].a)), tuned[name].b
                old_a, old_b = self._old_factors(state, name, first[name], a, b)
                a, b = self.combine(old_a, a, generator), self.combine(old_b, b, generator)
                c = self._coefficient(state.t + 1)
                deployed[name] = Pair(_as(a, first[name].a) + c * a, c * b)
            else:
                deployed[name] = Pair(*in_double(self._delta_pair(state, name, generator), *tuned[name]))
        kept = keep_factors("tuned", tuned) if self.options["start"] == "tuned" else {}
        return replace(state, t=state.t + 1, deployed=deployed, kept=kept)

    def _old_factors(self, state: State, name: str, first: Pair, a: Array, b: Array) -> tuple[Array, Array]:
        if state.t == 0:
            return 0 * a, 0 * b
        c, old = self._coefficient(state.t), state.deployed[name]
        return in_double(_subtract, old.a, _as(old.a, first.a)) / c, old.b / c

    def _delta_pair(self, state: State, name: str, generator: np.random.Generator) -> Any:
        """Return the function from a tuned pair to the deployed one."""

        def merge(a: Array, b: Array) -> tuple[Array, Array]:
            vector = b @ a
            merged = 0 * vector
            if state.t:
                old = state.deployed[name]
                merged = (old.b @ old.a).astype(vector.dtype) / self._coefficient(state.t)
            new_a, new_b = split_delta(self.combine(merged, vector, generator), state.rank)
            return new_a, self._coefficient(state.t + 1) * new_b

        return merge

    def _coefficient(self, t: int) -> float:
        coefficient = self.options["coefficient"]
        return 1 / t if coefficient == "1/t" else coefficient

    def _first(self, state: State) -> Factors:
        return first_factors(replace(state, t=0), self.options["first_a"])


def _subtract(one: Array, other: Array) -> Array:
    return one - other


def _as(array: Array, numpy_array: np.ndarray) -> Array:
    return namespace(array).asarray(numpy_array)
