"""C-LoRA: one LoRA for all tasks with a routing matrix between its factors, R = R_old + R_delta.

delta = B R A. Task t trains R_delta, which starts at zero, together with A and B; R_old is fixed. Afterwards R_old
becomes their sum. The loss also has `orthogonal` * |R_old^T R_delta|^2 (Frobenius), so that a new task writes into
directions of the shared subspace that the old tasks left free. In the first task R_old is zero and R_delta starts as
the identity.

Keeps: A, B, B R (deployed) and R of rank x rank in every layer. Constant in the number of tasks.

Source: Zhang et al. 2025, arXiv:2502.17920, for vision transformers; we found no public code. From the paper: one
low-rank adapter, R = R_old + R_delta with R_old fixed, an orthogonality term. It leaves open what we chose here:
which two things are orthogonal (old and new routing, which needs no second copy of A and B), that the term is
squared, its weight, and that A and B go on training at a rate of their own.
"""

from dataclasses import replace
from typing import Any, NamedTuple

import numpy as np

from mbf_mlx.methods.base import Inputs, Method
from mbf_mlx.methods.checks import check_choices, check_number
from mbf_mlx.methods.factors import FIRST_A, Factors, Pair
from mbf_mlx.methods.state import State, first_factors
from mbf_mlx.reference import Array


class Routed(NamedTuple):
    """What trains in a layer."""

    a: Array  # (rank, in)
    b: Array  # (out, rank)
    r: Array  # (rank, rank), R_delta


class CLora(Method):
    """One LoRA with a routing matrix.

    Args:
        orthogonal: Weight of the orthogonality term.
        rate_shared: Learning rate of A and B as a share of the routing's, after the first task; 0 holds them fixed.
        first_a: "uniform" as in LoRA, or "orthonormal".

    Raises:
        InputError: an argument outside its choices.
    """

    name = "c-lora"

    def __init__(self, orthogonal: float = 0.1, rate_shared: float = 1.0, first_a: str = "uniform") -> None:
        self.options: dict[str, Any] = {"orthogonal": orthogonal, "rate_shared": rate_shared, "first_a": first_a}
        check_choices(self.name, self.options, {"first_a": FIRST_A})
        check_number(self.name, "orthogonal", orthogonal, 0)
        check_number(self.name, "rate_shared", rate_shared, 0)

    def start(self, state: State) -> dict[str, Routed]:
        """Return A and B as they are and a zero R_delta; for the first task a random A, a zero B and the identity."""
        if state.t == 0:
            eye = np.eye(state.rank, dtype=np.float32)
            first = first_factors(state, self.options["first_a"])
            return {name: Routed(a, b, eye.copy()) for name, (a, b) in first.items()}
        kept = state.kept
        return {n: Routed(state.deployed[n].a, kept["b"][n], 0 * kept["routing"][n]) for n in state.layers}

    def rates(self, state: State) -> dict[str, float]:
        """Return the learning rates of A and B as a share of the task's own."""
        rate = self.options["rate_shared"] if state.t else 1.0
        return {"a": rate, "b": rate}

    def effective(self, tuned: dict[str, Routed], state: State) -> Factors:
        """Return A and B R."""
        return {name: Pair(a, b @ self._routing(state, name, r)) for name, (a, b, r) in tuned.items()}

    def penalty(self, tuned: dict[str, Routed], state: State) -> Array | None:
        """Return the orthogonality term, None in the first task."""
        if state.t == 0:
            return None
        total: Any = 0.0
        for name, fields in tuned.items():
            overlap = state.kept["routing"][name].T @ fields.r
            total = total + (overlap * overlap).sum()
        return self.options["orthogonal"] * total

    def finish(self, state: State, tuned: dict[str, Routed], inputs: Inputs | None = None) -> State:
        """Add R_delta to R_old and deploy B R with A."""
        kept = {
            "b": {name: fields.b for name, fields in tuned.items()},
            "routing": {name: self._routing(state, name, fields.r) for name, fields in tuned.items()},
        }
        return replace(state, t=state.t + 1, deployed=self.effective(tuned, state), kept=kept)

    def _routing(self, state: State, name: str, r: Array) -> Array:
        return state.kept["routing"][name] + r if state.t else r
