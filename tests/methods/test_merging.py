"""Methods that only merge: hand-worked values, and dense computations that share nothing with them.

Long, because the hand-worked values of each method stand beside its test.
"""

import numpy as np
import pytest

from mbf_mlx.errors import InputError
from mbf_mlx.methods import Pair, Seen, empty_state, first_factors, make
from mbf_mlx.reference import merge_by_inputs, orthogonal_init

LAYERS = {"q": (8, 9), "v": (7, 9)}
RANK = 3
CLOSE = {"rtol": 0, "atol": 5e-6}


def drawn(seed, layers=LAYERS, rank=RANK):
    """Tuned factors as some training might have left them."""
    generator = np.random.default_rng(seed)
    return {
        name: Pair(
            generator.normal(size=(rank, inner)).astype(np.float32),
            generator.normal(size=(out, rank)).astype(np.float32),
        )
        for name, (out, inner) in layers.items()
    }


def after(method, *chain, layers=LAYERS, rank=RANK):
    state = empty_state(layers, rank)
    for tuned in chain:
        state = method.finish(state, tuned)
    return state


def update(pair):
    return pair.b.astype(np.float64) @ pair.a.astype(np.float64)


def cut(matrix, rank=RANK):
    u, s, vt = np.linalg.svd(matrix, full_matrices=False)
    return (u[:, :rank] * s[:rank]) @ vt[:rank]


def one_number(a, b):
    """Tuned factors of a single 1 x 1 layer, worked with by hand."""
    return {"w": Pair(np.array([[a]], dtype=np.float32), np.array([[b]], dtype=np.float32))}


# --- products --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("exponent", [0.5, 0.7, 1.0])
def test_products_deploy_the_cut_mean_of_updates(exponent):
    state = after(make("products", {"exponent": exponent}), *map(drawn, range(3)))
    for name in LAYERS:
        merged = update(drawn(0)[name])
        for t in (2, 3):
            weight = t**-exponent
            merged = cut((1 - weight) * merged + weight * update(drawn(t - 1)[name]))
        np.testing.assert_allclose(update(state.deployed[name]), merged, atol=5e-6 * np.abs(merged).max())


def test_products_of_one_number_by_hand():
    # Updates 6 and 10; at exponent 1 their mean 8, balanced to root 8 on either side.
    state = after(make("products", {"exponent": 1.0}), one_number(2, 3), one_number(5, 2), layers={"w": (1, 1)}, rank=1)
    np.testing.assert_allclose(np.abs(state.deployed["w"]), np.full((2, 1, 1), np.sqrt(8)), **CLOSE)


def test_products_of_one_task_are_the_tuned_pair_to_the_bit():
    for name, pair in after(make("products"), drawn(1)).deployed.items():
        assert np.array_equal(pair.a, drawn(1)[name].a) and np.array_equal(pair.b, drawn(1)[name].b)


def test_products_start_as_algorithm_1_does_by_default():
    chain = [drawn(1), drawn(2)]
    start = make("products").start(after(make("products"), *chain))
    paper = make("slao").start(after(make("slao"), *chain))
    for name in LAYERS:
        np.testing.assert_allclose(start[name].a, paper[name].a, **CLOSE)
        assert np.array_equal(start[name].b, paper[name].b)


@pytest.mark.parametrize("basis", ["qr-preserving", "balanced", "keep"])
@pytest.mark.parametrize("start", ["merged", 0.3, "tuned"])
def test_products_can_start_anywhere_between_merged_and_tuned_without_a_jump(start, basis):
    method = make("products", {"start": start, "basis": basis})
    state = after(method, drawn(1), drawn(2))
    share = {"merged": 0.0, "tuned": 1.0}.get(start, start)
    for name, pair in method.start(state).items():
        mixed = (1 - share) * update(state.deployed[name]) + share * update(drawn(2)[name])
        assert pair.a.shape[0] == RANK
        np.testing.assert_allclose(update(pair), cut(mixed), atol=1e-5 * np.abs(mixed).max())


def test_products_that_start_from_the_merged_pair_keep_nothing_else():
    state = after(make("products", {"start": "merged", "basis": "balanced"}), *map(drawn, range(3)))
    assert state.kept == {}
    both = after(make("products"), *map(drawn, range(3)))
    assert both.kept_bytes() == 2 * state.kept_bytes() == sum(4 * 2 * RANK * (o + i) for o, i in LAYERS.values())


def test_products_can_merge_to_a_higher_rank_and_start_at_the_streams():
    method = make("products", {"rank": 5, "start": "merged", "basis": "balanced"})
    one, two = after(method, drawn(1)), after(method, drawn(1), drawn(2))
    assert one.kept_bytes() == two.kept_bytes()
    weight = 2**-0.5
    for name in LAYERS:
        np.testing.assert_allclose(update(one.deployed[name]), update(drawn(1)[name]), **CLOSE)
        mixed = (1 - weight) * update(drawn(1)[name]) + weight * update(drawn(2)[name])
        np.testing.assert_allclose(update(two.deployed[name]), cut(mixed, 5), atol=1e-5 * np.abs(mixed).max())
        np.testing.assert_allclose(update(method.start(two)[name]), cut(mixed, 3), atol=1e-5 * np.abs(mixed).max())


def test_products_of_a_rank_that_holds_all_tasks_are_the_mean_without_a_cut():
    layers = {"q": (12, 13)}
    tasks = [drawn(seed, layers) for seed in range(4)]
    state = after(make("products", {"rank": 12, "exponent": 1.0}), *tasks, layers=layers)
    expected = np.mean([update(tuned["q"]) for tuned in tasks], axis=0)
    np.testing.assert_allclose(update(state.deployed["q"]), expected, **CLOSE)


def test_products_slow_a_down_after_the_first_task_alone():
    method = make("products", {"rate_a": 0.25})
    assert method.rates(empty_state(LAYERS, RANK)) == {"a": 1.0, "b": 1.0}
    assert method.rates(after(method, drawn(1))) == {"a": 0.25, "b": 1.0}


def test_products_by_inputs_ask_for_directions_and_merge_with_the_grams():
    method = make("products", {"metric": "inputs"})
    generator = np.random.default_rng(9)
    inputs = [generator.normal(size=(300, 9)) @ generator.normal(size=(9, 9)) for _ in range(3)]
    state, shapes, expected = empty_state(LAYERS, RANK), [], {}
    for t, (x, tuned) in enumerate(zip(inputs, map(drawn, range(3)), strict=True), start=1):
        directions = method.measure(state, tuned)
        seen = {name: Seen(p, ((x @ p.T).T @ x / len(x)).astype(np.float32)) for name, p in directions.items()}
        grams = {name: (x @ p.T).T @ (x @ p.T) / len(x) for name, p in directions.items()}
        shapes.append({p.shape for p in directions.values()})
        state = method.finish(state, tuned, inputs=seen)
        for name, pair in tuned.items():
            pair = tuple(factor.astype(np.float64) for factor in pair)
            old = expected.get(name)
            merged = merge_by_inputs(old[:2], pair, t**-0.5, RANK, old[2], grams[name]) if old else (*pair, grams[name])
            expected[name] = merged
    assert shapes == [{(3, 9)}, {(6, 9)}, {(6, 9)}]
    for name, (a, b, gram) in expected.items():
        np.testing.assert_allclose(update(state.deployed[name]), b @ a, rtol=1e-3, atol=1e-3)
        np.testing.assert_allclose(
            np.linalg.eigvalsh(state.kept["inputs_gram"][name]), np.linalg.eigvalsh(gram), rtol=1e-3
        )
    with pytest.raises(ValueError, match="needs the inputs that `measure` asks for"):
        method.finish(state, drawn(3))


def test_products_measure_nothing_where_the_metric_is_that_of_weights():
    assert not make("products").needs


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"exponent": -0.1}, r"products: exponent: expected a number in \[0, 2\], got -0.1"),
        ({"exponent": "1/t"}, "got '1/t'"),
        ({"rank": 0}, "products: rank: expected a whole number of at least 1, got 0"),
        ({"rank": 2.5}, "got 2.5"),
        ({"start": "best"}, r"products: start .* expected a number in \[0, 1\], got 'best'"),
        ({"start": "merged"}, "use basis 'qr-preserving' or 'balanced'"),
        ({"start": 0.5}, "use basis 'qr-preserving' or 'balanced'"),
        ({"basis": "svd"}, "products: basis: expected one of qr, qr-preserving, balanced, keep, got 'svd'"),
        ({"metric": "fisher"}, "products: metric: expected one of weights, inputs, got 'fisher'"),
        ({"metric": "inputs", "rank": 5}, "leave out rank"),
        ({"ridge": -1}, "products: ridge: expected a number of at least 0, got -1"),
        ({"rate_a": 2}, r"products: rate_a: expected a number in \[0, 1\], got 2"),
    ],
)
def test_products_refuse_what_has_no_meaning(options, message):
    with pytest.raises(InputError, match=message):
        make("products", options)


def test_products_refuse_layers_that_are_too_small_before_anything_is_trained():
    with pytest.raises(InputError, match=r"at least 3 outputs and 6 inputs, .*got\n  q: 8 x 5$"):
        make("products", {"metric": "inputs"}).start(empty_state({"q": (8, 5), "v": (8, 9)}, RANK))
    with pytest.raises(InputError, match=r"at least 8 outputs and 8 inputs, .*got\n  v: 7 x 9$"):
        make("products", {"rank": 8}).start(empty_state(LAYERS, RANK))


# --- frozen A and running mean ---------------------------------------------------------------------------------------


def test_frozen_a_merges_products_exactly():
    method = make("frozen-a")
    state = empty_state(LAYERS, RANK)
    first, updates = method.start(state), []
    for seed in range(3):
        start = method.start(state)
        tuned = {name: Pair(pair.a, pair.b + drawn(seed)[name].b) for name, pair in start.items()}
        updates.append({name: update(pair) for name, pair in tuned.items()})
        state = method.finish(state, tuned)
    for name in LAYERS:
        assert np.array_equal(state.deployed[name].a, first[name].a)
        mean = updates[0][name]
        for t in (2, 3):
            mean = mean + t**-0.5 * (updates[t - 1][name] - mean)
        np.testing.assert_allclose(update(state.deployed[name]), mean, **CLOSE)
    assert method.rates(state) == {"a": 0.0, "b": 1.0}


def test_frozen_a_refuses_to_merge_what_does_not_change():
    with pytest.raises(InputError, match="frozen-a: merged: expected one of b, none, got 'a and b'"):
        make("frozen-a", {"merged": "a and b"})
    with pytest.raises(InputError, match="frozen-a: weight: expected"):
        make("frozen-a", {"weight": 2})


def test_running_mean_is_the_mean_of_all_factors():
    state = after(make("running-mean"), *map(drawn, range(4)))
    for name, pair in state.deployed.items():
        np.testing.assert_allclose(pair.a, np.mean([drawn(i)[name].a for i in range(4)], axis=0), **CLOSE)
        np.testing.assert_allclose(pair.b, np.mean([drawn(i)[name].b for i in range(4)], axis=0), **CLOSE)
    for name, start in make("running-mean").start(state).items():
        assert np.array_equal(start.a, drawn(3)[name].a) and np.array_equal(start.b, drawn(3)[name].b)


# --- task vectors ----------------------------------------------------------------------------------------------------


def first(name, first_a="uniform"):
    return first_factors(empty_state(LAYERS, RANK), first_a)[name]


def test_magmax_keeps_of_every_entry_the_largest_change():
    state = after(make("magmax"), *map(drawn, range(3)))
    for name, pair in state.deployed.items():
        a0 = first(name).a
        for got, vectors in (
            ((pair.a - a0) * 2, [drawn(i)[name].a - a0 for i in range(3)]),
            (pair.b * 2, [drawn(i)[name].b for i in range(3)]),
        ):
            stacked = np.stack(vectors)
            largest = np.abs(stacked).argmax(axis=0)
            np.testing.assert_allclose(got, np.take_along_axis(stacked, largest[None], axis=0)[0], **CLOSE)
    for name, start in make("magmax").start(state).items():
        assert np.array_equal(start.b, drawn(2)[name].b)


def test_magmax_on_updates_by_hand():
    # Updates of one 1 x 1 layer: 6, then -10, then 2: the largest is -10, deployed with coefficient 0.5.
    chain = [one_number(2, 3), one_number(5, -2), one_number(1, 2)]
    state = after(make("magmax", {"space": "delta"}), *chain, layers={"w": (1, 1)}, rank=1)
    np.testing.assert_allclose(update(state.deployed["w"]), [[-5.0]], **CLOSE)


def test_magmax_on_updates_is_the_cut_of_the_largest_entries():
    state = after(make("magmax", {"space": "delta", "coefficient": 1.0}), drawn(1), drawn(2))
    for name, pair in state.deployed.items():
        one, two = update(drawn(1)[name]), update(drawn(2)[name])
        np.testing.assert_allclose(update(pair), cut(np.where(np.abs(two) >= np.abs(one), two, one)), atol=1e-4)


def test_task_arithmetic_deploys_the_sum_times_its_coefficient():
    state = after(make("task-arithmetic", {"space": "factors"}), drawn(1), drawn(2), drawn(3))
    for name, pair in state.deployed.items():
        a0 = first(name).a
        expected = a0 + 0.4 * sum(drawn(i)[name].a - a0 for i in (1, 2, 3))
        np.testing.assert_allclose(pair.a, expected, **CLOSE)
        np.testing.assert_allclose(pair.b, 0.4 * sum(drawn(i)[name].b for i in (1, 2, 3)), **CLOSE)


@pytest.mark.parametrize(("coefficient", "scale"), [(0.4, 0.4), ("1/t", 0.5)])
def test_task_arithmetic_on_updates_is_the_cut_sum(coefficient, scale):
    state = after(make("task-arithmetic", {"coefficient": coefficient}), drawn(1), drawn(2))
    for name, pair in state.deployed.items():
        expected = scale * cut(update(drawn(1)[name]) + update(drawn(2)[name]))
        np.testing.assert_allclose(update(pair), expected, **CLOSE)


def test_task_arithmetic_starts_every_task_from_the_same_draw():
    method = make("task-arithmetic")
    empty, later = method.start(empty_state(LAYERS, RANK)), method.start(after(method, drawn(1), drawn(2)))
    for name in LAYERS:
        assert np.array_equal(empty[name].a, later[name].a) and not later[name].b.any()


def test_dare_keeps_a_tenth_of_the_entries_ten_times_as_large():
    layers = {"w": (200, 300)}
    method = make("dare", {"coefficient": 1.0})
    state = after(method, drawn(1, layers), layers=layers)
    vector, got = drawn(1, layers)["w"].b, state.deployed["w"].b
    left = got != 0
    assert 0.05 < left.mean() < 0.15
    np.testing.assert_allclose(got[left], 10 * vector[left], rtol=1e-5)
    again = after(method, drawn(1, layers), layers=layers)
    assert np.array_equal(again.deployed["w"].b, got)


def test_dare_drops_other_entries_for_every_task_and_keeps_the_expectation():
    layers = {"w": (40, 50)}
    method, state = make("dare", {"drop": 0.5}), empty_state({"w": (40, 50)}, RANK)
    same, masks = drawn(1, layers), []
    for t in range(200):
        before = state.deployed["w"].b * t if t else 0
        state = method.finish(state, same)
        masks.append(np.abs(state.deployed["w"].b * (t + 1) - before) > 1e-3)
    assert not np.array_equal(masks[0], masks[1])
    # The mean over 200 tasks of what is dropped and doubled is the vector, within five standard errors.
    error = np.abs(state.deployed["w"].b - same["w"].b) / np.abs(same["w"].b)
    assert error.max() < 5 / np.sqrt(200)


def test_dare_on_updates_is_the_cut_of_what_is_left():
    state = after(make("dare", {"space": "delta", "drop": 0.0}), drawn(1), drawn(2))
    for name, pair in state.deployed.items():
        expected = cut(update(drawn(1)[name]) + update(drawn(2)[name])) / 2
        np.testing.assert_allclose(update(pair), expected, **CLOSE)


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("magmax", {"space": "weights"}, "magmax: space: expected one of factors, delta, got 'weights'"),
        ("magmax", {"coefficient": 0}, "magmax: coefficient: expected a number above 0 or '1/t', got 0"),
        ("task-arithmetic", {"coefficient": "1/n"}, "task-arithmetic: coefficient: expected a number of at least 0"),
        ("task-arithmetic", {"start": "merged"}, "task-arithmetic: start: expected one of first, tuned, got 'merged'"),
        ("dare", {"drop": 1.0}, "dare: drop: expected a number below 1"),
        ("dare", {"drop": -1}, r"dare: drop: expected a number in \[0, 1\], got -1"),
        ("ties", {"density": 0}, "ties: density: expected a number in"),
        ("ties", {"memory": "small"}, "ties: memory: expected one of streamed, exact, got 'small'"),
        ("opcm", {"alpha": 1.5}, r"opcm: alpha: expected a number in \[0, 1\], got 1.5"),
        ("opcm", {"start": "merged"}, "opcm: start: expected one of first, tuned, got 'merged'"),
    ],
)
def test_merging_methods_refuse_options_outside_their_choices(name, options, message):
    with pytest.raises(InputError, match=message):
        make(name, options)


# --- TIES ------------------------------------------------------------------------------------------------------------


def ties_of(vectors, density):
    """TIES entry by entry in plain loops."""
    trimmed = []
    for vector in vectors:
        count = max(1, round(density * vector.size))
        threshold = np.sort(np.abs(vector).ravel())[-count]
        trimmed.append(np.where(np.abs(vector) >= threshold, vector, 0))
    merged = np.zeros_like(vectors[0])
    for index in np.ndindex(merged.shape):
        values = [vector[index] for vector in trimmed]
        sign = np.sign(sum(values))
        agreeing = [value for value in values if value * sign > 0]
        merged[index] = np.mean(agreeing) if agreeing else 0
    return merged


def test_ties_by_hand():
    # Of four entries per task the two largest stay (density 0.5): (5, 0, -3, 0), (-2, 0, -4, 0), (0, 2, 0, -1).
    # Signs by mass: 5 - 2 > 0, +, -, -. Means of those that agree: 5, 2, -3.5, -1.
    method = make("ties", {"density": 0.5})
    layers = {"w": (4, 2)}
    chain = [
        {"w": Pair(first_factors(empty_state(layers, 1), "uniform")["w"].a, np.array(b, dtype=np.float32)[:, None])}
        for b in ([5, 1, -3, 0.5], [-2, 1, -4, 1], [0.5, 2, 0.5, -1])
    ]
    state = after(method, *chain, layers=layers, rank=1)
    np.testing.assert_allclose(state.deployed["w"].b[:, 0], [5, 2, -3.5, -1], **CLOSE)


def test_streamed_ties_equal_ties_of_all_tasks_at_once():
    state = after(make("ties", {"density": 0.4}), *map(drawn, range(4)))
    for name, pair in state.deployed.items():
        a0 = first(name).a
        np.testing.assert_allclose(pair.b, ties_of([drawn(i)[name].b for i in range(4)], 0.4), **CLOSE)
        np.testing.assert_allclose(pair.a, a0 + ties_of([drawn(i)[name].a - a0 for i in range(4)], 0.4), **CLOSE)


def test_exact_ties_are_those_of_the_updates_cut_to_the_rank():
    state = after(make("ties", {"memory": "exact", "coefficient": 0.7}), *map(drawn, range(3)))
    for name, pair in state.deployed.items():
        expected = 0.7 * cut(ties_of([update(drawn(i)[name]) for i in range(3)], 0.2))
        np.testing.assert_allclose(update(pair), expected, **CLOSE)


# --- OPCM ------------------------------------------------------------------------------------------------------------


def test_opcm_equals_a_dense_computation():
    layers, alpha, state = {"q": (8, 9)}, 0.6, empty_state({"q": (8, 9)}, RANK)
    method = make("opcm", {"alpha": alpha})
    merged, old_lambda, norms = None, 1.0, []
    for seed in range(4):
        tuned = drawn(seed, layers)
        state = method.finish(state, tuned)
        new = update(tuned["q"])
        norms.append(np.linalg.norm(new))
        if merged is None:
            merged = new
        else:
            u, s, vt = np.linalg.svd(merged)
            acting = u.T @ new @ vt.T
            block = next(i for i in range(len(s)) if s[: i + 1].sum() / s.sum() > alpha)
            acting[:block, :block] = 0
            acting[np.arange(RANK), np.arange(RANK)] = 0
            unscaled = cut(old_lambda * merged + u @ acting @ vt)
            old_lambda = np.linalg.norm(unscaled) / np.mean(norms)
            merged = unscaled / old_lambda
        np.testing.assert_allclose(update(state.deployed["q"]), merged, atol=1e-5 * np.abs(merged).max())
    assert np.linalg.norm(merged) == pytest.approx(np.mean(norms))


def test_opcm_adds_orthogonal_updates_whole_and_weighs_them_by_the_root_of_their_number():
    # Two updates of rank 1 in directions that share nothing: nothing is removed, lambda(2) = root 2.
    layers = {"w": (4, 4)}
    eye = np.eye(4, dtype=np.float32)
    size = np.array([[3], [0]], dtype=np.float32)
    chain = [{"w": Pair(eye[i : i + 2] * size, eye[:, i : i + 2])} for i in (0, 2)]
    state = after(make("opcm"), *chain, layers=layers, rank=2)
    np.testing.assert_allclose(update(state.deployed["w"]), np.diag([3, 0, 3, 0]) / np.sqrt(2), **CLOSE)
    np.testing.assert_allclose(state.kept["lambda_and_norm"]["stream"], [np.sqrt(2), 3], rtol=1e-6)


def test_opcm_sets_one_norm_over_all_layers_and_can_go_on_from_the_tuned_pair():
    method = make("opcm", {"start": "tuned"})
    state = after(method, drawn(1), drawn(2))
    norm = np.sqrt(sum(np.linalg.norm(update(pair)) ** 2 for pair in state.deployed.values()))
    means = np.mean([np.sqrt(sum(np.linalg.norm(update(p)) ** 2 for p in drawn(i).values())) for i in (1, 2)])
    assert norm == pytest.approx(means, rel=1e-5)
    for name, start in method.start(state).items():
        assert np.array_equal(start.a, drawn(2)[name].a)


def test_opcm_survives_updates_of_zero():
    zero = {name: Pair(pair.a, 0 * pair.b) for name, pair in drawn(1).items()}
    state = after(make("opcm"), zero, zero, drawn(2))
    for pair in state.deployed.values():
        assert np.isfinite(pair.a).all() and np.isfinite(pair.b).all()


def test_orthonormal_first_a_is_what_it_says():
    for name in ("products", "frozen-a", "magmax", "task-arithmetic", "dare", "ties", "opcm", "running-mean"):
        start = make(name, {"first_a": "orthonormal"}).start(empty_state(LAYERS, RANK))
        for pair in start.values():
            np.testing.assert_allclose(orthogonal_init(pair.a), pair.a, atol=1e-6)
