"""MLX's affine group quantization in NumPy: how codes are packed, what they mean, and the nearest code of a weight.

A group is `group_size` neighbouring weights in a row of W (out, in). It has a scale s and an offset z (MLX calls it a
bias); its weights are s * code + z, with codes from 0 to 2**bits - 1. Codes are packed as little-endian bits without
gaps, 32 bits a word. rounding.py finds the codes that keep a small update best.
"""

import numpy as np

from mbf_mlx.files.dtypes import from_float32, to_float32

BITS = (2, 3, 4, 5, 6, 8)
GROUP_SIZES = (32, 64, 128)


def unpack(words: np.ndarray, bits: int) -> np.ndarray:
    """Return the codes, (out, in) uint8, of packed words (out, in * bits / 32) uint32."""
    raw = np.ascontiguousarray(words).view(np.uint8)
    if bits == 8:
        return raw
    if bits == 4:
        return np.stack([raw & 15, raw >> 4], axis=-1).reshape(len(raw), -1)
    singles = np.unpackbits(raw, axis=-1, bitorder="little").reshape(len(raw), -1, bits)
    padded = np.pad(singles, ((0, 0), (0, 0), (0, 8 - bits)))
    return np.packbits(padded, axis=-1, bitorder="little")[..., 0]


def pack(codes: np.ndarray, bits: int) -> np.ndarray:
    """Return the packed words, (out, in * bits / 32) uint32, of codes (out, in) uint8."""
    if bits == 8:
        return np.ascontiguousarray(codes).view("<u4")
    if bits == 4:
        return np.ascontiguousarray(codes[:, ::2] | (codes[:, 1::2] << 4)).view("<u4")
    singles = np.unpackbits(codes[..., None], axis=-1, bitorder="little")[..., :bits]
    return np.packbits(singles.reshape(len(codes), -1), axis=-1, bitorder="little").view("<u4")


def decode(codes: np.ndarray, scales: np.ndarray, offsets: np.ndarray) -> np.ndarray:
    """Return the weights, (out, in) float32, of codes (out, in) and float32 scales and offsets (out, groups)."""
    grouped = codes.reshape(*scales.shape, -1).astype(np.float32)
    grouped *= scales[..., None]
    grouped += offsets[..., None]
    return grouped.reshape(codes.shape)


def fit(weight: np.ndarray, bits: int, group_size: int, dtype: str) -> tuple[np.ndarray, np.ndarray]:
    """Return scales and offsets, (out, groups), of grids from each group's smallest weight to its largest.

    Args:
        weight: (out, in) float32.
        dtype: The float type that stores them, as safetensors names it. They are returned in float32 but already
            rounded to that type, so that codes chosen afterwards make up for the rounding.
    """
    grouped = weight.reshape(len(weight), -1, group_size)
    low = to_float32(from_float32(grouped.min(axis=-1), dtype), dtype)
    scales = (grouped.max(axis=-1) - low) / (2**bits - 1)
    # A group of equal weights needs any scale but 0; this one keeps code 0 exact and divides safely.
    scales = np.where(scales > 0, scales, np.maximum(np.abs(low), 1) / (2**bits - 1))
    return to_float32(from_float32(scales, dtype), dtype), low


def nearest(weight: np.ndarray, scales: np.ndarray, offsets: np.ndarray, bits: int) -> np.ndarray:
    """Return the codes, (out, in) uint8, nearest to the weights (out, in) on a given grid."""
    grouped = weight.reshape(*scales.shape, -1)
    codes = np.rint((grouped - offsets[..., None]) / scales[..., None])
    kept: np.ndarray = np.clip(codes, 0, 2**bits - 1).astype(np.uint8)
    return kept.reshape(weight.shape)
