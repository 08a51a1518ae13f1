"""IncLoRA: every task trains a new pair; the old pairs are frozen and all are summed.

While task t trains, the model applies the sum of the old pairs and the new one, as a single pair of rank r * t.

Keeps: one pair a task, as a single pair of rank r * t. It grows with the number of tasks.

Source: the baseline in Wang et al. 2023, arXiv:2310.14152. Its public code is that of O-LoRA with both weights zero,
and so is ours. There dropout is 0.1, here there is none.
"""

from dataclasses import replace
from typing import Any

from mbf_mlx.methods.base import Inputs, Method
from mbf_mlx.methods.checks import check_choices
from mbf_mlx.methods.factors import FIRST_A, Factors, Pair
from mbf_mlx.methods.state import State, first_factors
from mbf_mlx.reference import stack_pairs


class IncLora(Method):
    """A new pair for every task.

    Args:
        first_a: A of every new pair: "uniform" as in LoRA, or "orthonormal".

    Raises:
        InputError: another `first_a`.
    """

    name = "inclora"
    grows = True

    def __init__(self, first_a: str = "uniform") -> None:
        self.options: dict[str, Any] = {"first_a": first_a}
        check_choices(self.name, self.options, {"first_a": FIRST_A})

    def start(self, state: State) -> Factors:
        """Return a new random A and a zero B."""
        return first_factors(state, self.options["first_a"])

    def effective(self, tuned: Factors, state: State) -> Factors:
        """Return the frozen pairs and the one that trains, as one pair."""
        if state.t == 0:
            return tuned
        return {name: Pair(*stack_pairs([state.deployed[name], pair])) for name, pair in tuned.items()}

    def finish(self, state: State, tuned: Factors, inputs: Inputs | None = None) -> State:
        """Freeze the tuned pair beside the others."""
        return replace(state, t=state.t + 1, deployed=self.effective(tuned, state))
