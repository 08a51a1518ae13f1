"""Affine codes of 4 and 8 bits as float32, in NumPy: what `mx.dequantize` computes on a CPU, in less time.

mlx makes several arrays of the weight's size on the way. Here a few rows at a time are computed where they will lie,
and stay in a core's cache meanwhile. Every number is the same to the bit: a code times its scale, rounded to float32,
plus its offset (mlx calls it a bias), rounded again.
"""

import mlx.core as mx
import numpy as np

BITS = (4, 8)  # codes that do not cross the bounds of a byte
_PIECE = 2**16  # weights at a time: 256 kB of float32
_PAIRS = np.stack(np.meshgrid(np.arange(16), np.arange(16))[:2], axis=-1).astype(np.float32)  # [high][low]: low, high


def decode(words: mx.array, scales: mx.array, offsets: mx.array, bits: int) -> mx.array:
    """Return the weights, (out, in) float32, evaluated.

    Args:
        words: Packed codes, (out, in * bits / 32) uint32.
        scales, offsets: Of each group of weights, (out, groups) float32.
        bits: Of a code, one of BITS.

    Raises:
        ValueError: other bits.
    """
    if bits not in BITS:
        raise ValueError(f"decode: expected bits of {BITS}, got {bits}")
    weights = mx.zeros((words.shape[0], words.shape[1] * 32 // bits))
    mx.eval(weights, words, scales, offsets)
    out, codes, s, z = (np.asarray(each) for each in (weights, words, scales, offsets))
    codes, pairs = codes.view(np.uint8), _PAIRS.reshape(256, 2).view(np.float64)[:, 0]  # a float64 is two weights
    rows = max(1, _PIECE // out.shape[1])
    for first in range(0, len(out), rows):
        here = slice(first, first + rows)
        if bits == 4:
            np.take(pairs, codes[here], out=out[here].view(np.float64), mode="clip")
        else:
            out[here] = codes[here]
        grouped = out[here].reshape(*s[here].shape, -1)
        grouped *= s[here, :, None]
        grouped += z[here, :, None]
    return weights
