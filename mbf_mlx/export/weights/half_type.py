"""Chooses the 16-bit type of an export by measuring both: float16 is finer, bfloat16 holds any size.

W (out, in) is a base weight and delta = scale * B @ A its update. The error of an update in a type is the length of
what is rounded off W + delta, divided by the length of delta; the mean over the layers that have one.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from math import inf, isfinite, sqrt
from typing import Any

import numpy as np

from mbf_mlx.export.weights.checkpoint import Checkpoint, Layer, row_ranges
from mbf_mlx.export.weights.fuse import DeltaRows, delta_rows, find_layers
from mbf_mlx.files.dtypes import CONFIG_NAMES, from_float32, to_float32
from mbf_mlx.methods import Factors

FLOAT16, BFLOAT16 = "F16", "BF16"
# What rounding to float16 takes from a number at most, as a share of it. A tensor that loses more has many numbers
# below 6e-5, where float16 has fewer and fewer digits.
UNIT_ROUNDOFF = 2.0**-11


@dataclass(frozen=True)
class HalfType:
    """The type that an export of 16 bits is stored in, and what was measured."""

    dtype: str  # "F16" or "BF16"
    errors: dict[str, float]  # type -> error of the update in it; a type that does not fit the model is left out
    why_not_float16: str = ""  # a sentence without its first letter large; "" where float16 was taken

    def instead(self, lost: str) -> "HalfType":
        """Return bfloat16 in place of float16, whose export lost too much."""
        return replace(self, dtype=BFLOAT16, why_not_float16=f"the export in float16 was refused, because {lost}")

    def document(self) -> dict[str, Any]:
        """Return plain values for the export's document; the types are called as config.json calls them."""
        errors = {CONFIG_NAMES[dtype]: error for dtype, error in self.errors.items()}
        return {"chosen": CONFIG_NAMES[self.dtype], "errors": errors, "why_not_float16": self.why_not_float16 or None}


def choose_half_type(
    base: Checkpoint, factors: Factors, scale: float, count: Callable[[int], None] = lambda nbytes: None
) -> HalfType:
    """Return float16 if it holds every number of the model and keeps more of the update than bfloat16, else bfloat16.

    Args:
        base: The model.
        factors: The deployed pair of every layer.
        scale: delta = scale * B @ A.
        count: Called with the bytes of the base's tensors that are done.

    Raises:
        InputError: the adapter does not fit the base.
    """
    errors: dict[str, list[float]] = {FLOAT16: [], BFLOAT16: []}
    unfit = ""
    for tensor in _tensors(base, factors, scale):
        if not unfit:
            length, lost = tensor.rounded_off(FLOAT16)
            unfit = _unfit(tensor, length, lost)
            if tensor.update:
                errors[FLOAT16].append(lost / tensor.update)
        if tensor.update:
            errors[BFLOAT16].append(tensor.rounded_off(BFLOAT16)[1] / tensor.update)
        count(tensor.nbytes)
    means = {dtype: float(np.mean(each)) if each else 0.0 for dtype, each in errors.items()}
    if unfit:
        return HalfType(BFLOAT16, {BFLOAT16: means[BFLOAT16]}, unfit)
    if means[FLOAT16] < means[BFLOAT16] or (not errors[BFLOAT16] and not _is_bfloat16(base)):
        return HalfType(FLOAT16, means)
    return HalfType(BFLOAT16, means, "float16 keeps no more of the update")


def _is_bfloat16(base: Checkpoint) -> bool:
    """Return whether bfloat16 holds every weight exactly, so that a model without an update stays as it is."""
    return {base.tensors[f"{name}.weight"].dtype for name in base.layer_names()} == {BFLOAT16}


@dataclass(frozen=True)
class _Tensor:
    """The numbers that an export should hold in one tensor."""

    name: str
    shape: tuple[int, ...]
    nbytes: int  # of the base's tensors that it is made of
    rows: Callable[[int, int], np.ndarray]  # (first, last) -> rows of W + delta in float32
    update: float = 0.0  # |delta|

    def rounded_off(self, dtype: str) -> tuple[float, float]:
        """Return the length of all numbers, and that of what rounding takes from them; inf if one does not fit."""
        total = lost = 0.0
        for first, last in row_ranges(self.shape):
            meant = self.rows(first, last)
            with np.errstate(over="ignore", invalid="ignore"):
                stored = to_float32(from_float32(meant, dtype), dtype)
                total, lost = total + _square(meant), lost + _square(stored - meant)
        return sqrt(total), sqrt(lost) if isfinite(lost) else inf

    def largest(self) -> float:
        """Return the largest size of a number."""
        return max(float(np.abs(self.rows(*each)).max(initial=0)) for each in row_ranges(self.shape))


def _square(numbers: np.ndarray) -> float:
    flat = numbers.ravel()
    return float(np.einsum("i,i->", flat, flat, dtype=np.float64))


def _unfit(tensor: _Tensor, length: float, lost: float) -> str:
    """Return why float16 cannot hold a tensor; "" if it can."""
    if lost == inf:
        return f"float16 ends at {np.finfo(np.float16).max:,.0f}, and {tensor.name} goes up to {tensor.largest():.2g}"
    if lost > UNIT_ROUNDOFF * length and lost >= tensor.rounded_off(BFLOAT16)[1]:
        return f"the numbers of {tensor.name} are so small that float16 would lose {lost / length:.2g} of them"
    return ""


def _fused_rows(layer: Layer, delta: DeltaRows, first: int, last: int) -> np.ndarray:
    return layer.rows(first, last) + delta(first, last)


def _tensors(base: Checkpoint, factors: Factors, scale: float) -> Iterator[_Tensor]:
    """Yield every tensor of the model as an export should hold it."""
    touched = find_layers(base, factors)
    for name in base.layer_names():
        layer = touched.get(name) or base.layer(name)
        pair = factors.get(name)
        if pair is None or not np.any(pair.b):
            yield _Tensor(f"{name}.weight", layer.shape, layer.nbytes, layer.rows)
            continue
        delta = partial(delta_rows, pair, scale)
        update = sqrt(sum(_square(delta(*each)) for each in layer.chunks()))
        yield _Tensor(
            f"{name}.weight",
            layer.shape,
            layer.nbytes,
            partial(_fused_rows, layer, delta),
            update,
        )
    for name in base.other_floats():
        stored = base.tensors[name]
        yield _Tensor(name, stored.shape, stored.nbytes, stored.floats)
