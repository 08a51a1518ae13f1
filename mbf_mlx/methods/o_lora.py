"""O-LoRA: IncLoRA whose new A is kept orthogonal to all old ones.

The loss has `orthogonal` * sum of |A_old A_new^T| (all entries, all old tasks, all layers) besides, and
`shrink` * sum of the norms of the new factors.

Keeps: one pair a task, as a single one of rank r * t. It grows with the number of tasks.

Source: Wang et al. 2023, arXiv:2310.14152, and its public code. What agrees: the term, not squared and not averaged; no
term in the first task; the norms are of each factor by itself; weights 0.5 and 0 for the short orders. What differs:
there the terms are added in every micro-batch, so accumulating gradients makes them weigh more; here once a step.
"""

from typing import Any

from mbf_mlx.methods.base import Factors, State, check_number
from mbf_mlx.methods.inclora import IncLora
from mbf_mlx.reference import Array, namespace


class OLora(IncLora):
    """Orthogonal new pairs.

    Args:
        orthogonal: Weight of the orthogonality term.
        shrink: Weight of the new factors' norms.
        first_a: A of every new pair: "uniform" as in LoRA, or "orthonormal".

    Raises:
        InputError: an argument outside its choices.
    """

    name = "o-lora"

    def __init__(self, orthogonal: float = 0.5, shrink: float = 0.0, first_a: str = "uniform") -> None:
        super().__init__(first_a)
        self.options: dict[str, Any] = {"orthogonal": orthogonal, "shrink": shrink, "first_a": first_a}
        check_number(self.name, "orthogonal", orthogonal, 0)
        check_number(self.name, "shrink", shrink, 0)

    def penalty(self, tuned: Factors, state: State) -> Array | None:
        """Return both terms, None in the first task, which has no old A (nor, in the public code, a shrinking)."""
        if state.t == 0:
            return None
        total: Any = 0.0
        for name, (a, b) in tuned.items():
            total = total + self.options["orthogonal"] * abs(state.deployed[name].a @ a.T).sum()
            if self.options["shrink"]:
                total = total + self.options["shrink"] * (safe_norm(a) + safe_norm(b))
        return total


def safe_norm(x: Array) -> Array:
    """Return the Frobenius norm, with a gradient that stays finite where x is zero, as B is at the start."""
    return namespace(x).sqrt((x * x).sum() + 1e-12)
