"""Continual methods: what each keeps between tasks, how a task starts, what is deployed after it.

One file a method. A method works on factors alone, in the library of the arrays that it is given; it runs no model.
docs/methods.md lists the methods and shows how to write one.
"""

from mbf_mlx.methods.base import MEASURED_ROWS, Inputs, Method, Need, Seen, TokenRow, Tuned, measured_rows
from mbf_mlx.methods.checks import check_choices, check_number
from mbf_mlx.methods.factors import Factors, Layers, Pair, each_layer, in_double
from mbf_mlx.methods.registry import make, names
from mbf_mlx.methods.state import State, empty_state, first_factors, not_finite

__all__ = [
    "MEASURED_ROWS",
    "Factors",
    "Inputs",
    "Layers",
    "Method",
    "Need",
    "Pair",
    "Seen",
    "State",
    "TokenRow",
    "Tuned",
    "check_choices",
    "check_number",
    "each_layer",
    "empty_state",
    "first_factors",
    "in_double",
    "make",
    "measured_rows",
    "names",
    "not_finite",
]
