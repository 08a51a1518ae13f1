"""Sequential LoRA: one pair trains on through all tasks and nothing is merged; every method is compared with it.

Keeps: the deployed pair, nothing else. Constant in the number of tasks.
"""

from dataclasses import replace
from typing import Any

from mbf_mlx.methods.base import Inputs, Method
from mbf_mlx.methods.checks import check_choices
from mbf_mlx.methods.factors import FIRST_A, Factors
from mbf_mlx.methods.state import State, first_factors


class Sequential(Method):
    """Plain sequential LoRA, and the base of methods that add a penalty to it.

    Args:
        first_a: A of the first task: "uniform" as in LoRA, or "orthonormal".

    Raises:
        InputError: another `first_a`.
    """

    name = "sequential"
    absorbs = True

    def __init__(self, first_a: str = "uniform") -> None:
        self.options: dict[str, Any] = {"first_a": first_a}
        check_choices(self.name, self.options, {"first_a": FIRST_A})

    def start(self, state: State) -> Factors:
        """Return the last tuned pair; for the first task a random A and a zero B."""
        return dict(state.deployed) if state.t else first_factors(state, self.options["first_a"])

    def finish(self, state: State, tuned: Factors, inputs: Inputs | None = None) -> State:
        """Deploy the tuned pair as it is."""
        return replace(state, t=state.t + 1, deployed=dict(tuned))
