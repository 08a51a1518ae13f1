"""What every method has in common: the registry, the first draw, the empty state."""

import inspect
import json

import numpy as np
import pytest

from mbf_mlx import methods
from mbf_mlx.errors import InputError
from mbf_mlx.methods import Method, Seen, State, TokenRow, empty_state, first_factors, in_double, make, registry

LAYERS = {"model.layers.0.self_attn.q_proj": (6, 9), "model.layers.0.self_attn.v_proj": (4, 9)}


def test_the_products_own_method_comes_first():
    assert methods.names()[:2] == ["slao", "sequential"]


def test_an_unknown_method_is_refused_with_the_known_ones():
    with pytest.raises(InputError, match=r"method: expected one of slao, sequential.*, got 'sloa'"):
        make("sloa")


@pytest.mark.parametrize("name", methods.names())
def test_an_unknown_option_is_refused_by_name(name):
    with pytest.raises(InputError, match=f"method {name}: .*no_such_option"):
        make(name, {"no_such_option": 1})


@pytest.mark.parametrize("name", methods.names())
def test_options_of_any_type_are_taken_or_refused_in_a_sentence(name):
    refused = 0
    for option in inspect.signature(registry._METHODS[name]).parameters:
        for value in ([1], {"a": 1}, "x", None, True, -1, float("inf")):
            try:
                make(name, {option: value})
            except InputError as error:
                refused += 1
                assert name in str(error) or "method" in str(error)
    assert refused


@pytest.mark.parametrize("name", methods.names())
def test_a_method_is_made_again_from_the_options_it_writes(name):
    method = make(name)
    assert method.name == name
    assert make(name, json.loads(json.dumps(method.options))).options == method.options


VARIANTS = [
    *((name, {}) for name in methods.names()),
    ("products", {"metric": "inputs"}),
    ("products", {"rate_a": 0.5}),
    ("slao", {"train": "a", "start_a": "keep", "merged": "a"}),
    ("replay", {"method": "anchored"}),
    ("nmt-lora", {"modules": "all"}),
]


def overrides(method, hook):
    return getattr(type(method), hook) is not getattr(Method, hook)


@pytest.mark.parametrize(("name", "options"), VARIANTS, ids=str)
def test_a_method_says_what_it_needs_of_a_tasks_rows(name, options):
    method = make(name, options)
    assert overrides(method, "measure") or "inputs" not in method.needs
    assert overrides(method, "after_task") or not method.needs - {"inputs"}


@pytest.mark.parametrize(("name", "options"), VARIANTS, ids=str)
def test_tasks_may_be_trained_elsewhere_where_the_method_adds_nothing_to_the_training(name, options):
    method, state = make(name, options), empty_state(LAYERS, rank=2)
    if not overrides(method, "absorb"):
        adds = [hook for hook in ("effective", "penalty", "after_task", "extra_rows") if overrides(method, hook)]
        state = state if method.needs else method.finish(state, method.start(state))
        slower = any(rate != 1 for rate in method.rates(state).values())
        assert method.absorbs == (not adds and not slower)


def test_the_hooks_that_a_method_leaves_out_do_nothing():
    method, state = make("slao"), empty_state(LAYERS, rank=2)
    start = method.start(state)
    assert method.effective(start, state) is start and method.penalty(start, state) is None
    assert set(method.rates(state).values()) == {1.0} and make("sequential").rates(state) == {}
    assert method.measure(state, start) == {} and method.extra_rows(state, 3) == []
    assert method.after_task(state, [], {}) is state
    absorbed, finished = method.absorb(state, start), method.finish(state, start)
    assert absorbed.t == finished.t == 1 and absorbed.deployed.keys() == finished.deployed.keys()


@pytest.mark.parametrize("first_a", ["uniform", "orthonormal"])
def test_first_factors_are_random_a_and_zero_b_in_single_precision(first_a):
    factors = first_factors(empty_state(LAYERS, rank=3), first_a)
    assert set(factors) == set(LAYERS)
    for name, (out, inner) in LAYERS.items():
        a, b = factors[name]
        assert a.shape == (3, inner) and b.shape == (out, 3)
        assert a.dtype == b.dtype == np.float32
        assert not b.any()
        if first_a == "uniform":
            assert np.abs(a).max() <= 1 / np.sqrt(inner) and np.std(a) > 0.3 / np.sqrt(inner)
        else:
            np.testing.assert_allclose(a @ a.T, np.eye(3), atol=1e-6)


def test_first_factors_can_draw_b_and_leave_a_at_zero():
    for name, (a, b) in first_factors(empty_state(LAYERS, rank=3), "orthonormal", zero="a").items():
        assert not a.any() and a.shape == (3, LAYERS[name][1])
        np.testing.assert_allclose(b.T @ b, np.eye(3), atol=1e-6)


def test_first_factors_depend_on_seed_and_task_and_not_on_the_order_of_layers():
    def first_a(layers=LAYERS, seed=0, t=0):
        state = State(t=t, layers=layers, rank=3, seed=seed)
        return first_factors(state, "uniform")["model.layers.0.self_attn.q_proj"].a

    turned = dict(reversed(LAYERS.items()))
    assert np.array_equal(first_a(), first_a(turned))
    assert not np.array_equal(first_a(), first_a(seed=1))
    assert not np.array_equal(first_a(), first_a(t=1))


def test_a_rank_larger_than_a_layer_names_every_such_layer():
    with pytest.raises(InputError, match="rank 5 is larger") as error:
        empty_state(LAYERS, rank=5)
    assert "v_proj: 4 x 9" in str(error.value) and "q_proj" not in str(error.value)


def test_kept_bytes_count_the_deployed_pair_and_what_the_next_task_needs():
    state = empty_state({"layer": (6, 9)}, rank=3)
    assert state.kept_bytes() == 0
    method = make("slao")
    state = method.finish(state, method.start(state))
    assert state.kept_bytes() == 4 * (3 * 9 + 2 * 6 * 3)  # one A and two B, as the paper says


@pytest.mark.parametrize("name", methods.names())
def test_what_a_method_keeps_grows_with_the_tasks_only_where_it_says_so(name):
    method, state, sizes = make(name), empty_state(LAYERS, rank=2), []
    for seed in range(6):
        generator = np.random.default_rng(seed)
        start = method.start(state)
        tuned = {
            layer: type(fields)(*(x + generator.normal(size=x.shape).astype(np.float32) for x in fields))
            for layer, fields in start.items()
        }
        asked = method.measure(state, tuned)
        state = method.finish(
            state, tuned, {n: Seen(p, p) for n, p in asked.items()} or None
        )  # in all directions alike
        if "rows" in method.needs:
            rows = [TokenRow(np.full(40, 100 * seed + i, dtype=np.int32), np.arange(40) > 30) for i in range(100)]
            state = method.after_task(state, rows, {})
        if "gradients" in method.needs:
            state = method.after_task(state, [], {n: type(f)(*(x * x for x in f)) for n, f in tuned.items()})
        assert state.t == seed + 1 and set(state.deployed) == set(LAYERS)
        assert len({pair.a.shape[0] for pair in state.deployed.values()}) == 1  # an adapter has one rank
        sizes.append(state.kept_bytes())
    if method.grows:
        assert sorted(set(sizes)) == sizes
    else:
        assert len(set(sizes[1:])) == 1, sizes


def test_numpy_arrays_are_computed_in_double_precision_and_come_back_as_they_were():
    seen = []

    def twice(a, b):
        seen.extend([a.dtype, b.dtype])
        return 2 * a, 2 * b

    a, b = in_double(twice, np.ones(2, dtype=np.float32), np.ones(3, dtype=np.float32))
    assert seen == [np.float64, np.float64] and a.dtype == b.dtype == np.float32
    assert in_double(np.sum, np.ones((2, 2), dtype=np.float32)).dtype == np.float32
