"""LoRA for continual translation: low-rank updates held back by their gradients' history, or modules mixed afterwards.

A stream takes one of two ways:
- `modules` "one": a single pair trains on, and the loss also has (strength / 2) * sum of H * (x - x_last)^2. H is the
  history of the gradients: the root of the mean squared gradient over a task's rows, divided by its mean within each
  array, averaged over the tasks so far. So `strength` means the same as in a plain L2 penalty with the same sum.
- `modules` "all": every task trains a pair of its own from the same start. Deployed is their weighted sum; all
  weights are 1/t until `calibrate` sets others, which needs no training.

Keeps: "one", the tuned pair and H of the same size, constant; "all", every task's pair beside the deployed sum: it
grows.

Source: Carrión and Casacuberta 2025, arXiv:2512.09910. Its abstract gives a penalty on the low-rank updates weighted by
historical gradients, and a calibrated linear combination of modules without a gate. It leaves open what we chose here:
the magnitude as weight (its square would be EWC), its scale, and the mean over tasks.
"""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from mbf_mlx.methods.base import Inputs, Method, TokenRow
from mbf_mlx.methods.checks import check_choices, check_number
from mbf_mlx.methods.ewc import squared_distance
from mbf_mlx.methods.factors import FIRST_A, Factors, Pair
from mbf_mlx.methods.state import State, first_factors, keep_factors, kept_factors
from mbf_mlx.reference import Array, namespace, stack_pairs


class NmtLora(Method):
    """Gradient-weighted regularisation, or a calibrated combination.

    Args:
        strength: Weight of the penalty, for `modules` "one".
        modules: "one" or "all".
        first_a: "uniform" as in LoRA, or "orthonormal".

    Raises:
        InputError: an argument outside its choices.
    """

    name = "nmt-lora"

    def __init__(self, strength: float = 0.01, modules: str = "one", first_a: str = "uniform") -> None:
        self.options: dict[str, Any] = {"strength": strength, "modules": modules, "first_a": first_a}
        check_choices(self.name, self.options, {"modules": ("one", "all"), "first_a": FIRST_A})
        check_number(self.name, "strength", strength, 0)
        self.grows = modules == "all"
        if modules == "one":
            self.needs = frozenset({"gradients"})

    def start(self, state: State) -> Factors:
        """Return the last tuned pair; the first draw for the first task, and for every task with `modules` "all"."""
        if state.t == 0 or self.grows:
            return first_factors(replace(state, t=0), self.options["first_a"])
        return dict(state.deployed)

    def penalty(self, tuned: Factors, state: State) -> Array | None:
        """Return the penalty, None while no task's gradients are known."""
        if "history_a" not in state.kept:
            return None
        return 0.5 * self.options["strength"] * squared_distance(tuned, state.deployed, kept_factors(state, "history"))

    def finish(self, state: State, tuned: Factors, inputs: Inputs | None = None) -> State:
        """Deploy the tuned pair, or the sum of all pairs with equal weights."""
        t = state.t + 1
        if not self.grows:
            return replace(state, t=t, deployed=dict(tuned))
        new = replace(state, t=t, kept=state.kept | keep_factors(f"module_{t}", tuned))
        return self.calibrate(new, [1 / t] * t)

    def after_task(self, state: State, rows: Sequence[TokenRow], gradients: Factors) -> State:
        """Take the task's gradients into the mean of the history."""
        sizes = {name: Pair(*(_relative_size(g) for g in pair)) for name, pair in gradients.items()}
        if state.kept:
            old = kept_factors(state, "history")
            sizes = {
                n: Pair(*(h + (x - h) / state.t for h, x in zip(old[n], p, strict=True))) for n, p in sizes.items()
            }
        return replace(state, kept=keep_factors("history", sizes))

    def calibrate(self, state: State, weights: Sequence[float]) -> State:
        """Return the state that deploys the modules with other weights; for `modules` "all".

        Args:
            state: The state of this method after at least one task.
            weights: One for each task.

        Raises:
            ValueError: not one weight a task.
        """
        if len(weights) != state.t:
            raise ValueError(f"nmt-lora: expected {state.t} weights, one a task, got {len(weights)}")
        modules = [kept_factors(state, f"module_{t}") for t in range(1, state.t + 1)]
        deployed = {n: Pair(*stack_pairs([module[n] for module in modules], list(weights))) for n in state.layers}
        return replace(state, deployed=deployed)


def _relative_size(squares: Array) -> Array:
    """Return the root of mean squared gradients, divided by its mean over the array."""
    xp = namespace(squares)
    size = xp.sqrt(squares)
    return size / xp.maximum(size.mean(), 1e-30)
