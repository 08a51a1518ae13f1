"""Task arithmetic: every task trains from the same start; the changes are added and multiplied by a coefficient c.

Deployed is c times the sum of all tasks' B @ A, cut to the stream's rank after every task (space "delta"), or A0 plus c
times the sum of A - A0, and c times the sum of B (space "factors").

Keeps: one pair, and the tuned one where tasks start from it. Constant in the number of tasks.

Source: Ilharco et al. 2023, arXiv:2212.04089 (coefficient 0.3 to 0.4 for some eight tasks; 1/t is the mean). Its public
code agrees: one coefficient for the plain sum of all vectors. There a vector holds all weights of a fully fine-tuned
model, and the coefficient is chosen on validation rows of all tasks, which a stream does not keep.
"""

from typing import Literal

import numpy as np

from mbf_mlx.methods.task_vectors import TaskVectors
from mbf_mlx.reference import Array


class TaskArithmetic(TaskVectors):
    """The sum of all tasks' vectors.

    Args:
        coefficient: c, a number or "1/t".
        space: "delta" or "factors", as in `task_vectors`.
        start: "first", the same draw for every task, as published; "tuned", the last tuned pair.
        first_a: "uniform" as in LoRA, or "orthonormal".

    Raises:
        InputError: an argument outside its choices.
    """

    name = "task-arithmetic"

    def __init__(
        self,
        coefficient: float | Literal["1/t"] = 0.4,
        space: str = "delta",
        start: str = "first",
        first_a: str = "uniform",
    ) -> None:
        super().__init__(start, space, coefficient, first_a)

    def combine(self, merged: Array, vector: Array, generator: np.random.Generator) -> Array:
        """Return the sum."""
        return merged + vector
