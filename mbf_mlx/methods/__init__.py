"""Continual methods: what each keeps between tasks, how a task starts, what is deployed after it.

A method works on factors alone and in the namespace of the arrays it is given; it runs no model. One file each.
"""

from mbf_mlx.methods.base import (
    Factors,
    Layers,
    Method,
    Pair,
    Row,
    Seen,
    State,
    each_layer,
    empty_state,
    hooks,
    measured_rows,
    not_finite,
)
from mbf_mlx.methods.registry import make, names

__all__ = [
    "Factors",
    "Layers",
    "Method",
    "Pair",
    "Row",
    "Seen",
    "State",
    "each_layer",
    "empty_state",
    "hooks",
    "make",
    "measured_rows",
    "names",
    "not_finite",
]
