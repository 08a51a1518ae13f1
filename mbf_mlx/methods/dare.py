"""DARE: most entries of each task's change are dropped at random; the rest is enlarged to make up for it, then added.

Each entry is dropped with probability p and otherwise divided by 1 - p, so its expectation stays the same. Sparse
vectors disturb each other less. The stream's seed, the task's number and the layer decide what is dropped.

Keeps: one pair, and the tuned one where tasks start from it. Constant in the number of tasks.

Source: Yu et al. 2024, arXiv:2311.03099 (p of 0.9 and more for full fine-tuning), with task arithmetic as the merge.
Its public code agrees: each entry is dropped on its own, and kept ones are divided by 1 - p. There the entries are all
weights of a fully fine-tuned model, merged at once; here the sum grows task by task, which gives the same sum.
"""

from typing import Literal

import numpy as np

from mbf_mlx.errors import InputError
from mbf_mlx.methods.checks import check_number
from mbf_mlx.methods.task_vectors import TaskVectors
from mbf_mlx.reference import Array, namespace


class Dare(TaskVectors):
    """Drop and rescale, then the sum.

    Args:
        drop: p, the probability that an entry is dropped, in [0, 1).
        coefficient: What the sum is multiplied by when it is deployed: a number, or "1/t" for the mean.
        space: "factors" or "delta", as in `task_vectors`.
        start: "first", the same draw for every task, as published; "tuned", the last tuned pair.
        first_a: "uniform" as in LoRA, or "orthonormal".

    Raises:
        InputError: an argument outside its choices.
    """

    name = "dare"

    def __init__(
        self,
        drop: float = 0.9,
        coefficient: float | Literal["1/t"] = "1/t",
        space: str = "factors",
        start: str = "first",
        first_a: str = "uniform",
    ) -> None:
        super().__init__(start, space, coefficient, first_a, drop=drop)
        check_number(self.name, "drop", drop, 0, 1)
        if drop == 1:
            raise InputError("dare: drop: expected a number below 1, or nothing is left")

    def combine(self, merged: Array, vector: Array, generator: np.random.Generator) -> Array:
        """Return the sum of the earlier tasks' vectors and of what is left of the newest, enlarged."""
        drop = self.options["drop"]
        left = namespace(vector).asarray(generator.random(vector.shape) >= drop).astype(vector.dtype)
        return merged + vector * left / (1 - drop)
