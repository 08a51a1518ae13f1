"""LoRA factors: their types, the first draw, and small functions that several methods share.

Shapes: A (rank, in), B (out, rank). A layer is named by its path in the MLX model, "model.layers.0.self_attn.q_proj".
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np

from mbf_mlx.device.threads import side_by_side
from mbf_mlx.reference import Array, namespace, orthogonal_init


class Pair(NamedTuple):
    """The two factors of one layer."""

    a: Array  # (rank, in)
    b: Array  # (out, rank)


Factors = dict[str, Pair]  # layer -> pair
Layers = dict[str, tuple[int, int]]  # layer -> (out, in)
FIRST_A = ("uniform", "orthonormal")  # how the first A may be drawn


def draw_factors(layers: Layers, rank: int, seed: tuple[int, int], first_a: str, zero: str = "b") -> Factors:
    """Return a random factor and a zero factor for every layer, float32.

    NumPy draws them, so that every backend starts from the same numbers.

    Args:
        layers: (out, in) of each layer.
        rank: Rows of A.
        seed: Two numbers that decide the draw.
        first_a: "uniform", in +-1/sqrt(in) as in mlx-lm's LoRA, or "orthonormal", an orthonormal basis of such rows.
        zero: Which factor is zero, "a" or "b". For "a", B is drawn the way A usually is, with (out) in place of (in).
    """
    generator = np.random.default_rng(seed)
    factors = {}
    for name in sorted(layers):  # a stream read from disk may hold its layers in another order, and must draw the same
        out, inner = layers[name]
        dims = inner if zero == "b" else out
        drawn = generator.uniform(-1.0, 1.0, size=(rank, dims)) / np.sqrt(dims)
        if first_a == "orthonormal":
            drawn = orthogonal_init(drawn)
        drawn = drawn.astype(np.float32)
        if zero == "b":
            factors[name] = Pair(drawn, np.zeros((out, rank), dtype=np.float32))
        else:
            factors[name] = Pair(np.zeros((rank, inner), dtype=np.float32), drawn.T.copy())
    return factors


def pad_rank(pair: Pair, rank: int) -> Pair:
    """Return the pair padded with zeros up to `rank`; an adapter has one rank for all layers."""
    missing = rank - pair.a.shape[0]
    if missing == 0:
        return pair
    xp = namespace(pair.a)
    rows = xp.zeros((missing, pair.a.shape[1]), dtype=pair.a.dtype)
    columns = xp.zeros((pair.b.shape[0], missing), dtype=pair.b.dtype)
    return Pair(xp.concatenate([pair.a, rows], axis=0), xp.concatenate([pair.b, columns], axis=1))


def each_layer(function: Callable[[str], Any], factors: Factors) -> dict[str, Any]:
    """Return layer -> function(layer), in the order of `factors`.

    NumPy layers are computed in several threads. MLX layers are not: an MLX stream belongs to one thread.
    """
    numpy = all(isinstance(pair.a, np.ndarray) for pair in factors.values())
    return dict(zip(factors, side_by_side(function, factors) if numpy else map(function, factors)))


def in_double(function: Callable[..., Any], *arrays: Array) -> Any:
    """Return function(*arrays); for NumPy, compute it in float64 and cast the result back to the given dtype.

    So every machine gets the same float32 result to the last bit. Other libraries keep their own precision.
    """
    if not all(isinstance(array, np.ndarray) for array in arrays):
        return function(*arrays)
    results = function(*(array.astype(np.float64) for array in arrays))
    if isinstance(results, tuple):
        return tuple(result.astype(arrays[0].dtype) for result in results)
    return results.astype(arrays[0].dtype)
