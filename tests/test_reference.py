"""The shared math against hand-worked matrices, golden values, a dense computation, and its own properties.

Long, because reference.py is one contract: each function's hand-worked values stand here beside its properties.
"""

import math

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from mbf_mlx import reference
from tests.support import arrays
from tests.support.arrays import DOUBLE, GOLDEN, SINGLE, single, to_numpy

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


@pytest.mark.parametrize("basis", ["qr-preserving", "balanced", "keep"])
def test_these_starts_keep_the_function(xp, basis):
    a, b = random_pair(np.random.default_rng(11), 3, 8, 6)
    new_a, new_b = (to_numpy(x) for x in reference.in_basis(single(xp, a), single(xp, b), basis))
    np.testing.assert_allclose(new_b @ new_a, b @ a, atol=1e-5)
    if basis == "qr-preserving":
        np.testing.assert_allclose(new_a @ new_a.T, np.eye(3), **SINGLE)
    if basis == "balanced":
        np.testing.assert_allclose(new_a @ new_a.T, new_b.T @ new_b, atol=1e-5)


def test_the_start_of_algorithm_1_keeps_b_and_takes_a_basis_of_a():
    a, b = random_pair(np.random.default_rng(12), 3, 8, 6)
    new_a, new_b = reference.in_basis(a, b, "qr")
    assert new_b is b and np.array_equal(new_a, reference.orthogonal_init(a))


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


def test_moved_b_is_the_least_squares_fit_of_the_update(xp):
    generator = np.random.default_rng(14)
    (a, b), (new_a, _) = random_pair(generator, 3, 9, 6), random_pair(generator, 3, 9, 6)
    moved = to_numpy(reference.move(single(xp, a), single(xp, b), single(xp, new_a)))
    expected = np.linalg.lstsq(new_a.T, (b @ a).T, rcond=None)[0].T
    np.testing.assert_allclose(moved, expected, rtol=1e-4, atol=1e-4)


def test_b_moved_to_dependent_rows_is_finite_and_fits_as_well_as_one_of_them(xp):
    generator = np.random.default_rng(16)
    (a, b), (new_a, _) = random_pair(generator, 3, 9, 6), random_pair(generator, 3, 9, 6)
    new_a[2] = 2 * new_a[1]
    moved = to_numpy(reference.move(single(xp, a), single(xp, b), single(xp, new_a)))
    best = np.linalg.lstsq(new_a[:2].T, (b @ a).T, rcond=None)[0].T
    np.testing.assert_allclose(moved @ new_a, best @ new_a[:2], rtol=1e-3, atol=1e-3)


def test_b_moved_to_another_basis_of_the_same_rows_keeps_the_update():
    a, b = random_pair(np.random.default_rng(15), 3, 9, 6)
    q = reference.orthogonal_init(a)
    np.testing.assert_allclose(reference.move(a, b, q) @ q, b @ a, **DOUBLE)


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
    for other in [(np.ones((2, 6)), b), (a, np.ones((5, 2))), (a, np.ones((4, 3)))]:
        with pytest.raises(ValueError, match=r"expected A \(rank, in\) and B \(out, rank\) of one layer"):
            reference.merge_products(a, b, *other, 0.5, 2)
    for rank in (0, 5):
        with pytest.raises(ValueError, match=f"cannot have rank {rank}"):
            reference.merge_products(a, b, a, b, 0.5, rank)
    with pytest.raises(ValueError, match=r"expected a weight in \[0, 1\]"):
        reference.merge_products(a, b, a, b, 2.0, 2)


# --- the merge in the metric of the inputs ---------------------------------------------------------------------------


def input_case(seed, rank=2, in_dims=12, out_dims=6, rows=400):
    """Two pairs, and inputs of the old and of the new tasks with different covariances."""
    generator = np.random.default_rng(seed)
    merged, tuned = (random_pair(generator, rank, in_dims, out_dims) for _ in range(2))
    old, new = (generator.normal(size=(rows, in_dims)) @ generator.normal(size=(in_dims, in_dims)) for _ in range(2))
    return merged, tuned, old, new


def grams(merged_a, tuned_a, old, new):
    z_old = old @ reference.orthogonal_init(merged_a).T
    z_new = new @ reference.input_basis(merged_a, tuned_a).T
    return z_old.T @ z_old / len(old), z_new.T @ z_new / len(new)


def test_input_basis_begins_with_the_start_of_the_merged_a():
    (merged_a, _), (tuned_a, _), _, _ = input_case(0)
    q = reference.input_basis(merged_a, tuned_a)
    np.testing.assert_allclose(q @ q.T, np.eye(4), **DOUBLE)
    np.testing.assert_allclose(q[:2], reference.orthogonal_init(merged_a), **DOUBLE)
    np.testing.assert_allclose(tuned_a @ q.T @ q, tuned_a, **DOUBLE)


def test_alike_inputs_merge_as_products_do(xp):
    (merged, tuned, _, _), weight = input_case(1), 0.3
    old_gram, new_gram = np.eye(2), np.eye(4)
    a, b, gram = reference.merge_by_inputs(
        tuple(single(xp, x) for x in merged),
        tuple(single(xp, x) for x in tuned),
        weight,
        3,
        single(xp, old_gram),
        single(xp, new_gram),
    )
    expected, _ = dense_best(merged, tuned, weight, 3)
    np.testing.assert_allclose(to_numpy(b) @ to_numpy(a), expected, atol=1e-4)
    np.testing.assert_allclose(to_numpy(gram), np.eye(3), atol=1e-5)


def test_the_merge_by_inputs_is_the_minimum_of_both_sides_errors():
    (merged, tuned, _, new), weight = input_case(2), 0.4
    q = reference.input_basis(merged[0], tuned[0])
    z_new = new @ q.T
    # Old inputs for which the completion is true: the first coordinates their own, the others as in the new inputs,
    # and the two orthogonal to each other.
    others = z_new[:, 2:]
    drawn = np.random.default_rng(3).normal(size=(len(new), 2)) * [1.0, 10.0]
    known = drawn - others @ np.linalg.lstsq(others, drawn, rcond=None)[0]
    z_old = np.concatenate([known, others], axis=1)
    old_gram, new_gram = known.T @ known / len(new), z_new.T @ z_new / len(new)
    a, b, _ = reference.merge_by_inputs(merged, tuned, weight, 4, old_gram, new_gram, ridge=0.0)

    def error(matrix):
        old_error = (z_old @ q @ (matrix - merged[1] @ merged[0]).T) ** 2
        new_error = (z_new @ q @ (matrix - tuned[1] @ tuned[0]).T) ** 2
        return (1 - weight) * old_error.sum() + weight * new_error.sum()

    best = error(b @ a)
    assert best < 0.999 * error((1 - weight) * merged[1] @ merged[0] + weight * tuned[1] @ tuned[0])
    generator = np.random.default_rng(4)
    for size in (1e-3, 1e-1):
        step = size * generator.normal(size=(6, 4)) @ q
        assert error(b @ a + step) > best and error(b @ a - step) > best


def test_a_direction_that_only_one_side_sees_is_decided_by_that_side():
    # merged reads the inputs x1 and x2, tuned x3 and x4. Old inputs have x1 alone of the first two, new ones x2 alone.
    generator = np.random.default_rng(5)
    merged = np.eye(2, 7), generator.normal(size=(6, 2))
    tuned = np.eye(7)[2:4], generator.normal(size=(6, 2))
    old_gram, new_gram = np.diag([1.0, 1e-9]), np.diag([1e-9, 1.0, 1.0, 1.0])
    a, b, _ = reference.merge_by_inputs(merged, tuned, 0.5, 4, old_gram, new_gram, ridge=0.0)
    whole = b @ a
    np.testing.assert_allclose(whole[:, 0], merged[1][:, 0], atol=1e-6)  # merged decides, in full
    np.testing.assert_allclose(whole[:, 1], 0, atol=1e-6)  # tuned decides, which ignores x2
    np.testing.assert_allclose(whole[:, 2:4], tuned[1] / 2, atol=1e-6)  # both have it alike: the mean of 0 and tuned
    np.testing.assert_allclose(whole[:, 4:], 0, atol=1e-9)


def test_a_large_ridge_leads_to_the_merge_of_products():
    merged, tuned, old, new = input_case(7)
    a, b, gram = reference.merge_by_inputs(merged, tuned, 0.4, 2, *grams(merged[0], tuned[0], old, new), ridge=1e9)
    expected, _ = dense_best(merged, tuned, 0.4, 2)
    np.testing.assert_allclose(b @ a, expected, atol=1e-6)
    assert np.trace(gram) < 4 * np.trace(new.T @ new) / len(new)  # the ridge is not kept


def test_more_rows_together_than_columns_are_refused():
    pair = np.ones((3, 5)), np.ones((6, 3))
    with pytest.raises(ValueError, match="rank <= in"):
        reference.merge_by_inputs(pair, pair, 0.5, 3, np.eye(3), np.eye(6))


def test_the_old_gram_of_the_next_merge_is_that_of_the_mixed_inputs(xp):
    merged, tuned, old, new = input_case(6)
    old_gram, new_gram = grams(merged[0], tuned[0], old, new)
    pairs = [tuple(single(xp, x) for x in pair) for pair in (merged, tuned)]
    a, _, gram = reference.merge_by_inputs(*pairs, 1.0, 2, single(xp, old_gram), single(xp, new_gram), ridge=0.0)
    z = new @ reference.orthogonal_init(to_numpy(a).astype(np.float64)).T
    np.testing.assert_allclose(to_numpy(gram), z.T @ z / len(new), atol=1e-3 * np.abs(to_numpy(gram)).max())


# --- Grams kept in few numbers ---------------------------------------------------------------------------------------


def test_a_gram_of_few_directions_is_seen_whole_in_a_few_more(xp):
    generator = np.random.default_rng(12)
    inputs, directions = generator.normal(size=(50, 3)) @ generator.normal(size=(3, 40)), generator.normal(size=(6, 40))
    gram = inputs.T @ inputs / 50
    sketch = to_numpy(reference.sketch_gram(single(xp, directions @ gram), single(xp, directions)))
    assert sketch.shape == (6, 40)
    np.testing.assert_allclose(sketch.T @ sketch, gram, atol=2e-3 * np.abs(gram).max())


def test_a_gram_of_many_directions_is_seen_in_its_large_ones():
    generator = np.random.default_rng(13)
    inputs = generator.normal(size=(500, 40)) * 0.7 ** np.arange(40)
    gram, directions = inputs.T @ inputs / 500, generator.normal(size=(20, 40))
    sketch = reference.sketch_gram(directions @ gram, directions)
    assert np.linalg.norm(sketch.T @ sketch - gram) < 0.01 * np.linalg.norm(gram)
    assert np.linalg.eigvalsh(gram - sketch.T @ sketch).min() > -1e-9  # Nystroem never sees more than there is


def test_merged_sketches_are_the_largest_directions_of_the_mean(xp):
    generator = np.random.default_rng(14)
    sketches = [generator.normal(size=(rows, 9)) for rows in (4, 3)]
    merged = to_numpy(reference.merge_sketches([single(xp, s) for s in sketches], [0.75, 0.25], 5))
    values, vectors = np.linalg.eigh(0.75 * sketches[0].T @ sketches[0] + 0.25 * sketches[1].T @ sketches[1])
    expected = (vectors[:, -5:] * values[-5:]) @ vectors[:, -5:].T
    np.testing.assert_allclose(merged.T @ merged, expected, atol=1e-4)
    np.testing.assert_allclose(merged @ merged.T, np.diag(values[-5:]), atol=1e-4)


def test_merged_sketches_cannot_have_more_rows_than_they_are_made_of():
    with pytest.raises(ValueError, match="merge_sketches: expected at least 4 rows in all, got 3"):
        reference.merge_sketches([np.ones((2, 5)), np.ones((1, 5))], [0.5, 0.5], 4)


# --- sums of products, and cuts ---------------------------------------------------------------------------------------


def test_stacked_pairs_sum_their_products(xp):
    generator = np.random.default_rng(8)
    pairs = [random_pair(generator, rank, 7, 5) for rank in (1, 3, 2)]
    a, b = reference.stack_pairs([(single(xp, a), single(xp, b)) for a, b in pairs], [0.5, 1, -2])
    assert a.shape == (6, 7) and b.shape == (5, 6)
    expected = sum(weight * b @ a for weight, (a, b) in zip([0.5, 1, -2], pairs, strict=True))
    np.testing.assert_allclose(to_numpy(b) @ to_numpy(a), expected, atol=1e-5)


def test_one_stacked_pair_is_itself():
    a, b = random_pair(np.random.default_rng(9), 2, 7, 5)
    one_a, one_b = reference.stack_pairs([(a, b)])
    assert np.array_equal(one_a, a) and np.array_equal(one_b, b)


@pytest.mark.parametrize("shape", [(6, 9), (9, 6), (5, 5)])
def test_a_split_matrix_is_the_best_of_its_rank_and_balanced(xp, shape):
    matrix = np.random.default_rng(10).normal(size=shape)
    a, b = (to_numpy(x) for x in reference.split_delta(single(xp, matrix), 3))
    u, s, vt = np.linalg.svd(matrix)
    assert a.shape == (3, shape[1]) and b.shape == (shape[0], 3)
    np.testing.assert_allclose(b @ a, (u[:, :3] * s[:3]) @ vt[:3], atol=1e-5)
    np.testing.assert_allclose(a @ a.T, np.diag(s[:3]), atol=1e-5)


def test_a_matrix_cannot_be_split_to_more_than_its_rank():
    with pytest.raises(ValueError, match=r"a matrix of shape \(4, 5\) cannot have rank 5"):
        reference.split_delta(np.ones((4, 5)), 5)


def test_update_norm_is_that_of_the_product(xp):
    a, b = random_pair(np.random.default_rng(13), 3, 8, 6)
    assert float(reference.update_norm(single(xp, a), single(xp, b))) == pytest.approx(np.linalg.norm(b @ a), rel=1e-5)
    assert float(reference.update_norm(single(xp, a), single(xp, 0 * b))) == 0


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


def test_an_array_that_does_not_know_its_namespace_belongs_to_the_library_that_made_it(xp):
    assert reference.namespace(single(xp, [1.0])) is xp
    assert reference.namespace(np.random.RandomState(0)) is np  # stands for an older CuPy's array: no such attribute


def test_results_stay_in_the_namespace_they_came_from(xp):
    a, b = single(xp, np.eye(2, 3)), single(xp, np.ones((4, 2)))
    results = [reference.orthogonal_init(a), reference.merge(a, a, 0.5), reference.delta(a, b, 1.0)]
    results += reference.merge_products(a, b, a, b, 0.5, 2)
    results += [reference.sketch_gram(a, a), reference.merge_sketches([a], [1.0], 1)]
    assert all(type(result) is type(a) for result in results)
