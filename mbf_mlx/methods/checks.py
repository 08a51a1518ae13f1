"""Checks of a method's options and of its layers; each raises one InputError that names the method."""

import math
from collections.abc import Mapping
from typing import Any

from mbf_mlx.errors import InputError
from mbf_mlx.methods.factors import Layers


def check_number(method: str, key: str, value: Any, least: float, most: float = math.inf) -> None:
    """Refuse an option that is not a number in [least, most].

    Raises:
        InputError: it names the method, the option, what is allowed and what was given.
    """
    number = isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
    if not number or not least <= value <= most:
        expected = f"a number of at least {least}" if most == math.inf else f"a number in [{least}, {most}]"
        raise InputError(f"{method}: {key}: expected {expected}, got {value!r}")


def check_choices(method: str, options: Mapping[str, Any], choices: Mapping[str, tuple[str, ...]]) -> None:
    """Refuse options that are not among their choices.

    Raises:
        InputError: it names the method, the option, what is allowed and what was given.
    """
    for key, allowed in choices.items():
        if options[key] not in allowed:
            raise InputError(f"{method}: {key}: expected one of {', '.join(allowed)}, got {options[key]!r}")


def check_sizes(method: str, layers: Layers, least_out: int, least_in: int, why: str) -> None:
    """Refuse layers that are too small for a method, before anything is trained.

    Raises:
        InputError: it names the method, the sizes that it needs, why it needs them, and every layer that is smaller.
    """
    if small := layers_below(layers, least_out, least_in):
        sizes = f"at least {least_out} outputs and {least_in} inputs"
        raise InputError(f"{method}: expected layers with {sizes}, {why}, got\n{small}")


def check_two_pairs(method: str, layers: Layers, rank: int) -> None:
    """Refuse layers with fewer inputs than two pairs have rows of A together.

    Raises:
        InputError: it names the method and every such layer.
    """
    check_sizes(method, layers, rank, 2 * rank, "twice the rank, to merge two updates by their inputs")


def layers_below(layers: Layers, least_out: int, least_in: int) -> str:
    """Return the layers with too few outputs or inputs, one line for each."""
    return "\n".join(f"  {name}: {o} x {i}" for name, (o, i) in layers.items() if o < least_out or i < least_in)
