"""Sequential LoRA: one pair trained on through all tasks, nothing merged; what every method is compared with.

Keeps: the deployed pair, nothing else. Constant in the number of tasks.
"""

from dataclasses import replace
from typing import Any

from mbf_mlx.methods.base import FIRST_A, Factors, State, check_choices, first_factors


class Sequential:
    """Plain SeqLoRA, and what methods are built on that add a penalty to it.

    Args:
        first_a: A of the first task: "uniform" as in LoRA, or "orthonormal".

    Raises:
        InputError: another `first_a`.
    """

    name = "sequential"
    grows = False

    def __init__(self, first_a: str = "uniform") -> None:
        self.options: dict[str, Any] = {"first_a": first_a}
        check_choices(self.name, self.options, {"first_a": FIRST_A})

    def start(self, state: State) -> Factors:
        """Return the last tuned pair, or a random A and a zero B for the first task."""
        return dict(state.deployed) if state.t else first_factors(state, self.options["first_a"])

    def finish(self, state: State, tuned: Factors) -> State:
        """Deploy the tuned pair as it is."""
        return replace(state, t=state.t + 1, deployed=dict(tuned))
