"""The rows of a layer in GGUF: which type keeps what MLX stored, and the bytes of it.

A GGUF block is 32 neighbouring weights of a row. Q4_1 and Q5_1 mean scale * code + offset with codes of 4 and 5 bits,
Q4_0 means scale * (code - 8) and Q8_0 scale * (code - 128) in our codes; scales and offsets are float16. So MLX's
affine layers of up to 5 bits fit without loss: a group of 64 or 128 becomes blocks that repeat its scale.
"""

import gguf
import numpy as np
from gguf import quants

from mbf_mlx.errors import InputError
from mbf_mlx.export.weights.checkpoint import Layer

Type = gguf.GGMLQuantizationType
TYPES = {kind.name: kind for kind in (Type.F32, Type.F16, Type.BF16, Type.Q8_0, Type.Q4_1, Type.Q4_0)}
BITS = {4: Type.Q4_1, 8: Type.Q8_0, 16: Type.F16, 32: Type.F32}  # --bits -> type; 16 may be BF16, too
FLOAT_TYPES = {"F32": Type.F32, "F64": Type.F32, "F16": Type.F16, "BF16": Type.BF16}
FILE_TYPES = {
    Type.F32: gguf.LlamaFileType.ALL_F32,
    Type.F16: gguf.LlamaFileType.MOSTLY_F16,
    Type.BF16: gguf.LlamaFileType.MOSTLY_BF16,
    Type.Q8_0: gguf.LlamaFileType.MOSTLY_Q8_0,
    Type.Q4_0: gguf.LlamaFileType.MOSTLY_Q4_0,
    Type.Q4_1: gguf.LlamaFileType.MOSTLY_Q4_1,
    Type.Q5_1: gguf.LlamaFileType.MOSTLY_Q5_1,
}
BLOCK = 32


def own_type(layer: Layer) -> gguf.GGMLQuantizationType:
    """Return the type that keeps a layer as it is stored; Q8_0 if GGUF has none."""
    setting = layer.setting
    if setting is None:
        return FLOAT_TYPES[layer.dtype]
    if setting.mode != "affine" or setting.bits not in (2, 3, 4, 5, 8) or not _is_half(layer):
        return Type.Q8_0
    if setting.bits == 4 and _is_centred(layer, 8):
        return Type.Q4_0
    return {5: Type.Q5_1, 8: Type.Q8_0}.get(setting.bits, Type.Q4_1)


def keeps(layer: Layer, kind: gguf.GGMLQuantizationType) -> bool:
    """Return whether a type can keep a layer's own codes, so that no new ones have to be found."""
    setting = layer.setting
    if setting is None or kind != own_type(layer):
        return False
    return kind != Type.Q8_0 or (setting.bits == 8 and setting.mode == "affine" and _is_centred(layer, 128))


def fused_type(layer: Layer) -> gguf.GGMLQuantizationType:
    """Return the type of a learned layer: one in which a small update survives.

    A bfloat16 weight becomes float16, which is as large and has three more bits for the update.
    """
    if layer.setting is not None:
        return Type.Q8_0
    return Type.F16 if layer.dtype == "BF16" else FLOAT_TYPES[layer.dtype]


def _is_half(layer: Layer) -> bool:
    """Return whether scales and offsets are in float16's range."""
    assert layer.scales and layer.biases
    largest = max(np.abs(part.floats()).max(initial=0) for part in (layer.scales, layer.biases))
    return bool(largest <= np.finfo(np.float16).max)


def _is_centred(layer: Layer, code: int) -> bool:
    """Return whether a code means 0 in every group."""
    assert layer.scales and layer.biases
    return np.array_equal(layer.biases.floats(), -code * layer.scales.floats())


def fitting(kind: gguf.GGMLQuantizationType, inner: int) -> gguf.GGMLQuantizationType:
    """Return the type, or F16 if a row of `inner` weights is not a whole number of its blocks."""
    return Type.F16 if inner % gguf.GGML_QUANT_SIZES[kind][0] else kind


def row_bytes(kind: gguf.GGMLQuantizationType, inner: int) -> int:
    """Return the bytes of a row of `inner` weights."""
    block, size = gguf.GGML_QUANT_SIZES[kind]
    return int(inner // block * size)


def kept_rows(layer: Layer, kind: gguf.GGMLQuantizationType, first: int, last: int) -> np.ndarray:
    """Return rows of an affine layer with their own codes, (rows, bytes) uint8."""
    return pack_codes(*layer.grid_rows(first, last), kind)


def pack_codes(
    codes: np.ndarray, scales: np.ndarray, offsets: np.ndarray, kind: gguf.GGMLQuantizationType
) -> np.ndarray:
    """Return MLX's codes (rows, in), scales and offsets (rows, groups) as rows of a type, (rows, bytes) uint8."""
    blocks = codes.reshape(len(codes), -1, BLOCK)
    repeat = blocks.shape[1] // scales.shape[1]
    d, m = (np.repeat(part, repeat, axis=1).astype(np.float16)[..., None].view(np.uint8) for part in (scales, offsets))
    if kind == Type.Q8_0:
        parts: list[np.ndarray] = [d, blocks ^ np.uint8(128)]  # code - 128 in two's complement
    else:
        low = blocks[..., :16] & 15 | (blocks[..., 16:] & 15) << 4
        parts = [d, low] if kind == Type.Q4_0 else [d, m, low]
        if kind == Type.Q5_1:
            parts.insert(2, np.packbits(blocks >> 4, axis=-1, bitorder="little"))
    return np.concatenate(parts, axis=-1).reshape(len(codes), -1)


def encode_rows(weight: np.ndarray, kind: gguf.GGMLQuantizationType, name: str) -> np.ndarray:
    """Return rows (rows, in) float32 in a type, each weight rounded to the nearest, (rows, bytes) uint8.

    Raises:
        InputError: weights that are not finite in this type.
    """
    largest = np.abs(weight).max(initial=0)
    if not np.isfinite(weight).all() or (kind not in (Type.F32, Type.BF16) and largest > np.finfo(np.float16).max):
        raise InputError(f"{name}: weights up to {largest} are not finite in {kind.name}; try --bits 16 or 32")
    return np.ascontiguousarray(quants.quantize(np.ascontiguousarray(weight), kind)).view(np.uint8)


def decode_rows(rows: np.ndarray, kind: gguf.GGMLQuantizationType) -> np.ndarray:
    """Return stored rows (rows, bytes) as the float32 weights (rows, in) that llama.cpp decodes."""
    rows = np.ascontiguousarray(rows)
    if kind in (Type.F32, Type.F16):
        return rows.view(np.float32 if kind == Type.F32 else np.float16).astype(np.float32)
    weights: np.ndarray = quants.dequantize(rows, kind)
    return weights
