"""The shared math against hand-worked matrices, golden values, a dense computation, and its own properties."""

import math

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from mbf_mlx import reference
from tests import arrays
from tests.arrays import DOUBLE, GOLDEN, SINGLE, single, to_numpy

GOLDEN_TASKS = [
    pytest.param(case, i, id=f"rank{case['rank']}-task{i + 1}") for case in GOLDEN for i in range(1, len(case["tasks"]))
]
xp = arrays.xp


def random_pair(generator, rank, in_dims, out_dims):
    return generator.normal(size=(rank, in_dims)), generator.normal(size=(out_dims, rank))


# --- the start of a task -------------------------------------------------------------------------------------------


def test_start_of_a_2x2_worked_by_hand(xp):
    # Gram-Schmidt: (3, 4) / 5; then (1, 2) - 11/25 (3, 4) = (-8, 6) / 25, of length 2/5, so (-4, 3) / 5.
    a = single(xp, [[3.0, 4.0], [1.0, 2.0]])
    np.testing.assert_allclose(to_numpy(reference.orthogonal_init(a)), [[0.6, 0.8], [-0.8, 0.6]], **SINGLE)


def test_start_of_a_2x2_with_a_negative_direction_keeps_its_sign(xp):
    # The second row turns by -90 degrees from the first; its own sign is kept, not the one that a rotation would give.
    a = single(xp, [[0.0, -2.0], [-3.0, 1.0]])
    np.testing.assert_allclose(to_numpy(reference.orthogonal_init(a)), [[0.0, -1.0], [-1.0, 0.0]], **SINGLE)


def test_signed_qr_of_a_2x2_worked_by_hand(xp):
    q, r = reference.signed_qr(single(xp, [[3.0, 4.0], [1.0, 2.0]]))
    np.testing.assert_allclose(to_numpy(q), [[0.6, 0.8], [-0.8, 0.6]], **SINGLE)
    np.testing.assert_allclose(to_numpy(r), [[5.0, 0.0], [2.2, 0.4]], **SINGLE)


@pytest.mark.parametrize(("case", "i"), GOLDEN_TASKS)
def test_start_equals_the_golden_values_in_double_precision(case, i):
    start = reference.orthogonal_init(np.array(case["tasks"][i - 1]["tuned_A"]))
    np.testing.assert_allclose(start, case["tasks"][i]["start_A"], **DOUBLE)


@pytest.mark.parametrize(("case", "i"), GOLDEN_TASKS)
def test_start_equals_the_golden_values_in_single_precision(xp, case, i):
    start = reference.orthogonal_init(single(xp, case["tasks"][i - 1]["tuned_A"]))
    np.testing.assert_allclose(to_numpy(start), case["tasks"][i]["start_A"], **SINGLE)


@pytest.mark.parametrize("shape", [(3, 2), (9, 8)])
def test_rank_larger_than_in_is_refused(xp, shape):
    with pytest.raises(ValueError, match=rf"expected A of shape \(rank, in\) with rank <= in, got \({shape[0]}, "):
        reference.orthogonal_init(single(xp, np.ones(shape)))


def test_a_vector_is_refused():
    with pytest.raises(ValueError, match=r"expected A of shape \(rank, in\)"):
        reference.orthogonal_init(np.ones(3))


def test_square_a_is_allowed(xp):
    q = to_numpy(reference.orthogonal_init(single(xp, np.random.default_rng(0).normal(size=(4, 4)))))
    np.testing.assert_allclose(q @ q.T, np.eye(4), **SINGLE)


def test_all_zero_a_keeps_unit_rows(xp):
    q = to_numpy(reference.orthogonal_init(single(xp, np.zeros((3, 5)))))
    np.testing.assert_allclose(q @ q.T, np.eye(3), **SINGLE)


@pytest.mark.parametrize("size", [1e-30, 1e-15, 1e15])
def test_tiny_and_huge_a_start_like_a_of_size_one(xp, size):
    a = np.random.default_rng(1).normal(size=(4, 10))
    start = to_numpy(reference.orthogonal_init(single(xp, a * size)))
    np.testing.assert_allclose(start, reference.orthogonal_init(a), **SINGLE)


def test_rank_deficient_a_still_gives_orthonormal_rows_that_span_it(xp):
    a = np.random.default_rng(2).normal(size=(4, 10))
    a[2] = a[0]
    a[3] = 0
    q = to_numpy(reference.orthogonal_init(single(xp, a))).astype(np.float64)
    np.testing.assert_allclose(q @ q.T, np.eye(4), **SINGLE)
    np.testing.assert_allclose((a @ q.T) @ q, a, **SINGLE)


@st.composite
def matrices(draw):
    """A of full rank: (rank, in) with rank <= in, of any size between 1e-6 and 1e6."""
    rank = draw(st.integers(1, 8))
    in_dims = draw(st.integers(rank, 24))
    generator = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    a = generator.normal(size=(rank, in_dims)) * 10.0 ** draw(st.integers(-6, 6))
    singular = np.linalg.svd(a, compute_uv=False)
    assume(singular[-1] > 0.01 * singular[0])  # single precision loses two digits at most
    return a


@settings(max_examples=60, deadline=None)
@given(a=matrices())
def test_start_is_an_orthonormal_basis_of_the_same_rows_with_the_same_signs(xp, a):
    q = to_numpy(reference.orthogonal_init(single(xp, a))).astype(np.float64)
    np.testing.assert_allclose(q @ q.T, np.eye(len(a)), atol=1e-5)
    assert np.linalg.norm((a @ q.T) @ q - a) <= 1e-5 * np.linalg.norm(a)
    assert np.all(np.sum(q * a, axis=1) > 0)


@settings(max_examples=60, deadline=None)
@given(a=matrices())
def test_signed_qr_gives_a_back_and_is_lower_triangular(xp, a):
    q, r = (to_numpy(x).astype(np.float64) for x in reference.signed_qr(single(xp, a)))
    assert np.linalg.norm(r @ q - a) <= 1e-5 * np.linalg.norm(a)
    assert np.all(np.triu(r, 1) == 0)
    assert np.all(np.diagonal(r) > 0)


@settings(max_examples=60, deadline=None)
@given(a=matrices())
def test_an_orthonormal_start_is_its_own_start(xp, a):
    q = reference.orthogonal_init(single(xp, a))
    np.testing.assert_allclose(to_numpy(reference.orthogonal_init(q)), to_numpy(q), atol=1e-5)


# --- the merge of one factor -----------------------------------------------------------------------------------------


def test_merge_weight_is_one_over_the_root_of_t():
    assert [reference.merge_weight(t) for t in (1, 4, 9, 100)] == [1.0, 0.5, pytest.approx(1 / 3), 0.1]


def test_merge_weight_counts_tasks_from_one():
    with pytest.raises(ValueError, match="tasks count from 1, got 0"):
        reference.merge_weight(0)


def test_merge_of_a_2x2_worked_by_hand(xp):
    merged, tuned = single(xp, [[1.0, 2.0], [3.0, 4.0]]), single(xp, [[5.0, 2.0], [-1.0, 0.0]])
    np.testing.assert_allclose(to_numpy(reference.merge(merged, tuned, 0.25)), [[2.0, 2.0], [2.0, 3.0]], **SINGLE)


def test_merge_refuses_two_shapes_and_weights_that_are_no_share():
    with pytest.raises(ValueError, match=r"expected two of one shape, got \(2, 3\) and \(3, 2\)"):
        reference.merge(np.ones((2, 3)), np.ones((3, 2)), 0.5)
    for weight in (-0.1, 1.5, math.nan):
        with pytest.raises(ValueError, match=r"expected a weight in \[0, 1\]"):
            reference.merge(np.ones(2), np.ones(2), weight)


def test_merged_of_one_task_is_the_tuned_factor_to_the_bit(xp):
    tuned = single(xp, np.random.default_rng(3).normal(size=(5, 2)))
    merged = single(xp, np.full((5, 2), 1e30))
    assert np.array_equal(to_numpy(reference.merge(merged, tuned, reference.merge_weight(1))), to_numpy(tuned))


@pytest.mark.parametrize("case", GOLDEN, ids=lambda case: f"rank{case['rank']}")
def test_chain_of_merges_equals_the_golden_values_in_double_precision(case):
    check_chain(case, np.array, DOUBLE)


@pytest.mark.parametrize("case", GOLDEN, ids=lambda case: f"rank{case['rank']}")
def test_chain_of_merges_equals_the_golden_values_in_single_precision(xp, case):
    check_chain(case, lambda values: single(xp, values), SINGLE)


def check_chain(case, as_array, tolerance):
    merged = None
    for task in case["tasks"]:
        tuned_a, tuned_b = as_array(task["tuned_A"]), as_array(task["tuned_B"])
        weight = reference.merge_weight(task["t"])
        assert weight == pytest.approx(task["lambda"], abs=1e-15)
        merged = tuned_b if merged is None else reference.merge(merged, tuned_b, weight)
        np.testing.assert_allclose(to_numpy(merged), task["merged_B"], **tolerance)
        whole = reference.delta(tuned_a, merged, case["scale"])
        np.testing.assert_allclose(to_numpy(whole), task["delta"], **tolerance)


@settings(max_examples=50, deadline=None)
@given(tasks=st.integers(1, 50), seed=st.integers(0, 2**32 - 1))
def test_merges_of_many_tasks_weigh_them_as_the_closed_form_says(tasks, seed):
    # w_i = lambda(i) * prod_{j > i} (1 - lambda(j)), with lambda(i) = i ** -0.5.
    factors = np.random.default_rng(seed).normal(size=(tasks, 3, 2))
    merged = factors[0]
    for t in range(2, tasks + 1):
        merged = reference.merge(merged, factors[t - 1], reference.merge_weight(t))
    rates = np.arange(1, tasks + 1) ** -0.5
    weights = [rates[i] * np.prod(1 - rates[i + 1 :]) for i in range(tasks)]
    assert math.fsum(weights) == pytest.approx(1.0, abs=1e-12)
    np.testing.assert_allclose(merged, np.tensordot(weights, factors, axes=1), **DOUBLE)


def test_weights_after_fifteen_tasks_damp_the_newest_and_keep_the_oldest_steps():
    # Row t of `tuned` is B after task t as a sum of one unit step a task; the result is how much of each step is left.
    tuned = np.tril(np.ones((15, 15)))
    merged = tuned[0]
    for t in range(2, 16):
        merged = reference.merge(merged, tuned[t - 1], reference.merge_weight(t))
    kept = [1, 0.999, 0.998, 0.994, 0.988, 0.979, 0.964, 0.943, 0.911, 0.867, 0.805, 0.721, 0.607, 0.457, 0.258]
    np.testing.assert_allclose(merged, kept, atol=6e-4)


# --- the merge of products -------------------------------------------------------------------------------------------


def dense_best(merged, tuned, weight, rank):
    """The best rank-`rank` approximation of the mixed products, formed whole: shares nothing with the function."""
    mixed = (1 - weight) * merged[1] @ merged[0] + weight * tuned[1] @ tuned[0]
    u, s, vt = np.linalg.svd(mixed, full_matrices=False)
    return (u[:, :rank] * s[:rank]) @ vt[:rank], s


@pytest.mark.parametrize(
    ("rank", "in_dims", "out_dims"),
    [(1, 3, 2), (2, 5, 4), (4, 10, 12), (3, 4, 20), (3, 20, 4), (5, 6, 6), (8, 64, 48)],
)
@pytest.mark.parametrize("weight", [0.0, 0.3, 1.0])
def test_merged_products_equal_the_best_approximation_of_the_dense_sum(xp, rank, in_dims, out_dims, weight):
    generator = np.random.default_rng(rank * 100 + in_dims)
    merged, tuned = (random_pair(generator, rank, in_dims, out_dims) for _ in range(2))
    best, _ = dense_best(merged, tuned, weight, rank)
    a, b = reference.merge_products(*(single(xp, x) for x in (*merged, *tuned)), weight, rank)
    assert a.shape == (rank, in_dims) and b.shape == (out_dims, rank)
    assert to_numpy(a).dtype == to_numpy(b).dtype == np.float32
    np.testing.assert_allclose(to_numpy(b) @ to_numpy(a), best, atol=2e-5 * np.abs(best).max())


def test_merged_products_are_exact_in_double_precision():
    generator = np.random.default_rng(4)
    merged, tuned = (random_pair(generator, 4, 30, 20) for _ in range(2))
    a, b = reference.merge_products(*merged, *tuned, 0.6, 4)
    np.testing.assert_allclose(b @ a, dense_best(merged, tuned, 0.6, 4)[0], **DOUBLE)


def test_merged_products_lose_nothing_at_twice_the_rank(xp):
    generator = np.random.default_rng(5)
    merged, tuned = (random_pair(generator, 3, 14, 11) for _ in range(2))
    a, b = reference.merge_products(*(single(xp, x) for x in (*merged, *tuned)), 0.4, 6)
    whole = 0.6 * merged[1] @ merged[0] + 0.4 * tuned[1] @ tuned[0]
    np.testing.assert_allclose(to_numpy(b) @ to_numpy(a), whole, atol=1e-5 * np.abs(whole).max())


def test_merged_products_take_pairs_of_two_ranks():
    generator = np.random.default_rng(6)
    merged, tuned = random_pair(generator, 6, 14, 11), random_pair(generator, 3, 14, 11)
    a, b = reference.merge_products(*merged, *tuned, 0.4, 5)
    np.testing.assert_allclose(b @ a, dense_best(merged, tuned, 0.4, 5)[0], **DOUBLE)


def test_merged_products_are_balanced(xp):
    generator = np.random.default_rng(7)
    merged, tuned = (random_pair(generator, 3, 14, 11) for _ in range(2))
    a, b = (to_numpy(x) for x in reference.merge_products(*(single(xp, x) for x in (*merged, *tuned)), 0.4, 3))
    _, s = dense_best(merged, tuned, 0.4, 3)
    np.testing.assert_allclose(a @ a.T, np.diag(s[:3]), atol=1e-4)
    np.testing.assert_allclose(b.T @ b, np.diag(s[:3]), atol=1e-4)


def test_merged_products_of_2x2_worked_by_hand(xp):
    # (1 - 1/4) * [[4, 0], [0, 0]] + 1/4 * [[0, 0], [0, 8]] = diag(3, 2); rank 1 keeps the 3, its root on either side.
    merged = single(xp, [[2.0, 0.0]]), single(xp, [[2.0], [0.0]])
    tuned = single(xp, [[0.0, 4.0]]), single(xp, [[0.0], [2.0]])
    a, b = reference.merge_products(*merged, *tuned, 0.25, 1)
    np.testing.assert_allclose(to_numpy(a), [[math.sqrt(3), 0.0]], **SINGLE)
    np.testing.assert_allclose(to_numpy(b), [[math.sqrt(3)], [0.0]], **SINGLE)


def test_merged_products_of_nothing_are_zero(xp):
    pair = single(xp, np.zeros((2, 5))), single(xp, np.zeros((4, 2)))
    a, b = reference.merge_products(*pair, *pair, 0.5, 2)
    assert np.all(to_numpy(a) == 0) and np.all(to_numpy(b) == 0)


def test_merged_products_refuse_what_does_not_belong_together():
    a, b = np.ones((2, 5)), np.ones((4, 2))
    with pytest.raises(ValueError, match="expected two pairs of one layer"):
        reference.merge_products(a, b, np.ones((2, 6)), b, 0.5, 2)
    with pytest.raises(ValueError, match="expected two pairs of one layer"):
        reference.merge_products(a, np.ones((4, 3)), a, b, 0.5, 2)
    for rank in (0, 5):
        with pytest.raises(ValueError, match=f"cannot have rank {rank}"):
            reference.merge_products(a, b, a, b, 0.5, rank)
    with pytest.raises(ValueError, match=r"expected a weight in \[0, 1\]"):
        reference.merge_products(a, b, a, b, 2.0, 2)


# --- the delta, and what holds everywhere ----------------------------------------------------------------------------


def test_delta_of_2x2_worked_by_hand(xp):
    a, b = single(xp, [[1.0, 2.0], [0.0, 1.0]]), single(xp, [[1.0, 1.0], [2.0, 0.0]])
    np.testing.assert_allclose(to_numpy(reference.delta(a, b, 2.0)), [[2.0, 6.0], [4.0, 8.0]], **SINGLE)


def test_delta_refuses_factors_of_two_ranks():
    with pytest.raises(ValueError, match=r"expected A \(rank, in\) and B \(out, rank\), got \(2, 5\) and \(4, 3\)"):
        reference.delta(np.ones((2, 5)), np.ones((4, 3)), 1.0)


def test_a_numpy_scalar_as_weight_or_scale_does_not_change_the_dtype():
    one = np.ones((2, 2), dtype=np.float32)
    weight = np.float64(0.3)
    assert reference.merge(one, one, weight).dtype == np.float32
    assert reference.delta(one, one, weight).dtype == np.float32
    assert reference.merge_products(one, one, one, one, weight, 2)[0].dtype == np.float32


def test_results_stay_in_the_namespace_they_came_from(xp):
    a, b = single(xp, np.eye(2, 3)), single(xp, np.ones((4, 2)))
    results = [reference.orthogonal_init(a), reference.merge(a, a, 0.5), reference.delta(a, b, 1.0)]
    results += reference.merge_products(a, b, a, b, 0.5, 2)
    assert all(type(result) is type(a) for result in results)
