"""The shared math on LoRA factors: one code for NumPy, MLX and CuPy arrays.

Shapes: A (rank, in), B (out, rank), delta (out, in); engine/lora_layers.py turns MLX's transposed storage. t is a
task's place in its stream, from 1. Every function keeps the namespace and the dtype of the arrays it is given, and
imports none of their libraries. QR and SVD run in float32 or float64; where a library has them on one device only (MLX:
the CPU), the caller makes that device the default, as `mx.stream(mx.cpu)` does.

Source: Qiao and Mahdavi, "Merge before Forget", arXiv:2512.23017, Algorithm 1; the merge of products is ours.
"""

import math
import sys
from collections.abc import Sequence
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


def in_basis(a: Array, b: Array, basis: str) -> tuple[Array, Array]:
    """Return a start made of one pair, A (rank, in) and B (out, rank).

    Args:
        a, b: The pair.
        basis: "qr", an orthonormal basis of A's rows and B as it is, which is another function; "qr-preserving", the
            same with B moved along: a = R Q starts from Q and B R; "balanced", each singular value's root on either
            side, B @ A as it was; "keep", the pair itself.
    """
    if basis == "keep":
        return a, b
    if basis == "balanced":
        return cut_rank(a, b, a.shape[0])
    q, r = signed_qr(a)
    return q, b if basis == "qr" else b @ r


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


def move(a: Array, b: Array, new_a: Array) -> Array:
    """Return the B (out, rank) with which `new_a` comes nearest to the update b @ a, in Frobenius norm.

    Args:
        a, b: A (rank, in) and B (out, rank), float32 or float64.
        new_a: (rank, in); where its rows depend on each other, the shortest such B.
    """
    xp = namespace(a)
    values, vectors = xp.linalg.eigh(new_a @ new_a.T)
    large = values > 1e-6 * values.max()  # the square of what single precision tells from zero, with room
    inverse = xp.where(large, 1 / xp.where(large, values, 1.0), 0.0)
    return b @ (a @ new_a.T) @ ((vectors * inverse) @ vectors.T)


def merge_products(
    merged_a: Array, merged_b: Array, tuned_a: Array, tuned_b: Array, weight: float, rank: int
) -> tuple[Array, Array]:
    """Return the pair (A, B) whose product is nearest to (1 - weight) merged_B merged_A + weight tuned_B tuned_A.

    Args:
        merged_a, tuned_a: (rank, in), float32 or float64; the two ranks may differ.
        merged_b, tuned_b: (out, rank) of their A.
        weight: Of the tuned pair, in [0, 1].
        rank: Of the result.

    Returns:
        What `cut_rank` gives: A (rank, in) and B (out, rank), balanced, nearest in Frobenius norm.

    Raises:
        ValueError: shapes that do not belong together, a weight outside [0, 1], or a rank that the sum cannot have.

    Source: ours.
    """
    weight = _share("merge_products", weight)
    return cut_rank(*stack_pairs([(merged_a, merged_b), (tuned_a, tuned_b)], [1 - weight, weight]), rank)


def stack_pairs(pairs: Sequence[tuple[Array, Array]], weights: Sequence[float] | None = None) -> tuple[Array, Array]:
    """Return the pair whose product is the sum of weight * B @ A over the pairs, exactly; its rank is that of all.

    Args:
        pairs: A (rank, in) and B (out, rank) of one layer, each of a rank of its own.
        weights: One a pair; all 1 by default. They go into B.

    Raises:
        ValueError: pairs of two layers.
    """
    shapes = [(tuple(a.shape), tuple(b.shape)) for a, b in pairs]
    if any(a[0] != b[1] or (a[1], b[0]) != (shapes[0][0][1], shapes[0][1][0]) for a, b in shapes):
        raise ValueError(f"stack_pairs: expected A (rank, in) and B (out, rank) of one layer, got {shapes}")
    xp = namespace(pairs[0][0])
    weights = weights or [1.0] * len(pairs)
    weighted = [b if weight == 1 else float(weight) * b for weight, (_, b) in zip(weights, pairs, strict=True)]
    return xp.concatenate([a for a, _ in pairs], axis=0), xp.concatenate(weighted, axis=1)


def cut_rank(a: Array, b: Array, rank: int) -> tuple[Array, Array]:
    """Return the pair of the given rank whose product is nearest to b @ a in Frobenius norm.

    No (out, in) matrix is formed: with B = Q_b R_b and A = R_a Q_a, the singular values of B A are those of R_b R_a.

    Args:
        a: (k, in), float32 or float64.
        b: (out, k).
        rank: Of the result.

    Returns:
        A (rank, in) and B (out, rank), balanced: each singular value's root on either side, and signs such that every
        row of A has a non-negative inner product with the sum of the rows of `a`.

    Raises:
        ValueError: a rank that b @ a cannot have.
    """
    if not 1 <= rank <= min(a.shape[0], a.shape[1], b.shape[0]):
        raise ValueError(f"cut_rank: B {tuple(b.shape)} @ A {tuple(a.shape)} cannot have rank {rank}")
    xp = namespace(a)
    q_b, r_b = xp.linalg.qr(b)
    q_a, r_a = xp.linalg.qr(a.T)
    u, s, vt = xp.linalg.svd(r_b @ r_a.T)
    root = xp.sqrt(s[:rank])
    new_b = (q_b @ u[:, :rank]) * root
    new_a = root[:, None] * (vt[:rank] @ q_a.T)
    # A singular vector's sign is open; without a rule two libraries would start the next task differently.
    sign = xp.where((new_a * a.sum(axis=0)).sum(axis=1) < 0, -1.0, 1.0).astype(new_a.dtype)
    return new_a * sign[:, None], new_b * sign


def split_delta(matrix: Array, rank: int) -> tuple[Array, Array]:
    """Return the pair (A, B) of the given rank whose product is nearest to an (out, in) matrix, balanced.

    Raises:
        ValueError: a rank that the matrix cannot have.
    """
    if not 1 <= rank <= min(matrix.shape):
        raise ValueError(f"split_delta: a matrix of shape {tuple(matrix.shape)} cannot have rank {rank}")
    xp = namespace(matrix)
    # The thin Q of the longer side first: MLX's SVD gives full bases, which a tall matrix would pay for squared.
    if matrix.shape[0] < matrix.shape[1]:
        a, b = split_delta(matrix.T, rank)
        return b.T, a.T
    q, r = xp.linalg.qr(matrix)
    u, s, vt = xp.linalg.svd(r)
    root = xp.sqrt(s[:rank])
    return root[:, None] * vt[:rank], (q @ u[:, :rank]) * root


def input_basis(merged_a: Array, tuned_a: Array) -> Array:
    """Return orthonormal rows, (2 rank, in): first a basis of merged_A's rows, then of what tuned_A adds to them.

    Raises:
        ValueError: the two have more rows together than columns.
    """
    return signed_qr(namespace(merged_a).concatenate([merged_a, tuned_a], axis=0))[0]


def merge_by_inputs(
    merged: tuple[Array, Array],
    tuned: tuple[Array, Array],
    weight: float,
    rank: int,
    old_gram: Array,
    new_gram: Array,
    ridge: float = 0.1,
) -> tuple[Array, Array, Array]:
    """Return the pair whose outputs are nearest to those of both pairs, each on its own tasks' inputs.

    With x an input of the layer, M = merged_B merged_A, D = tuned_B tuned_A and w the weight, W minimizes
    (1 - w) E_old |(W - M) x|^2 + w E_new |(W - D) x|^2 among all W with rows in the span of both A's rows, and is then
    cut to the rank in the same metric. Where old and new inputs are alike in every direction, W is (1 - w) M + w D as
    in `merge_products`; in a direction that only one side's inputs have, that side decides.

    With Q = input_basis(...), z = Q x, M = X_old Q and D = X_new Q, the minimum before the cut is
    W = ((1 - w) X_old G_old + w X_new G_new) ((1 - w) G_old + w G_new)^-1 Q, G being means of z z^T. A G_old that is
    known in the first `rank` coordinates alone is taken to be as the new inputs' in the others, and unrelated to the
    first. The ridge keeps directions from being decided by inputs that hardly have them.

    Args:
        merged, tuned: A (rank, in) and B (out, rank) each.
        weight: Of the tuned pair, in [0, 1].
        rank: Of the result.
        old_gram: (rank, rank), the mean of z z^T over the old tasks' inputs, z = orthogonal_init(merged A) x; or
            (2 rank, 2 rank), as the new one.
        new_gram: (2 rank, 2 rank), the same over the new task's inputs, z = input_basis(merged A, tuned A) x.
        ridge: Share of the Grams' mean diagonal that is added to the diagonals; a large one leads to `merge_products`.

    Returns:
        A (rank, in), B (out, rank), and the old Gram of the next merge, (rank, rank).

    Raises:
        ValueError: a weight outside [0, 1], a rank that the sum cannot have, or more rows together than columns.

    Source: ours; for one layer with full Grams the closed form is RegMean, Jin et al. 2023, arXiv:2212.09849.
    """
    weight, xp = _share("merge_by_inputs", weight), namespace(merged[0])
    known = merged[0].shape[0]
    q, r = signed_qr(xp.concatenate([merged[0], tuned[0]], axis=0))
    old_gram = _complete(old_gram, new_gram)
    gram = (1 - weight) * old_gram + weight * new_gram
    level = float(ridge) * xp.diagonal(gram).mean() * xp.eye(len(gram), dtype=gram.dtype)
    old, new = old_gram + level, new_gram + level
    values, vectors = xp.linalg.eigh(gram + level)
    inverse_root = (vectors / xp.sqrt(values)) @ vectors.T
    pull = (1 - weight) * (merged[1] @ r[:known] @ old) + weight * (tuned[1] @ r[known:] @ new)
    a, b = cut_rank(xp.eye(len(values), dtype=values.dtype), pull @ inverse_root, rank)
    a = a @ inverse_root
    basis, _ = signed_qr(a)
    return a @ q, b, basis @ gram @ basis.T


def _complete(old: Array, new: Array) -> Array:
    """Return a Gram of new's size that is `old` in its first coordinates and `new` in the others."""
    xp, known = namespace(old), old.shape[0]
    zero = xp.zeros((known, new.shape[0] - known), dtype=new.dtype)
    upper, lower = xp.concatenate([old, zero], axis=1), xp.concatenate([zero.T, new[known:, known:]], axis=1)
    return xp.concatenate([upper, lower], axis=0)


def sketch_gram(moments: Array, directions: Array) -> Array:
    """Return S (k, in) with S^T S near the Gram G that was seen in a few directions P alone.

    S^T S = (P G)^T (P G P^T)^+ (P G), the Nystroem approximation: exact where G's rank is no larger than k.

    Args:
        moments: P G, (k, in), G being the mean of x x^T over inputs x.
        directions: P, (k, in), random.

    Source: Tropp, Yurtsever, Udell and Cevher 2017, arXiv:1706.05736, without their shift: what is too small to be told
    from zero is left out instead.
    """
    xp, core = namespace(moments), moments @ directions.T
    values, vectors = xp.linalg.eigh((core + core.T) / 2)
    large = values > 1e-6 * values.max()  # of what single precision knows
    return (vectors * xp.where(large, 1 / xp.sqrt(xp.where(large, values, 1.0)), 0.0)).T @ moments


def merge_sketches(sketches: Sequence[Array], weights: Sequence[float], count: int) -> Array:
    """Return S (count, in) whose S^T S is nearest to the sum of weight * s^T s, in Frobenius norm.

    Args:
        sketches: Each (k, in), at least `count` rows in all.
        weights: Of each, not negative.
        count: Rows of the result; they are orthogonal, the shortest first.

    Raises:
        ValueError: fewer rows than `count`.
    """
    xp = namespace(sketches[0])
    stacked = xp.concatenate([math.sqrt(w) * s for w, s in zip(weights, sketches, strict=True)], axis=0)
    if stacked.shape[0] < count:
        raise ValueError(f"merge_sketches: expected at least {count} rows in all, got {stacked.shape[0]}")
    _, vectors = xp.linalg.eigh(stacked @ stacked.T)
    return vectors[:, -count:].T @ stacked


def delta(a: Array, b: Array, scale: float) -> Array:
    """Return the update of one base weight, scale * B @ A, (out, in), from A (rank, in) and B (out, rank)."""
    if len(a.shape) != 2 or len(b.shape) != 2 or a.shape[0] != b.shape[1]:
        raise ValueError(f"delta: expected A (rank, in) and B (out, rank), got {tuple(a.shape)} and {tuple(b.shape)}")
    return float(scale) * (b @ a)


def update_norm(a: Array, b: Array) -> Array:
    """Return the Frobenius norm of b @ a, a scalar, through two rank x rank matrices."""
    xp = namespace(a)
    return xp.sqrt(xp.maximum(((b.T @ b) * (a @ a.T)).sum(), 0.0))


def namespace(array: Array) -> Any:
    """Return the library that `array` belongs to, as an array namespace with `linalg`."""
    if hasattr(array, "__array_namespace__"):
        return array.__array_namespace__()
    return sys.modules[type(array).__module__.partition(".")[0]]  # a CuPy that does not know the protocol yet


def _share(what: str, weight: float) -> float:
    """Return `weight` as Python's float: a NumPy float64 scalar would turn float32 arrays into float64."""
    if not 0 <= weight <= 1:
        raise ValueError(f"{what}: expected a weight in [0, 1], got {weight}")
    return float(weight)
