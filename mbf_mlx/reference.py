"""The shared math on LoRA factors: one code for NumPy, MLX and CuPy arrays.

Shapes: A (rank, in), B (out, rank), delta (out, in); model.py turns MLX's transposed storage. t is a task's place in
its stream, from 1. Every function keeps the namespace and the dtype of the arrays it is given, and imports none of
their libraries. QR and SVD run in float32 or float64; where a library has them on one device only (MLX: the CPU), the
caller makes that device the default, as `backend.linalg_device` does.

Source: Qiao and Mahdavi, "Merge before Forget", arXiv:2512.23017, Algorithm 1; the merge of products is ours.
"""

import math
from typing import Any

Array = Any  # an array of NumPy, MLX or CuPy


def orthogonal_init(a: Array) -> Array:
    """Return the A that starts the next task: an orthonormal basis of the rows of `a`.

    Args:
        a: Tuned A of the last task, (rank, in), float32 or float64.

    Returns:
        (rank, in), in the namespace and dtype of `a`; its rows are orthonormal, and where `a` has full rank, row j has
        a positive inner product with row j of `a`.

    Raises:
        ValueError: rank > in, where no such basis exists.

    Source: Qiao and Mahdavi 2025, arXiv:2512.23017, Eq. 13.
    """
    q, _ = signed_qr(a)
    return q


def signed_qr(a: Array) -> tuple[Array, Array]:
    """Return (Q, R) with a = R @ Q: Q (rank, in) orthonormal rows, R (rank, rank) lower triangular, diagonal >= 0.

    Args:
        a: (rank, in), float32 or float64.

    Raises:
        ValueError: rank > in, or `a` is not a matrix.

    Source: Qiao and Mahdavi 2025, arXiv:2512.23017, Eq. 13, in the orientation of LoRA's A.
    """
    if len(a.shape) != 2 or a.shape[0] > a.shape[1]:
        raise ValueError(f"orthogonal init: expected A of shape (rank, in) with rank <= in, got {tuple(a.shape)}")
    xp = namespace(a)
    q, r = xp.linalg.qr(a.T)
    # QR leaves each column's sign open. Eq. 13 fixes it; a zero counts as +, or a row would vanish.
    flip = xp.diagonal(r) < 0
    return xp.where(flip, -q, q).T, xp.where(flip[:, None], -r, r).T


def merge_weight(t: int) -> float:
    """Return lambda(t) = 1 / sqrt(t), the weight of task t's result; 1 for the first task.

    Raises:
        ValueError: t < 1.

    Source: Qiao and Mahdavi 2025, arXiv:2512.23017, Eq. 14.
    """
    if t < 1:
        raise ValueError(f"merge_weight: tasks count from 1, got {t}")
    return 1.0 / math.sqrt(t)


def merge(merged: Array, tuned: Array, weight: float) -> Array:
    """Return merged + weight * (tuned - merged): one factor, any shape, weight in [0, 1].

    A weight of 1 returns `tuned` itself, so that the merge of one task equals its result to the bit.

    Raises:
        ValueError: the shapes differ, or the weight is outside [0, 1].

    Source: Qiao and Mahdavi 2025, arXiv:2512.23017, Eq. 14.
    """
    if tuple(merged.shape) != tuple(tuned.shape):
        raise ValueError(f"merge: expected two of one shape, got {tuple(merged.shape)} and {tuple(tuned.shape)}")
    weight = _share("merge", weight)
    return tuned if weight == 1 else merged + weight * (tuned - merged)


def merge_products(
    merged_a: Array, merged_b: Array, tuned_a: Array, tuned_b: Array, weight: float, rank: int
) -> tuple[Array, Array]:
    """Return the pair (A, B) whose product is nearest to (1 - weight) merged_B merged_A + weight tuned_B tuned_A.

    Exact in Frobenius norm and without ever forming an (out, in) matrix: with the factors stacked to B (out, 2r) and
    A (2r, in), B = Q_b R_b and A = R_a Q_a, the singular values of the sum are those of the 2r x 2r core R_b R_a.

    Args:
        merged_a, tuned_a: (rank, in), float32 or float64; the two ranks may differ.
        merged_b, tuned_b: (out, rank) of their A.
        weight: Of the tuned pair, in [0, 1].
        rank: Of the result.

    Returns:
        A (rank, in) and B (out, rank), balanced: each singular value's root on either side, signs fixed so that every
        row of A has a non-negative inner product with the row sum of the stacked A's.

    Raises:
        ValueError: shapes that do not belong together, a weight outside [0, 1], or a rank that the sum cannot have.

    Source: ours; the low-rank SVD of a sum of products is standard.
    """
    shapes = [tuple(array.shape) for array in (merged_a, merged_b, tuned_a, tuned_b)]
    (merged_rank, in_dims), (out_dims, _), (tuned_rank, _), _ = shapes
    if shapes != [(merged_rank, in_dims), (out_dims, merged_rank), (tuned_rank, in_dims), (out_dims, tuned_rank)]:
        raise ValueError(f"merge_products: expected two pairs of one layer, got merged A, B, tuned A, B of {shapes}")
    weight = _share("merge_products", weight)
    xp = namespace(merged_a)
    b = xp.concatenate([(1 - weight) * merged_b, weight * tuned_b], axis=1)
    a = xp.concatenate([merged_a, tuned_a], axis=0)
    if not 1 <= rank <= min(a.shape[0], a.shape[1], b.shape[0]):
        raise ValueError(f"merge_products: a sum of B {tuple(b.shape)} @ A {tuple(a.shape)} cannot have rank {rank}")
    q_b, r_b = xp.linalg.qr(b)
    q_a, r_a = xp.linalg.qr(a.T)
    u, s, vt = xp.linalg.svd(r_b @ r_a.T)
    root = xp.sqrt(s[:rank])
    # The core is square where in and out allow it; `rank` rows and columns are all that is kept.
    new_b = (q_b @ u[:, :rank]) * root
    new_a = root[:, None] * (vt[:rank] @ q_a.T)
    # A singular vector's sign is open; without a rule two libraries would start the next task differently.
    sign = xp.where((new_a * a.sum(axis=0)).sum(axis=1) < 0, -1.0, 1.0).astype(new_a.dtype)
    return new_a * sign[:, None], new_b * sign


def delta(a: Array, b: Array, scale: float) -> Array:
    """Return the update of one base weight, scale * B @ A, (out, in), from A (rank, in) and B (out, rank)."""
    if len(a.shape) != 2 or len(b.shape) != 2 or a.shape[0] != b.shape[1]:
        raise ValueError(f"delta: expected A (rank, in) and B (out, rank), got {tuple(a.shape)} and {tuple(b.shape)}")
    return float(scale) * (b @ a)


def namespace(array: Array) -> Any:
    """Return the library that `array` belongs to, as an array namespace with `linalg`."""
    return array.__array_namespace__()


def _share(what: str, weight: float) -> float:
    """Return `weight` as Python's float: a NumPy float64 scalar would turn float32 arrays into float64."""
    if not 0 <= weight <= 1:
        raise ValueError(f"{what}: expected a weight in [0, 1], got {weight}")
    return float(weight)
