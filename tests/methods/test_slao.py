"""Algorithm 1 and its ablations, and sequential LoRA, on tuned factors drawn at random."""

import itertools

import numpy as np
import pytest

from mbf_mlx.errors import InputError
from mbf_mlx.methods import Pair, State, empty_state, make
from mbf_mlx.reference import delta, orthogonal_init
from tests.support import arrays
from tests.support.arrays import GOLDEN, SINGLE, single, to_numpy

xp = arrays.xp
LAYERS = {"q": (6, 9), "v": (4, 9)}
RANK = 3
CLOSE = {"rtol": 0, "atol": 2e-6}


def drawn(seed, layers=LAYERS):
    """Tuned factors as some training might have left them."""
    generator = np.random.default_rng(seed)
    return {
        name: Pair(
            generator.normal(size=(RANK, inner)).astype(np.float32),
            generator.normal(size=(out, RANK)).astype(np.float32),
        )
        for name, (out, inner) in layers.items()
    }


def after(method, *chain):
    """The state after a chain of tuned factors."""
    state = empty_state(LAYERS, RANK)
    for tuned in chain:
        state = method.finish(state, tuned)
    return state


# --- Algorithm 1 -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", GOLDEN, ids=lambda case: f"rank{case['rank']}")
def test_slao_equals_the_golden_values(xp, case):
    method = make("slao")
    state = State(t=0, layers={"w": (case["out"], case["in"])}, rank=case["rank"])
    for task in case["tasks"]:
        start = method.start(state)["w"]
        if task["t"] > 1:
            np.testing.assert_allclose(to_numpy(start.a), task["start_A"], **SINGLE)
            np.testing.assert_allclose(to_numpy(start.b), task["start_B"], **SINGLE)
        state = method.finish(state, {"w": Pair(single(xp, task["tuned_A"]), single(xp, task["tuned_B"]))})
        assert state.t == task["t"]
        np.testing.assert_allclose(to_numpy(state.deployed["w"].a), task["merged_A"], **SINGLE)
        np.testing.assert_allclose(to_numpy(state.deployed["w"].b), task["merged_B"], **SINGLE)
        whole = delta(*state.deployed["w"], case["scale"])
        np.testing.assert_allclose(to_numpy(whole), task["delta"], **SINGLE)


def test_merged_of_one_task_is_the_tuned_pair_to_the_bit():
    one = drawn(1)
    for name, pair in after(make("slao"), one).deployed.items():
        assert np.array_equal(pair.a, one[name].a) and np.array_equal(pair.b, one[name].b)


def test_slao_starts_from_the_tuned_pair_and_not_from_the_merged_one():
    state = after(make("slao"), drawn(1), drawn(2))
    tuned = drawn(2)
    for name, start in make("slao").start(state).items():
        np.testing.assert_allclose(start.a, orthogonal_init(tuned[name].a.astype(np.float64)), **CLOSE)
        assert np.array_equal(start.b, tuned[name].b)
        assert not np.allclose(start.b, state.deployed[name].b)


def test_slao_leaves_the_state_it_was_given_alone():
    method, state = make("slao"), after(make("slao"), drawn(1))
    before = {name: pair.b.copy() for name, pair in state.deployed.items()}
    method.start(state)
    method.finish(state, drawn(2))
    assert state.t == 1
    assert all(np.array_equal(state.deployed[name].b, b) for name, b in before.items())


def test_slao_keeps_one_a_and_two_b_whatever_the_number_of_tasks():
    two, twelve = after(make("slao"), *map(drawn, range(2))), after(make("slao"), *map(drawn, range(12)))
    assert two.kept_bytes() == twelve.kept_bytes() == sum(4 * RANK * (i + 2 * o) for o, i in LAYERS.values())
    assert set(twelve.kept) == {"tuned_b"}


# --- the ablations ---------------------------------------------------------------------------------------------------


def test_orthonormal_first_a_has_orthonormal_rows():
    for pair in make("slao", {"first_a": "orthonormal"}).start(empty_state(LAYERS, RANK)).values():
        np.testing.assert_allclose(pair.a @ pair.a.T, np.eye(RANK), **CLOSE)
        assert not pair.b.any()


def test_keep_starts_from_the_tuned_pair_as_it_is():
    method = make("slao", {"start_a": "keep"})
    start = method.start(after(method, drawn(1), drawn(2)))
    for name, tuned in drawn(2).items():
        assert np.array_equal(start[name].a, tuned.a) and np.array_equal(start[name].b, tuned.b)


def test_a_start_that_keeps_the_function_begins_with_the_tuned_delta_in_an_orthonormal_basis():
    method = make("slao", {"start_a": "qr-preserving"})
    start = method.start(after(method, drawn(1), drawn(2)))
    for name, tuned in drawn(2).items():
        np.testing.assert_allclose(start[name].a @ start[name].a.T, np.eye(RANK), **CLOSE)
        np.testing.assert_allclose(start[name].b @ start[name].a, tuned.b @ tuned.a, atol=1e-5)


def test_the_paper_start_does_not_keep_the_function():
    start = make("slao").start(after(make("slao"), drawn(1)))
    for name, tuned in drawn(1).items():
        assert np.abs(start[name].b @ start[name].a - tuned.b @ tuned.a).max() > 0.5


def test_merged_b_moved_to_the_new_basis_keeps_the_merged_delta():
    method = make("slao", {"start_a": "qr-preserving", "weight": 0.25})
    state = after(method, drawn(1), drawn(2))
    # Training that changes nothing: what is merged then is the old merged delta and the start's, by their weights.
    start = method.start(state)
    moved = method.finish(state, start)
    for name in LAYERS:
        old, tuned = state.deployed[name], drawn(2)[name]
        expected = 0.75 * old.b @ old.a + 0.25 * tuned.b @ tuned.a
        np.testing.assert_allclose(moved.deployed[name].b @ moved.deployed[name].a, expected, atol=1e-5)


def test_a_start_from_merged_b_that_keeps_the_function_begins_with_the_merged_delta():
    method = make("slao", {"start_a": "qr-preserving", "start_b": "merged"})
    state = after(method, drawn(1), drawn(2))
    for name, start in method.start(state).items():
        old = state.deployed[name]
        np.testing.assert_allclose(start.b @ start.a, old.b @ old.a, atol=1e-5)


def test_random_start_draws_a_new_a_for_every_task_and_zero_b():
    method = make("slao", {"start_a": "random", "start_b": "zero"})
    one, two = method.start(after(method, drawn(1))), method.start(after(method, drawn(1), drawn(2)))
    for name in LAYERS:
        assert not np.array_equal(one[name].a, two[name].a)
        assert not one[name].b.any() and not two[name].b.any()


def test_last_merge_starts_from_the_merged_b():
    method = make("slao", {"start_b": "merged"})
    state = after(method, drawn(1), drawn(2))
    for name, start in method.start(state).items():
        assert np.array_equal(start.b, state.deployed[name].b)


def test_zero_start_of_b_keeps_the_basis():
    method = make("slao", {"start_b": "zero"})
    state = after(method, drawn(1))
    for name, start in method.start(state).items():
        assert not start.b.any()
        np.testing.assert_allclose(start.a, make("slao").start(state)[name].a, **CLOSE)


def test_merging_both_factors_moves_both_and_keeps_both_tuned_ones():
    method = make("slao", {"merged": "a and b"})
    state = after(method, drawn(1), drawn(2))
    weight = 2**-0.5
    for name, (one, two) in {n: (drawn(1)[n], drawn(2)[n]) for n in LAYERS}.items():
        np.testing.assert_allclose(state.deployed[name].a, (1 - weight) * one.a + weight * two.a, **CLOSE)
        np.testing.assert_allclose(state.deployed[name].b, (1 - weight) * one.b + weight * two.b, **CLOSE)
        np.testing.assert_allclose(method.start(state)[name].a, orthogonal_init(two.a.astype(np.float64)), **CLOSE)
        assert np.array_equal(method.start(state)[name].b, two.b)
    assert set(state.kept) == {"tuned_a", "tuned_b"}


def test_merged_b_is_fitted_to_the_new_a_before_it_is_merged():
    state = after(make("slao", {"merged": "b moved"}), drawn(1), drawn(2))
    for name, (one, two) in {n: (drawn(1)[n], drawn(2)[n]) for n in LAYERS}.items():
        fitted = np.linalg.lstsq(two.a.T, (one.b @ one.a).T, rcond=None)[0].T
        np.testing.assert_allclose(state.deployed[name].b, fitted + 2**-0.5 * (two.b - fitted), atol=1e-5)
        assert np.array_equal(state.deployed[name].a, two.a)
    assert set(state.kept) == {"tuned_b"}


def test_merging_a_alone_deploys_the_tuned_b():
    method = make("slao", {"merged": "a"})
    state = after(method, drawn(1), drawn(2))
    for name, pair in state.deployed.items():
        weight, one, two = 2**-0.5, drawn(1)[name], drawn(2)[name]
        np.testing.assert_allclose(pair.a, (1 - weight) * one.a + weight * two.a, **CLOSE)
        assert np.array_equal(pair.b, two.b)
        np.testing.assert_allclose(method.start(state)[name].a, orthogonal_init(two.a.astype(np.float64)), **CLOSE)
    assert set(state.kept) == {"tuned_a"}


def test_merging_nothing_deploys_the_tuned_pair_and_keeps_nothing_else():
    method = make("slao", {"merged": "none"})
    state = after(method, drawn(1), drawn(2))
    assert state.kept == {}
    for name, tuned in drawn(2).items():
        assert np.array_equal(state.deployed[name].a, tuned.a) and np.array_equal(state.deployed[name].b, tuned.b)
        np.testing.assert_allclose(method.start(state)[name].a, orthogonal_init(tuned.a.astype(np.float64)), **CLOSE)


@pytest.mark.parametrize(
    ("weight", "weights"), [("1/t", (1 / 3, 1 / 3, 1 / 3)), (0.5, (0.25, 0.25, 0.5)), (1, (0, 0, 1))]
)
def test_other_weights_give_the_running_mean_a_fading_memory_and_the_last_task(weight, weights):
    state = after(make("slao", {"weight": weight}), drawn(1), drawn(2), drawn(3))
    for name, pair in state.deployed.items():
        expected = sum(w * drawn(i + 1)[name].b for i, w in enumerate(weights))
        np.testing.assert_allclose(pair.b, expected, **CLOSE)


@pytest.mark.parametrize("train", ["a", "b"])
def test_the_factor_that_does_not_train_is_drawn_once_and_never_changed(train):
    method = make("slao", {"train": train, "start_a": "keep", "merged": train, "first_a": "orthonormal"})
    state = empty_state(LAYERS, RANK)
    assert method.rates(state) == {"a": float(train == "a"), "b": float(train == "b")}
    first = method.start(state)
    frozen, trained = ("b", "a") if train == "a" else ("a", "b")
    for step in range(3):
        start = method.start(state)
        for name in LAYERS:
            assert np.array_equal(getattr(start[name], frozen), getattr(first[name], frozen))
        tuned = {name: pair._replace(**{trained: getattr(pair, trained) + step + 1}) for name, pair in start.items()}
        state = method.finish(state, tuned)
    for name in LAYERS:
        assert getattr(first[name], frozen).any() and not getattr(first[name], trained).any()
        assert np.array_equal(getattr(state.deployed[name], frozen), getattr(first[name], frozen))


def test_every_combination_either_works_for_three_tasks_or_is_refused_when_made():
    made = 0
    for start_a, first_a, start_b, merged, weight, train in itertools.product(
        ("qr", "qr-preserving", "keep", "random"),
        ("uniform", "orthonormal"),
        ("tuned", "merged", "zero"),
        ("b", "b moved", "a", "a and b", "none"),
        ("1/sqrt(t)", "1/t", 0.5),
        ("a and b", "a", "b"),
    ):
        options = dict(start_a=start_a, first_a=first_a, start_b=start_b, merged=merged, weight=weight, train=train)
        try:
            method = make("slao", options)
        except InputError:
            continue
        made += 1
        state = empty_state(LAYERS, RANK)
        for seed in range(3):
            for name, (out, inner) in LAYERS.items():
                start = method.start(state)[name]
                assert start.a.shape == (RANK, inner) and start.b.shape == (out, RANK)
            state = method.finish(state, drawn(seed))
        assert state.t == 3 and set(state.deployed) == set(LAYERS)
    # Both train: (70 with qr or keep, 7 with qr-preserving, 13 with random) * 2 first A; 4 * 2 for A alone and B alone.
    assert made == (70 + 7 + 13) * 2 + 8 + 8


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"start_a": "svd"}, "slao: start_a: expected one of qr, qr-preserving, keep, random, got 'svd'"),
        ({"first_a": "zero"}, "slao: first_a: expected one of uniform, orthonormal, got 'zero'"),
        ({"start_b": "random"}, "slao: start_b: expected one of tuned, merged, zero, got 'random'"),
        ({"merged": "both"}, "slao: merged: expected one of b, b moved, a, a and b, none, got 'both'"),
        ({"train": "c"}, "slao: train: expected one of a and b, a, b, got 'c'"),
        ({"weight": 0}, r"slao: weight: expected 1/sqrt\(t\), 1/t or a constant in \(0, 1\], got 0"),
        ({"weight": 1.5}, "got 1.5"),
        ({"weight": True}, "got True"),
        ({"weight": float("nan")}, "got nan"),
        ({"weight": "1/t^2"}, "got '1/t\\^2'"),
        ({"start_a": "random"}, "a random start of A has no meaning for a B tuned with another A; use start_b 'zero'"),
        ({"start_a": "random", "start_b": "merged"}, "a random start of A has no meaning"),
        ({"start_a": "qr-preserving", "start_b": "zero"}, "a start that keeps the function needs B"),
        ({"start_a": "qr-preserving", "merged": "a and b"}, "merged B has no basis to be moved to"),
        ({"start_a": "qr-preserving", "merged": "a"}, "merged B has no basis to be moved to"),
        ({"start_a": "qr-preserving", "merged": "b moved"}, "moves merged B itself; use merged 'b'"),
        ({"merged": "none", "start_b": "merged"}, "with nothing merged there is neither a merged B"),
        ({"merged": "none", "weight": "1/t"}, "nor a weight"),
        ({"merged": "a", "start_b": "merged"}, "with A alone merged there is no merged B to start from"),
        ({"train": "b"}, "a factor that does not train stays as it is; use start_a 'keep' and start_b 'tuned'"),
        ({"train": "a", "start_a": "keep", "start_b": "merged", "merged": "a and b"}, "does not train stays as it is"),
        ({"train": "a", "start_a": "keep"}, "only 'a' trains, so nothing else can be merged; use merged 'a' or 'none'"),
        ({"train": "b", "start_a": "keep", "merged": "a and b"}, "only 'b' trains"),
    ],
)
def test_what_has_no_meaning_is_refused(options, message):
    with pytest.raises(InputError, match=message):
        make("slao", options)


# --- sequential ------------------------------------------------------------------------------------------------------


def test_sequential_goes_on_from_its_own_pair_and_deploys_it():
    method = make("sequential")
    state = after(method, drawn(1), drawn(2))
    for name, tuned in drawn(2).items():
        assert np.array_equal(state.deployed[name].b, tuned.b) and np.array_equal(method.start(state)[name].a, tuned.a)
    assert state.t == 2 and state.kept == {}


def test_sequential_is_slao_with_nothing_merged_and_a_kept_as_it_is():
    same = make("slao", {"start_a": "keep", "merged": "none"})
    one, other = after(make("sequential"), drawn(1), drawn(2)), after(same, drawn(1), drawn(2))
    for name in LAYERS:
        assert np.array_equal(one.deployed[name].b, other.deployed[name].b)
        assert np.array_equal(make("sequential").start(one)[name].a, same.start(other)[name].a)
    empty = empty_state(LAYERS, RANK)
    assert np.array_equal(make("sequential").start(empty)["q"].a, same.start(empty)["q"].a)


def test_sequential_refuses_another_first_a():
    with pytest.raises(InputError, match="sequential: first_a: expected one of uniform, orthonormal, got 'ones'"):
        make("sequential", {"first_a": "ones"})
