"""O-LoRA: IncLoRA whose new A is kept orthogonal to all old ones.

The loss also has `orthogonal` * sum of |A_old A_new^T| (over all entries, old tasks and layers), and `shrink` * sum
of the norms of the new factors.

Keeps: one pair a task, as a single pair of rank r * t. It grows with the number of tasks.

Source: Wang et al. 2023, arXiv:2310.14152, and its public code. What agrees: the term is neither squared nor
averaged; the first task has no term; each factor has a norm of its own; the weights are 0.5 and 0 as for the short
orders. What differs: there the terms are added in every micro-batch, so they weigh more with gradient accumulation;
here they are added once a step.
"""

from typing import Any

from mbf_mlx.methods.checks import check_number
from mbf_mlx.methods.factors import Factors
from mbf_mlx.methods.inclora import IncLora
from mbf_mlx.methods.state import State
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
        """Return the sum of both terms; None in the first task, as in the public code."""
        if state.t == 0:
            return None
        total: Any = 0.0
        for name, (a, b) in tuned.items():
            total = total + self.options["orthogonal"] * abs(state.deployed[name].a @ a.T).sum()
            if self.options["shrink"]:
                total = total + self.options["shrink"] * (safe_norm(a) + safe_norm(b))
        return total


def safe_norm(x: Array) -> Array:
    """Return the Frobenius norm; its gradient is finite even where x is zero, as B is at the start."""
    return namespace(x).sqrt((x * x).sum() + 1e-12)
