"""Online elastic weight consolidation: a quadratic penalty holds in place what old tasks depend on.

F estimates, for every entry of the factors, how much the loss of the tasks so far depends on that entry. It is the
mean squared gradient over a task's rows, added after each task to the faded sum of the earlier ones. While a task
trains, the loss also has (strength / 2) * sum of F * (x - x_last)^2, where x_last is the last tuned factors.

Keeps: the tuned pair, and F of the same size. Constant in the number of tasks.

Source: Kirkpatrick et al. 2017, arXiv:1612.00796; the running sum is from Schwarz et al. 2018, arXiv:1805.06370. The
public code (`ewc_on` of aimagelab/mammoth) agrees with ours in two things: F is computed row by row with the rows'
own labels (the empirical Fisher), and the penalty pulls towards the last parameters. It differs in two: there a row
counts by the probability of its label, and the penalty has no 1/2.
"""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from mbf_mlx.methods.base import Need, TokenRow
from mbf_mlx.methods.checks import check_number
from mbf_mlx.methods.factors import Factors, Pair
from mbf_mlx.methods.sequential import Sequential
from mbf_mlx.methods.state import State, keep_factors, kept_factors
from mbf_mlx.reference import Array


class Ewc(Sequential):
    """Online EWC.

    Args:
        strength: Weight of the penalty; 400 is usual where F is a mean over rows.
        fading: The share of the earlier tasks' F that is left when a task's own is added, in [0, 1]; 1 is a plain sum.
        first_a: "uniform" as in LoRA, or "orthonormal".

    Raises:
        InputError: an argument outside its choices.
    """

    name = "ewc"
    absorbs = False
    needs: frozenset[Need] = frozenset({"gradients"})

    def __init__(self, strength: float = 400.0, fading: float = 1.0, first_a: str = "uniform") -> None:
        super().__init__(first_a)
        self.options = {"strength": strength, "fading": fading} | self.options
        check_number(self.name, "strength", strength, 0)
        check_number(self.name, "fading", fading, 0, 1)

    def penalty(self, tuned: Factors, state: State) -> Array | None:
        """Return the penalty, None while no task's gradients are known."""
        if "fisher_a" not in state.kept:
            return None
        return 0.5 * self.options["strength"] * squared_distance(tuned, state.deployed, kept_factors(state, "fisher"))

    def after_task(self, state: State, rows: Sequence[TokenRow], gradients: Factors) -> State:
        """Add the task's mean squared gradients to the faded sum."""
        old = kept_factors(state, "fisher") if state.kept else {}
        fading = self.options["fading"]
        new = {
            n: Pair(*(fading * f + g for f, g in zip(old[n], p, strict=True))) if old else p
            for n, p in gradients.items()
        }
        return replace(state, kept=keep_factors("fisher", new))


def squared_distance(tuned: Factors, anchor: Factors, weights: Factors | None = None) -> Array:
    """Return the sum over all entries of weight * (x - anchor)^2; without `weights` every weight is 1."""
    total: Any = 0.0
    for name, pair in tuned.items():
        for i, (x, x0) in enumerate(zip(pair, anchor[name], strict=True)):
            squares = (x - x0) * (x - x0)
            total = total + (squares if weights is None else weights[name][i] * squares).sum()
    return total
