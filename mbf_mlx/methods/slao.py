"""Merge before Forget (SLAO), the paper's method, and its ablations as arguments.

Task t starts from an orthonormal basis of the last tuned A and from the last tuned B. After the task, A is the tuned
one and B moves by 1/sqrt(t) towards the tuned one.

Keeps: one A and two B (merged and tuned). Constant in the number of tasks.

Source: Qiao and Mahdavi 2025, arXiv:2512.23017, Algorithm 1; the ablations are those of its tables.
"""

from dataclasses import replace
from typing import Any

from mbf_mlx.methods.base import Inputs, Method
from mbf_mlx.methods.factors import Factors, Pair, each_layer, in_double
from mbf_mlx.methods.slao_switches import check_switches
from mbf_mlx.methods.state import State, first_factors
from mbf_mlx.reference import merge, merge_weight, move, signed_qr


class Slao(Method):
    """Algorithm 1 by default.

    Args:
        start_a: "qr", the orthonormal basis of the last tuned A; "qr-preserving", the same with B (and merged B) moved
            along, so that the function does not change: A = R Q starts from Q and B R; "keep", the last tuned A as it
            is; "random", a new draw.
        first_a: A of the first task: "uniform" as in LoRA, or "orthonormal".
        start_b: "tuned", the last tuned B; "merged", the deployed one (the paper's Last-Merge); "zero".
        merged: what is merged after a task: "b"; "b moved", where merged B is first fitted by least squares to give the
            merged update with the new A (ours); "a"; "a and b"; "none", which deploys the tuned pair.
        weight: "1/sqrt(t)"; "1/t"; or a constant in (0, 1], which the first task ignores.
        train: which factors train; the other one stays as it was drawn (the paper's FREA and FREB). The paper does not
            say how a frozen B is drawn. Here it is drawn as A is, with (out) in place of (in), and A starts at zero.

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
        train: str = "a and b",
    ) -> None:
        self.settings: dict[str, Any] = {
            "start_a": start_a,
            "first_a": first_a,
            "start_b": start_b,
            "merged": merged,
            "weight": weight,
            "train": train,
        }
        self.options = self.settings  # a subclass sets options of its own
        check_switches(self.name, self.settings)
        self.absorbs = train == "a and b"

    def start(self, state: State) -> Factors:
        """Return the factors that task state.t + 1 starts from."""
        if state.t == 0 or self.settings["start_a"] == "random":
            return first_factors(state, self.settings["first_a"], zero="a" if self.settings["train"] == "a" else "b")
        return each_layer(lambda name: self._start_pair(state, name), state.deployed)

    def rates(self, state: State) -> dict[str, float]:
        """Return rate 0 for a factor that does not train, 1 for one that does."""
        return {factor: float(factor in self.settings["train"].split(" and ")) for factor in "ab"}

    def _start_pair(self, state: State, name: str) -> Pair:
        tuned, deployed = self.tuned(state, name), state.deployed[name]
        b = {"tuned": tuned.b, "merged": deployed.b, "zero": 0 * tuned.b}[self.settings["start_b"]]
        if self.settings["start_a"] == "keep":
            return Pair(tuned.a, b)
        basis, r = in_double(signed_qr, tuned.a)
        return Pair(basis, b @ r if self.settings["start_a"] == "qr-preserving" else b)

    def finish(self, state: State, tuned: Factors, inputs: Inputs | None = None) -> State:
        """Merge the tuned factors of task state.t + 1 into the deployed ones."""
        t, merged = state.t + 1, self.settings["merged"]
        if t == 1 or merged == "none":
            deployed = dict(tuned)
        else:
            deployed = each_layer(lambda name: self._merge_pair(state, name, tuned[name], t), tuned)
        kept = {}
        if merged in ("b", "b moved", "a and b"):
            kept["tuned_b"] = {name: pair.b for name, pair in tuned.items()}
        if merged in ("a", "a and b"):
            kept["tuned_a"] = {name: pair.a for name, pair in tuned.items()}
        return replace(state, t=t, deployed=deployed, kept=kept)

    def _merge_pair(self, state: State, name: str, tuned: Pair, t: int) -> Pair:
        (old_a, old_b), (a, b) = state.deployed[name], tuned
        weight, merged = self._weight(t), self.settings["merged"]
        if self.settings["start_a"] == "qr-preserving":
            _, r = in_double(signed_qr, self.tuned(state, name).a)
            old_b = old_b @ r
        if merged == "b moved":
            old_b = in_double(move, old_a, old_b, a)
        if merged in ("a", "a and b"):
            a = merge(old_a, a, weight)
        if merged in ("b", "b moved", "a and b"):
            b = merge(old_b, b, weight)
        return Pair(a, b)

    def tuned(self, state: State, name: str) -> Pair:
        """Return a layer's last tuned pair; a factor that is not merged is deployed as it was tuned."""
        a, b = state.deployed[name]
        kept = state.kept
        return Pair(
            kept["tuned_a"][name] if "tuned_a" in kept else a, kept["tuned_b"][name] if "tuned_b" in kept else b
        )

    def _weight(self, t: int) -> float:
        weight = self.settings["weight"]
        if weight == "1/t":
            return 1 / t
        return merge_weight(t) if weight == "1/sqrt(t)" else float(weight)
