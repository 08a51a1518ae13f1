"""L2 to the start: a task may not move the factors far from where it started.

The loss also has (strength / 2) * |x - x_start|^2 over all entries of A and B. It does not know which entries matter.

Keeps: the tuned pair, nothing else. Constant in the number of tasks.

Source: the plain rival in Kirkpatrick et al. 2017, arXiv:1612.00796.
"""

from mbf_mlx.methods.checks import check_number
from mbf_mlx.methods.ewc import squared_distance
from mbf_mlx.methods.factors import Factors
from mbf_mlx.methods.sequential import Sequential
from mbf_mlx.methods.state import State
from mbf_mlx.reference import Array


class L2(Sequential):
    """Sequential LoRA with an L2 penalty from the second task on.

    Args:
        strength: Weight of the penalty.
        first_a: "uniform" as in LoRA, or "orthonormal".

    Raises:
        InputError: an argument outside its choices.
    """

    name = "l2"
    absorbs = False

    def __init__(self, strength: float = 0.01, first_a: str = "uniform") -> None:
        super().__init__(first_a)
        self.options = {"strength": strength} | self.options
        check_number(self.name, "strength", strength, 0)

    def penalty(self, tuned: Factors, state: State) -> Array | None:
        """Return the penalty, None in the first task."""
        return 0.5 * self.options["strength"] * squared_distance(tuned, state.deployed) if state.t else None
