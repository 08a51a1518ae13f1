"""MagMax: tasks train one after the other; for every entry, the largest change that any task made is kept.

Each entry of the combined vector comes from the task where it is largest in absolute value; of equal ones, from the
later task. The vector is deployed with a coefficient below 1. A maximum needs only the largest value so far, so
nothing else is kept: the result is exact in the space "factors", and exact up to the cut in "delta".

Keeps: two pairs (combined and tuned). Constant in the number of tasks.

Source: Marczak et al. 2024, arXiv:2407.06322, and its public code (coefficient 0.5, the later of two equal entries).
There the entries are those of all weights of a fully fine-tuned model, and all task vectors are kept until the end.
"""

import numpy as np

from mbf_mlx.methods.task_vectors import TaskVectors
from mbf_mlx.reference import Array, namespace


class MagMax(TaskVectors):
    """The largest magnitude of every entry.

    Args:
        coefficient: What the combined vector is multiplied by when it is deployed.
        space: "factors" or "delta", as in `task_vectors`.
        start: "tuned", the last tuned pair, as published; "first", the first draw for every task.
        first_a: "uniform" as in LoRA, or "orthonormal".

    Raises:
        InputError: an argument outside its choices.
    """

    name = "magmax"

    def __init__(
        self, coefficient: float = 0.5, space: str = "factors", start: str = "tuned", first_a: str = "uniform"
    ) -> None:
        super().__init__(start, space, coefficient, first_a)

    def combine(self, merged: Array, vector: Array, generator: np.random.Generator) -> Array:
        """Return, for every entry, the value with the larger magnitude."""
        return namespace(vector).where(abs(vector) >= abs(merged), vector, merged)
