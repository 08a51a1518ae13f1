"""Frozen A: a random A is drawn once for all tasks; only B trains and is merged (the paper's FREA-MB).

With one A for all tasks, merging B is exactly merging products, and an old B always meets the A that it was tuned with.
The cost: B sees the input in `rank` random directions only.

Keeps: one A and two B (merged and tuned), one A and one B where nothing is merged. Constant in the number of tasks.

Source: Qiao and Mahdavi 2025, arXiv:2512.23017, ablations; Zhang et al. 2023, LoRA-FA, arXiv:2308.03303, for one task.
"""

from mbf_mlx.methods.checks import check_choices
from mbf_mlx.methods.slao import Slao


class FrozenA(Slao):
    """`slao` in which only B trains.

    Args:
        first_a: How A is drawn: "orthonormal", or "uniform" as in LoRA.
        merged: "b", or "none", which deploys the tuned B.
        weight: As in `slao`.

    Raises:
        InputError: an argument outside its choices.
    """

    name = "frozen-a"

    def __init__(self, first_a: str = "orthonormal", merged: str = "b", weight: str | float = "1/sqrt(t)") -> None:
        check_choices(self.name, {"merged": merged}, {"merged": ("b", "none")})
        super().__init__(start_a="keep", first_a=first_a, merged=merged, weight=weight, train="b")
        self.options = {"first_a": first_a, "merged": merged, "weight": weight}
