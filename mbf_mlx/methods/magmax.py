"""MagMax: tasks train one after the other; of every entry the largest change that any task made is kept.

Each entry of the combined vector is that of the task where it is largest in absolute value; of equal ones the later. It
is deployed with a coefficient below 1. A maximum needs no more than the largest so far, so it streams: exactly in the
space "factors", in "delta" up to the cut.

Keeps: two pairs (combined and tuned). Constant in the number of tasks.

Source: Marczak et al. 2024, arXiv:2407.06322, and its public code (coefficient 0.5, the later of two equal entries).
There the entries are those of all weights of a fully fine-tuned model, and all task vectors are kept until the end.
"""

import numpy as np

from mbf_mlx.methods.task_vectors import TaskVectors
from mbf_mlx.reference import Array, namespace


class MagMax(TaskVectors):
    """Largest magnitude of every entry.

    Args:
        coefficient: Of the combined vector when deployed.
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
        """Return of every entry the one with the larger magnitude."""
        return namespace(vector).where(abs(vector) >= abs(merged), vector, merged)
