"""A base model's folder on disk, read layer by layer without building the model.

A layer is named by its path in the MLX model, which is also how its tensors are named in an MLX folder:
`<layer>.weight`, and `.scales` and `.biases` where it is quantized. Nothing is written here.
"""

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from mbf_mlx.base.sources import read_config
from mbf_mlx.errors import InputError, quoted
from mbf_mlx.export.weights.affine import BITS, GROUP_SIZES, decode, unpack
from mbf_mlx.export.weights.tensors import Stored, read_headers
from mbf_mlx.files.dtypes import FLOATS

FLOAT_MODES = {"mxfp4": (4, 32), "mxfp8": (8, 32), "nvfp4": (4, 16)}  # mode -> its only bits and group size
CHUNK_ELEMENTS = 1 << 23  # of a layer in memory at a time: 32 MB in float32
PARTS = ("weight", "scales", "biases")  # tensors of a layer; a linear layer's own bias is not one of them
COMPUTED = (
    "rotary_emb.inv_freq",
    "rotary_emb.freqs",
)  # in some folders, though config.json suffices; nobody reads them


@dataclass(frozen=True)
class Setting:
    """How a layer is quantized."""

    bits: int
    group_size: int
    mode: str = "affine"

    def __str__(self) -> str:
        return f"{self.bits} bits, group {self.group_size}" + (f", {self.mode}" if self.mode != "affine" else "")


@dataclass(frozen=True)
class Layer:
    """A stored linear layer or embedding."""

    name: str
    setting: Setting | None  # None where it is not quantized
    weight: Stored
    scales: Stored | None = None
    biases: Stored | None = None

    @property
    def shape(self) -> tuple[int, int]:
        """(out, in) of the weight itself, not of its packed words."""
        out, words = self.weight.shape
        return out, words * 32 // self.setting.bits if self.setting else words

    @property
    def dtype(self) -> str:
        """The float type of its scales, or of the weight if it is not quantized; BF16 for scales in 8 bits."""
        stored = self.scales if self.setting and self.scales else self.weight
        return stored.dtype if stored.dtype in FLOATS else "BF16"

    @property
    def nbytes(self) -> int:
        """Bytes of all its tensors in the file, without a linear layer's own bias."""
        return sum(part.nbytes for part in (self.weight, self.scales, self.biases) if part)

    def chunks(self) -> list[tuple[int, int]]:
        """Return ranges of rows, each small enough to be in memory."""
        return row_ranges(self.shape)

    def rows(self, first: int = 0, last: int | None = None) -> np.ndarray:
        """Return rows `first` to `last` of W in float32, (rows, in)."""
        if self.setting is None:
            return self.weight.floats(first, last)
        if self.setting.mode != "affine":
            return self._float_mode_rows(first, last)
        return decode(*self.grid_rows(first, last))

    def grid_rows(self, first: int = 0, last: int | None = None) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Return codes (rows, in) uint8, scales and offsets (rows, groups) float32 of an affine layer's rows."""
        assert self.setting and self.setting.mode == "affine" and self.scales and self.biases
        codes = unpack(self.weight.rows(first, last), self.setting.bits)
        return codes, self.scales.floats(first, last), self.biases.floats(first, last)

    def _float_mode_rows(self, first: int, last: int | None) -> np.ndarray:
        import mlx.core as mx

        assert self.setting and self.scales
        words, scales = mx.array(self.weight.rows(first, last)), mx.array(self.scales.rows(first, last))
        group_size, bits, mode = self.setting.group_size, self.setting.bits, self.setting.mode
        weight = mx.dequantize(words, scales, group_size=group_size, bits=bits, mode=mode, dtype=mx.float32)
        return np.array(weight)


def row_ranges(shape: tuple[int, ...]) -> list[tuple[int, int]]:
    """Return ranges of a tensor's rows, each small enough to be in memory."""
    count, *inner = shape
    step = max(1, CHUNK_ELEMENTS // max(1, math.prod(inner)))
    return [(first, min(first + step, count)) for first in range(0, count, step)]


class Checkpoint:
    """A model folder: its config, its tensors, its layers.

    Args:
        folder: With `config.json` and `model*.safetensors`, the files that mlx-lm reads.

    Raises:
        InputError: no such folder or files, or weights that another tool packed.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.config = read_config(folder)
        self.files = sorted(folder.glob("model*.safetensors"))
        if not self.files:
            raise InputError(f"{folder}: expected weights in model*.safetensors, got none")
        self.tensors, self.metadata = read_headers(self.files)
        self.quantization: dict[str, Any] = self.config.get("quantization") or {}
        foreign = [name for name in self.tensors if name.endswith((".qweight", ".weight_packed", ".global_scale"))]
        if foreign or (not self.quantization and any(name.endswith(".scales") for name in self.tensors)):
            raise InputError(
                f"{folder}: another tool packed its weights; convert it first: "
                f"mlx_lm.convert --model {quoted(folder)} --mlx-path NEW"
            )

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors."""
        return sum(tensor.nbytes for tensor in self.tensors.values())

    def names_in(self, path: Path) -> list[str]:
        """Return the tensors of one weight file, in the order of its bytes."""
        return [name for name, tensor in self.tensors.items() if tensor.file == path]

    def layer_names(self) -> list[str]:
        """Return every layer with a weight of two dimensions, in the order of the files."""
        named = [name.removesuffix(".weight") for name in self.tensors if name.endswith(".weight")]
        return [name for name in named if len(self.tensors[f"{name}.weight"].shape) == 2]

    def other_floats(self) -> list[str]:
        """Return the tensors of floats that are no part of a layer: norms, and linear layers' own biases."""
        layers = {f"{name}.weight" for name in self.layer_names()}
        return [
            name
            for name, tensor in self.tensors.items()
            if name not in layers and tensor.dtype in FLOATS and tensor.shape
            if not name.endswith((".scales", ".biases", *COMPUTED))
        ]

    def layer(self, name: str, inner: int | None = None) -> Layer:
        """Return a layer.

        Args:
            name: Its path in the MLX model.
            inner: Its number of inputs, if the caller knows it; config.json may leave its bits open.

        Raises:
            InputError: no such layer, or its bits cannot be found out.
        """
        weight = self.tensors.get(f"{name}.weight")
        if weight is None or len(weight.shape) != 2:
            raise InputError(
                f"{self.folder}: {name}: no such layer in its files; if mlx-lm renames this architecture's weights, "
                f"convert the model first: mlx_lm.convert --model {self.folder} --mlx-path NEW"
            )
        scales, biases = self.tensors.get(f"{name}.scales"), self.tensors.get(f"{name}.biases")
        if scales is None:
            return Layer(name, None, weight)
        return Layer(name, self._setting(name, weight, scales, inner), weight, scales, biases)

    def _setting(self, name: str, weight: Stored, scales: Stored, inner: int | None) -> Setting:
        words, groups = weight.shape[1], scales.shape[1]
        own = self.quantization.get(name)
        default = own if isinstance(own, dict) else self.quantization
        mode = default.get("mode", "affine")
        stated = Setting(default.get("bits", 4), default.get("group_size", 64), mode)
        if scales.dtype in FLOATS:
            others = [Setting(bits, size) for bits in BITS for size in GROUP_SIZES]
        else:
            others = [Setting(*sizes, mode) for mode, sizes in FLOAT_MODES.items()]
        possible = [
            setting
            for setting in [stated, *others]
            if words * 32 == groups * setting.group_size * setting.bits
            and (setting.mode == "affine") == (scales.dtype in FLOATS)
        ]
        if not possible:
            raise InputError(f"{self.folder}: {name}: its packed shape fits no quantization of MLX's")
        # If several fit, the number of inputs decides. The caller reports a wrong number.
        return next((setting for setting in possible if groups * setting.group_size == inner), possible[0])
