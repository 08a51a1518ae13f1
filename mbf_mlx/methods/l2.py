"""L2 to the start: a task may not move the factors far from where it started.

The loss has (strength / 2) * |x - x_start|^2 besides, over all entries of A and B; nothing is known of which matter.

Keeps: the tuned pair, nothing else. Constant in the number of tasks.

Source: the plain rival in Kirkpatrick et al. 2017, arXiv:1612.00796.
"""

from dataclasses import replace
from typing import Any

from mbf_mlx.methods.base import FIRST_A, Factors, State, check_choices, check_number, first_factors
from mbf_mlx.methods.ewc import squared_distance
from mbf_mlx.reference import Array


class L2:
    """Sequential LoRA with an L2 penalty from the second task on.

    Args:
        strength: Of the penalty.
        first_a: "uniform" as in LoRA, or "orthonormal".

    Raises:
        InputError: an argument outside its choices.
    """

    name = "l2"
    grows = False

    def __init__(self, strength: float = 0.01, first_a: str = "uniform") -> None:
        self.options: dict[str, Any] = {"strength": strength, "first_a": first_a}
        check_choices(self.name, self.options, {"first_a": FIRST_A})
        check_number(self.name, "strength", strength, 0)

    def start(self, state: State) -> Factors:
        """Return the last tuned pair, or a random A and a zero B for the first task."""
        return dict(state.deployed) if state.t else first_factors(state, self.options["first_a"])

    def penalty(self, tuned: Factors, state: State) -> Array | None:
        """Return the penalty, None in the first task."""
        return 0.5 * self.options["strength"] * squared_distance(tuned, state.deployed) if state.t else None

    def finish(self, state: State, tuned: Factors) -> State:
        """Deploy the tuned pair as it is."""
        return replace(state, t=state.t + 1, deployed=dict(tuned))
