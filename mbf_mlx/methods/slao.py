"""Merge before Forget (SLAO), the paper's method, and its ablations as arguments.

Task t starts from an orthonormal basis of the last tuned A and from the last tuned B; after it, A is the tuned one and
B moves by 1/sqrt(t) towards the tuned one. Keeps: one A and two B (merged and tuned). Constant in the number of tasks.

Source: Qiao and Mahdavi 2025, arXiv:2512.23017, Algorithm 1; the ablations are those of its tables.
"""

from dataclasses import replace
from typing import Any

import numpy as np

from mbf_mlx.errors import InputError
from mbf_mlx.methods.base import Factors, Pair, State, first_factors
from mbf_mlx.reference import Array, merge, merge_weight, signed_qr

CHOICES = {
    "start_a": ("qr", "qr-preserving", "keep", "random"),
    "first_a": ("uniform", "orthonormal"),
    "start_b": ("tuned", "merged", "zero"),
    "merged": ("b", "a and b", "none"),
}
WEIGHTS = ("1/sqrt(t)", "1/t")


class Slao:
    """Algorithm 1 by default.

    Args:
        start_a: "qr", the orthonormal basis of the last tuned A; "qr-preserving", the same with B (and merged B) moved
            along, so that the function does not change: A = R Q starts from Q and B R; "keep", the last tuned A as it
            is; "random", drawn anew.
        first_a: A of the first task: "uniform" as in LoRA, or "orthonormal".
        start_b: "tuned", the last tuned B; "merged", the deployed one (the paper's Last-Merge); "zero".
        merged: what is merged after a task: "b"; "a and b"; "none", which deploys the tuned pair.
        weight: "1/sqrt(t)"; "1/t"; or a constant in (0, 1], which the first task ignores.

    Raises:
        InputError: an argument outside its choices, or a combination without meaning.
    """

    name = "slao"

    def __init__(
        self,
        start_a: str = "qr",
        first_a: str = "uniform",
        start_b: str = "tuned",
        merged: str = "b",
        weight: str | float = "1/sqrt(t)",
    ) -> None:
        options = {"start_a": start_a, "first_a": first_a, "start_b": start_b, "merged": merged, "weight": weight}
        for key, choices in CHOICES.items():
            if options[key] not in choices:
                raise InputError(f"slao: {key}: expected one of {', '.join(choices)}, got {options[key]!r}")
        constant = isinstance(weight, (int, float)) and not isinstance(weight, bool) and 0 < weight <= 1
        if weight not in WEIGHTS and not constant:
            raise InputError(f"slao: weight: expected {', '.join(WEIGHTS)} or a constant in (0, 1], got {weight!r}")
        if start_a == "random" and start_b != "zero":
            raise InputError(
                "slao: a random start of A has no meaning for a B tuned with another A; use start_b 'zero'"
            )
        if start_a == "qr-preserving" and start_b == "zero":
            raise InputError("slao: a start that keeps the function needs B; use start_b 'tuned' or start_a 'qr'")
        if start_a == "qr-preserving" and merged == "a and b":
            raise InputError("slao: with A merged, too, merged B has no basis to be moved to; use merged 'b' or 'none'")
        if merged == "none" and (start_b == "merged" or weight != WEIGHTS[0]):
            raise InputError("slao: with nothing merged there is neither a merged B to start from nor a weight")
        self.options: dict[str, Any] = options

    def start(self, state: State) -> Factors:
        """Return the factors that task state.t + 1 starts from."""
        start_a = self.options["start_a"]
        if state.t == 0 or start_a == "random":
            return first_factors(state, self.options["first_a"])
        return {name: self._start_pair(state, name) for name in state.layers}

    def _start_pair(self, state: State, name: str) -> Pair:
        tuned, deployed = self._tuned(state, name), state.deployed[name]
        b = {"tuned": tuned.b, "merged": deployed.b, "zero": 0 * tuned.b}[self.options["start_b"]]
        if self.options["start_a"] == "keep":
            return Pair(tuned.a, b)
        if self.options["start_a"] == "qr":
            return Pair(_split(tuned.a)[0], b)
        basis, r = _split(tuned.a)
        return Pair(basis, b @ r)

    def finish(self, state: State, tuned: Factors) -> State:
        """Merge the tuned factors of task state.t + 1 into the deployed ones."""
        t, merged = state.t + 1, self.options["merged"]
        if t == 1 or merged == "none":
            deployed = dict(tuned)
        else:
            weight = self._weight(t)
            deployed = {name: self._merge_pair(state, name, pair, weight) for name, pair in tuned.items()}
        kept: dict[str, dict[str, Array]] = {}
        if merged != "none":
            kept["tuned_b"] = {name: pair.b for name, pair in tuned.items()}
        if merged == "a and b":
            kept["tuned_a"] = {name: pair.a for name, pair in tuned.items()}
        return replace(state, t=t, deployed=deployed, kept=kept)

    def _merge_pair(self, state: State, name: str, tuned: Pair, weight: float) -> Pair:
        old = state.deployed[name]
        if self.options["merged"] == "a and b":
            return Pair(merge(old.a, tuned.a, weight), merge(old.b, tuned.b, weight))
        old_b = old.b
        if self.options["start_a"] == "qr-preserving":
            old_b = old.b @ _split(self._tuned(state, name).a)[1]
        return Pair(tuned.a, merge(old_b, tuned.b, weight))

    def _tuned(self, state: State, name: str) -> Pair:
        """Return the last tuned pair: A is the deployed one unless A is merged, too."""
        deployed = state.deployed[name]
        a = state.kept["tuned_a"][name] if "tuned_a" in state.kept else deployed.a
        b = state.kept["tuned_b"][name] if "tuned_b" in state.kept else deployed.b
        return Pair(a, b)

    def _weight(self, t: int) -> float:
        weight = self.options["weight"]
        if weight == "1/t":
            return 1 / t
        return merge_weight(t) if weight == "1/sqrt(t)" else float(weight)


def _split(a: Array) -> tuple[Array, Array]:
    """Return `signed_qr(a)`, for NumPy in double precision: one start for all machines, to float32's last bit."""
    if not isinstance(a, np.ndarray):
        return signed_qr(a)
    q, r = signed_qr(a.astype(np.float64))
    return q.astype(a.dtype), r.astype(a.dtype)
