"""LoRA for continual translation: low-rank updates held back by their gradients' history, or modules mixed afterwards.

Two ways, of which a stream takes one:
- `modules` "one": a single pair trains on, and the loss has (strength / 2) * sum of H * (x - x_last)^2 besides. H is
  the history of the gradients: the root of the mean squared gradient over a task's rows, divided by its mean within
  each array, averaged over the tasks so far. So `strength` is that of a plain L2 penalty with the same sum.
- `modules` "all": every task trains a pair of its own from the same start; deployed is their weighted sum, all weights
  1/t until `calibrate` sets others, which needs no training.

Keeps: "one", the tuned pair and H of its size, constant; "all", every task's pair besides the deployed sum: it grows.

Source: Carrión and Casacuberta 2025, arXiv:2512.09910. Its abstract gives a penalty on the low-rank updates weighted by
historical gradients, and a calibrated linear combination of modules without a gate. Left open there, chosen here: the
magnitude (not the square, which would be EWC) as weight, its scale, and the mean over tasks.
"""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from mbf_mlx.methods.base import FIRST_A, Factors, Pair, State, check_choices, check_number, first_factors
from mbf_mlx.methods.ewc import kept_weights, squared_distance, weights_of
from mbf_mlx.reference import Array, namespace, stack_pairs


class NmtLora:
    """Gradient-weighted regularisation, or a calibrated combination.

    Args:
        strength: Of the penalty, with `modules` "one".
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
            self.needs = "gradients"

    def start(self, state: State) -> Factors:
        """Return the last tuned pair; the first draw for the first task, and for every one where all are kept."""
        if state.t == 0 or self.grows:
            return first_factors(replace(state, t=0), self.options["first_a"])
        return dict(state.deployed)

    def penalty(self, tuned: Factors, state: State) -> Array | None:
        """Return the penalty, None where no task's gradients are known yet."""
        if "history_a" not in state.kept:
            return None
        return 0.5 * self.options["strength"] * squared_distance(tuned, state.deployed, weights_of(state, "history"))

    def finish(self, state: State, tuned: Factors) -> State:
        """Deploy the tuned pair, or the sum of all pairs with equal weights."""
        t = state.t + 1
        if not self.grows:
            return replace(state, t=t, deployed=dict(tuned))
        new = replace(state, t=t, kept=state.kept | kept_weights(f"module_{t}", tuned))
        return self.calibrate(new, [1 / t] * t)

    def after_task(self, state: State, gradients: Factors) -> State:
        """Take the task's gradients into the mean of the history."""
        sizes = {name: Pair(*(_relative_size(g) for g in pair)) for name, pair in gradients.items()}
        if state.kept:
            old = weights_of(state, "history")
            sizes = {
                n: Pair(*(h + (x - h) / state.t for h, x in zip(old[n], p, strict=True))) for n, p in sizes.items()
            }
        return replace(state, kept=kept_weights("history", sizes))

    def calibrate(self, state: State, weights: Sequence[float]) -> State:
        """Return the state with other weights of the modules deployed, one a task; for `modules` "all".

        Raises:
            ValueError: not one weight a task.
        """
        if len(weights) != state.t:
            raise ValueError(f"nmt-lora: expected {state.t} weights, one a task, got {len(weights)}")
        modules = [weights_of(state, f"module_{t}") for t in range(1, state.t + 1)]
        deployed = {n: Pair(*stack_pairs([module[n] for module in modules], list(weights))) for n in state.layers}
        return replace(state, deployed=deployed)


def _relative_size(squares: Array) -> Array:
    """Return the root of mean squared gradients, divided by its mean over the array."""
    xp = namespace(squares)
    size = xp.sqrt(squares)
    return size / xp.maximum(size.mean(), 1e-30)
