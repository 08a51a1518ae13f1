"""Online elastic weight consolidation: what old tasks depend on is held in place by a quadratic penalty.

F estimates, for every entry of the factors, how much the loss of the tasks so far depends on it: the mean squared
gradient over a task's rows, added after each task to the faded sum of the earlier ones. While a task trains, the loss
has (strength / 2) * sum of F * (x - x_last)^2 besides, x_last being the last tuned factors.

Keeps: the tuned pair, and F of the same size. Constant in the number of tasks.

Source: Kirkpatrick et al. 2017, arXiv:1612.00796; the running sum is Schwarz et al. 2018, arXiv:1805.06370. Public code
(`ewc_on` of aimagelab/mammoth) agrees in that F is taken row by row with the rows' own labels (the empirical Fisher)
and that the last parameters are the anchor. There a row counts by the probability of its label, and the penalty has no
1/2.
"""

from dataclasses import replace
from typing import Any

from mbf_mlx.methods.base import Factors, Pair, State, check_number
from mbf_mlx.methods.sequential import Sequential
from mbf_mlx.reference import Array


class Ewc(Sequential):
    """Online EWC.

    Args:
        strength: Of the penalty; 400 is usual where F is a mean over rows.
        fading: What is left of the earlier tasks' F when a task's own is added, in [0, 1]; 1 is a plain sum.
        first_a: "uniform" as in LoRA, or "orthonormal".

    Raises:
        InputError: an argument outside its choices.
    """

    name = "ewc"
    needs = "gradients"

    def __init__(self, strength: float = 400.0, fading: float = 1.0, first_a: str = "uniform") -> None:
        super().__init__(first_a)
        self.options = {"strength": strength, "fading": fading} | self.options
        check_number(self.name, "strength", strength, 0)
        check_number(self.name, "fading", fading, 0, 1)

    def penalty(self, tuned: Factors, state: State) -> Array | None:
        """Return the penalty, None where no task's gradients are known yet."""
        if "fisher_a" not in state.kept:
            return None
        return 0.5 * self.options["strength"] * squared_distance(tuned, state.deployed, weights_of(state, "fisher"))

    def after_task(self, state: State, gradients: Factors) -> State:
        """Add the task's mean squared gradients to the faded sum."""
        old = weights_of(state, "fisher") if state.kept else {}
        fading = self.options["fading"]
        new = {
            n: Pair(*(fading * f + g for f, g in zip(old[n], p, strict=True))) if old else p
            for n, p in gradients.items()
        }
        return replace(state, kept=kept_weights("fisher", new))


def squared_distance(tuned: Factors, anchor: Factors, weights: Factors | None = None) -> Array:
    """Return the sum over all entries of weight * (x - anchor)^2, weight 1 without `weights`."""
    total: Any = 0.0
    for name, pair in tuned.items():
        for i, (x, x0) in enumerate(zip(pair, anchor[name], strict=True)):
            squares = (x - x0) * (x - x0)
            total = total + (squares if weights is None else weights[name][i] * squares).sum()
    return total


def weights_of(state: State, name: str) -> Factors:
    """Return what `kept_weights` stored."""
    a, b = state.kept[f"{name}_a"], state.kept[f"{name}_b"]
    return {layer: Pair(a[layer], b[layer]) for layer in a}


def kept_weights(name: str, weights: Factors) -> dict[str, dict[str, Array]]:
    """Return one array for each factor as `State.kept` has them."""
    return {f"{name}_a": {n: p.a for n, p in weights.items()}, f"{name}_b": {n: p.b for n, p in weights.items()}}
