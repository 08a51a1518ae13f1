"""Adds a learned delta to a base weight in float32, stores the sum once, and measures how much survived.

W (out, in) is the base weight as stored, delta = scale * B @ A the intended change, R the real change: the stored sum
minus W. Retention is <R, delta> / <delta, delta>, 1 if nothing was lost; error is |R - delta| / |delta|. The functions
work on some rows of one layer at a time. The targets write files and configs.
"""

import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np

from mbf_mlx.errors import InputError
from mbf_mlx.export.weights import affine
from mbf_mlx.export.weights.checkpoint import Checkpoint, Layer, Setting
from mbf_mlx.export.weights.rounding import Rounder, by_chance
from mbf_mlx.export.weights.tensors import Tensor
from mbf_mlx.files.dtypes import from_float32, to_float32
from mbf_mlx.methods import Factors, Pair

SAFE_BITS = 8  # an update of 1 % of the weights keeps .99 of itself at 8 bits and .15 at 4
# An update with less retention, or with more error, counts as lost. Random rounding has full retention, but its noise
# may be larger than the update.
MIN_RETENTION, MAX_ERROR = 0.8, 1.0
GROUP_SIZE = 64  # of a layer that gets more bits; 8 bits need no smaller groups


@dataclass(frozen=True)
class Fused:
    """The result for one layer with factors."""

    name: str
    before: str  # "4 bits, group 64" or a float type
    after: str
    bytes_before: int
    bytes_after: int
    size: float  # |delta| / |W|
    retention: float
    error: float


class Survival:
    """Adds up a layer's retention and error over its rows."""

    def __init__(self) -> None:
        self._weight = self._delta = self._kept = self._lost = 0.0

    def add(self, weight: np.ndarray, delta: np.ndarray, stored: np.ndarray) -> None:
        """Count rows of W, delta and the stored sum, each (rows, in) float32."""
        realised = stored - weight
        self._weight += _dot(weight, weight)
        self._delta += _dot(delta, delta)
        self._kept += _dot(realised, delta)
        self._lost += _dot(realised - delta, realised - delta)

    @property
    def size(self) -> float:
        """|delta| / |W|."""
        return float(np.sqrt(self._delta / self._weight)) if self._weight else 0.0

    @property
    def retention(self) -> float:
        """<R, delta> / <delta, delta>; 1 where delta is zero."""
        return self._kept / self._delta if self._delta else 1.0

    @property
    def error(self) -> float:
        """|R - delta| / |delta|; 0 where delta is zero."""
        return float(np.sqrt(self._lost / self._delta)) if self._delta else 0.0


def _dot(a: np.ndarray, b: np.ndarray) -> float:
    return float(np.einsum("ij,ij->", a, b, dtype=np.float64))


def find_layers(base: Checkpoint, factors: Factors) -> dict[str, Layer]:
    """Return the base's layers that have factors.

    Raises:
        InputError: names every layer that the base lacks or has in another shape.
    """
    layers, wrong = {}, []
    for name, pair in factors.items():
        (rank, inner), (out, rank_b) = pair.a.shape, pair.b.shape
        if f"{name}.weight" not in base.tensors:
            wrong.append(f"  {name}: not in the base's files")
            continue
        layers[name] = base.layer(name, inner)
        if layers[name].shape != (out, inner) or rank != rank_b:
            wrong.append(f"  {name}: expected {layers[name].shape}, got A {pair.a.shape} and B {pair.b.shape}")
    if wrong:
        raise InputError(
            f"the adapter does not fit {base.folder}:\n" + "\n".join(wrong) + "\nhint: was it trained on another base, "
            "or does mlx-lm rename this architecture's weights (then convert the base first: mlx_lm.convert)?"
        )
    return layers


def delta_rows(pair: Pair, scale: float, first: int = 0, last: int | None = None) -> np.ndarray:
    """Return rows `first` to `last` of scale * B @ A, (rows, in) float32."""
    return np.float32(scale) * (np.asarray(pair.b[first:last], np.float32) @ np.asarray(pair.a, np.float32))


@dataclass(frozen=True)
class Form:
    """The form in which a layer is stored: quantized, or in a float type."""

    setting: Setting | None
    dtype: str  # of the weight, or of the scales and offsets if it is quantized

    def __str__(self) -> str:
        return str(self.setting) if self.setting else self.dtype

    def tensors(self, layer: Layer) -> dict[str, Tensor]:
        """Return the layer's tensors in this form, by name."""
        out, inner = layer.shape
        if self.setting is None:
            return {f"{layer.name}.weight": Tensor(self.dtype, (out, inner))}
        groups = Tensor(self.dtype, (out, inner // self.setting.group_size))
        words = Tensor("U32", (out, inner * self.setting.bits // 32))
        return {f"{layer.name}.weight": words, f"{layer.name}.scales": groups, f"{layer.name}.biases": groups}


def touched_form(layer: Layer, bits: int | None) -> Form:
    """Return the form of a layer with factors in the export.

    A layer that the base does not quantize keeps its type. No layer gets fewer bits than it has.

    Args:
        layer: As the base stores it.
        bits: 2 to 8; None is 8, at which a small update survives plain rounding.
    """
    own = layer.setting
    if own is None:
        return Form(None, layer.dtype)
    bits = max(bits or SAFE_BITS, own.bits)
    if own.mode == "affine" and own.bits == bits:
        return Form(own, layer.dtype)
    sizes = [size for size in (GROUP_SIZE, 32, 128) if layer.shape[1] % size == 0]
    return Form(Setting(bits, sizes[0]), layer.dtype)


Rows = tuple[int, dict[str, np.ndarray]]  # first row, and the rows of each tensor as NumPy holds them
DeltaRows = Callable[[int, int], np.ndarray]  # (first, last) -> rows of the delta


def store(
    layer: Layer, form: Form, delta: DeltaRows | None, survival: Survival, rounder: Rounder | None = None
) -> Iterator[Rows]:
    """Yield a layer's rows in a form, some at a time, with its delta added.

    Args:
        layer: A layer of the base.
        form: The form to store it in.
        delta: Gives rows of the delta; None for a layer without factors.
        survival: Counts the rows as they pass.
        rounder: Rounds for the layer's inputs where the layer keeps few bits; None rounds at random.

    Raises:
        InputError: a sum is not finite in the type it is stored in.
    """
    for first, last in layer.chunks():
        weight = layer.rows(first, last)
        change = delta(first, last) if delta else None
        if change is not None and keeps_grid(layer, form):
            tensors, stored = _round_on_grid(layer, form, weight + change, (first, last), rounder)
        else:
            tensors, stored = round_rows(layer.name, weight if change is None else weight + change, form)
        if not np.isfinite(stored).all():
            raise InputError(f"{layer.name}: the fused weights are not finite in {form}; try --bits 32")
        if change is not None:
            survival.add(weight, change, stored)
        yield first, tensors


def keeps_grid(layer: Layer, form: Form) -> bool:
    """Return whether a layer stays on the base's own grid, with too few bits for plain rounding to keep an update."""
    own = layer.setting
    return own is not None and own == form.setting and own.mode == "affine" and own.bits < SAFE_BITS


def _round_on_grid(
    layer: Layer, form: Form, target: np.ndarray, rows: tuple[int, int], rounder: Rounder | None
) -> tuple[dict[str, np.ndarray], np.ndarray]:
    """Return what `round_rows` does, but on the base's own grid, so that only the update moves a weight."""
    codes, scales, offsets = codes_on_grid(layer, target, rows, rounder)
    return pack_rows(layer.name, codes, scales, offsets, form), affine.decode(codes, scales, offsets)


def codes_on_grid(
    layer: Layer, target: np.ndarray, rows: tuple[int, int], rounder: Rounder | None
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return codes for the target weights on the grid of the rows `rows`, and that grid: scales and offsets."""
    assert layer.setting
    _, scales, offsets = layer.grid_rows(*rows)
    if rounder is None:
        codes = by_chance(target, (scales, offsets), layer.setting.bits, [zlib.crc32(layer.name.encode()), rows[0]])
    else:
        codes = rounder(target, (scales, offsets), layer.setting.bits)
    return codes, scales, offsets


def round_rows(name: str, weight: np.ndarray, form: Form) -> tuple[dict[str, np.ndarray], np.ndarray]:
    """Return a layer's rows (rows, in) float32 as the nearest tensors of a form, and the weights that these mean."""
    if form.setting is None:
        rounded = from_float32(weight, form.dtype)
        return {f"{name}.weight": rounded}, to_float32(rounded, form.dtype)
    scales, offsets = affine.fit(weight, form.setting.bits, form.setting.group_size, form.dtype)
    codes = affine.nearest(weight, scales, offsets, form.setting.bits)
    return pack_rows(name, codes, scales, offsets, form), affine.decode(codes, scales, offsets)


def pack_rows(
    name: str, codes: np.ndarray, scales: np.ndarray, offsets: np.ndarray, form: Form
) -> dict[str, np.ndarray]:
    """Return codes (rows, in), scales and offsets (rows, groups) as the tensors of a quantized form."""
    assert form.setting
    return {
        f"{name}.weight": affine.pack(codes, form.setting.bits),
        f"{name}.scales": from_float32(scales, form.dtype),
        f"{name}.biases": from_float32(offsets, form.dtype),
    }
