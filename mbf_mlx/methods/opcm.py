"""OPCM: remove from the newest task's update what lies in the merged update's main directions, then add the rest.

Let M = U S V^T be the merged update and D the newest task's. P = U^T D V says how D acts between M's own directions.
Its diagonal and its leading k x k block are removed from D; k is the largest number of M's leading singular values
that make up at most `alpha` of their sum. Then M <- (lambda(t-1) M + cleaned D) / lambda(t). lambda(t) is chosen so
that the norm of M, over all layers, is the mean of the norms of all tasks' updates; for orthogonal updates of one
size it is sqrt(t).

Everything stays in factors: M has rank r, cleaned D at most 2r, and the sum is cut back to rank r after every task.

Keeps: the merged pair and two numbers. Constant in the number of tasks.

Source: Tang et al. 2025, arXiv:2501.09522, and its public code (alpha 0.5). There M has full rank and is never cut, and
the diagonal goes on beyond M's rank, in directions that the SVD routine picks arbitrarily; here it ends with the rank.
"""

import math
from dataclasses import replace
from typing import Any

import numpy as np

from mbf_mlx.methods.base import Inputs, Method
from mbf_mlx.methods.checks import check_choices, check_number
from mbf_mlx.methods.factors import FIRST_A, Factors, Pair, in_double
from mbf_mlx.methods.state import STREAM, State, first_factors, keep_factors, kept_factors
from mbf_mlx.reference import Array, cut_rank, namespace, stack_pairs, update_norm


class Opcm(Method):
    """Orthogonal-projection-based continual merging.

    Args:
        alpha: Share of M's singular values whose directions the newest update may not touch, in [0, 1].
        start: "first", the same draw for every task, as published; "tuned", the last tuned pair, which is then kept.
        first_a: "uniform" as in LoRA, or "orthonormal".

    Raises:
        InputError: an argument outside its choices.
    """

    name = "opcm"
    absorbs = True

    def __init__(self, alpha: float = 0.5, start: str = "first", first_a: str = "uniform") -> None:
        self.options: dict[str, Any] = {"alpha": alpha, "start": start, "first_a": first_a}
        check_choices(self.name, self.options, {"start": ("first", "tuned"), "first_a": FIRST_A})
        check_number(self.name, "alpha", alpha, 0, 1)

    def start(self, state: State) -> Factors:
        """Return the first draw for the first task, with `start` "first" for every task; else the last tuned pair."""
        if state.t == 0 or self.options["start"] == "first":
            return first_factors(replace(state, t=0), self.options["first_a"])
        return kept_factors(state, "tuned")

    def finish(self, state: State, tuned: Factors, inputs: Inputs | None = None) -> State:
        """Merge the update of task state.t + 1."""
        t, norm = state.t + 1, _norm(tuned)
        kept = keep_factors("tuned", tuned) if self.options["start"] == "tuned" else {}
        if state.t == 0:
            numbers, deployed = [1.0, norm], dict(tuned)
        else:
            old_lambda, mean = (float(x) for x in np.asarray(state.kept["lambda_and_norm"][STREAM]))
            mean += (norm - mean) / t
            unscaled = {name: self._merge(state.deployed[name], tuned[name], old_lambda) for name in tuned}
            new_lambda = _norm(unscaled) / mean if mean else 1.0
            deployed = {name: Pair(a, b / (new_lambda or 1.0)) for name, (a, b) in unscaled.items()}
            numbers = [new_lambda or 1.0, mean]
        kept["lambda_and_norm"] = {STREAM: np.array(numbers, dtype=np.float32)}
        return replace(state, t=t, deployed=deployed, kept=kept)

    def _merge(self, merged: Pair, tuned: Pair, old_lambda: float) -> Pair:
        """Return lambda(t-1) M + cleaned D, cut to M's rank."""

        def merge(merged_a: Array, merged_b: Array, tuned_a: Array, tuned_b: Array) -> tuple[Array, Array]:
            rank = merged_a.shape[0]
            a, b = cut_rank(merged_a, merged_b, rank)  # balanced: a row's squared norm is a singular value
            s = (a * a).sum(axis=1)
            root = namespace(a).sqrt(namespace(a).where(s > 0, s, 1.0))
            v, u = a / root[:, None], b / root
            acting = (u.T @ tuned_b) @ (tuned_a @ v.T)
            removed = acting * _mask(np.asarray(s), self.options["alpha"], acting)
            return cut_rank(
                *stack_pairs([(merged_a, merged_b), (tuned_a, tuned_b), (v, u @ removed)], [old_lambda, 1, -1]), rank
            )

        return Pair(*in_double(merge, *merged, *tuned))


def _mask(s: np.ndarray, alpha: float, like: Array) -> Array:
    """Return 1 on the diagonal and on the leading block, whose size follows from `alpha`; 0 elsewhere."""
    share = np.cumsum(s) / (s.sum() or 1.0)
    block = int((share <= alpha + 1e-12).sum())
    mask = np.eye(len(s))
    mask[:block, :block] = 1
    return namespace(like).asarray(mask.astype(np.float32)).astype(like.dtype)


def _norm(factors: Factors) -> float:
    """Return the Frobenius norm of all layers' B @ A together."""
    return math.hypot(*(float(update_norm(*pair)) for pair in factors.values()))
