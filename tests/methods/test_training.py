"""Methods that take part in training: penalties, rows, and pairs made of more than what trains.

Long, because the hand-worked values of each method stand beside its test.
"""

import math

import numpy as np
import pytest

from mbf_mlx.errors import InputError
from mbf_mlx.methods import Pair, Seen, State, TokenRow, empty_state, make, names
from mbf_mlx.methods.lorac import Composed
from tests.support import arrays
from tests.support.arrays import single, to_numpy

xp = arrays.xp
LAYERS = {"q": (8, 9), "v": (7, 9)}
RANK = 3
CLOSE = {"rtol": 0, "atol": 5e-6}


def noise(seed, fields, size=1.0):
    """The same named tuple with something added to every array, as training would."""
    generator = np.random.default_rng(seed)
    return type(fields)(*(x + size * generator.normal(size=x.shape).astype(np.float32) for x in fields))


def drawn(seed, layers=LAYERS, rank=RANK):
    zeros = {n: Pair(np.zeros((rank, i), np.float32), np.zeros((o, rank), np.float32)) for n, (o, i) in layers.items()}
    return {name: noise(seed, pair) for name, pair in zeros.items()}


def squares(tuned):
    """Mean squared gradients as a task might have had."""
    return {name: type(fields)(*(x * x + 0.1 for x in fields)) for name, fields in tuned.items()}


def run(method, tasks, layers=LAYERS, rank=RANK, seed=0):
    """The state after tasks whose training adds noise, and all that was tuned."""
    state, chain = empty_state(layers, rank, seed), []
    for t in range(tasks):
        start = method.start(state)
        tuned = {name: noise(100 + t, fields, 0.3) for name, fields in start.items()}
        chain.append(tuned)
        asked = method.measure(state, tuned)
        state = method.finish(state, tuned, {name: Seen(p, p) for name, p in asked.items()} or None)  # alike everywhere
        if "gradients" in method.needs:
            state = method.after_task(state, [], squares(tuned))
    return state, chain


def update(pair):
    return pair.b.astype(np.float64) @ pair.a.astype(np.float64)


def one(a, b):
    """Factors of a single 1 x 1 layer, worked with by hand."""
    return {"w": Pair(np.array([[a]], dtype=np.float32), np.array([[b]], dtype=np.float32))}


# --- EWC and L2 ------------------------------------------------------------------------------------------------------


def test_ewc_by_hand():
    # After task 1: x = (2, 3), F = (0.5, 0.25). After task 2: x = (1, 1), F = 0.5 * F + (1, 2) = (1.25, 2.125).
    method = make("ewc", {"strength": 10, "fading": 0.5})
    state = method.after_task(method.finish(empty_state({"w": (1, 1)}, 1), one(2, 3)), [], one(0.5, 0.25))
    assert float(method.penalty(one(4, 2), state)) == pytest.approx(5 * (0.5 * 4 + 0.25 * 1))
    state = method.after_task(method.finish(state, one(1, 1)), [], one(1, 2))
    assert float(method.penalty(one(3, 2), state)) == pytest.approx(5 * (1.25 * 4 + 2.125 * 1))


def test_l2_by_hand():
    method = make("l2", {"strength": 4})
    state = method.finish(empty_state({"w": (1, 1)}, 1), one(2, 3))
    assert float(method.penalty(one(5, 2), state)) == pytest.approx(2 * (9 + 1))


@pytest.mark.parametrize("name", ["ewc", "l2", "nmt-lora", "anchored"])
def test_methods_with_a_penalty_go_on_from_their_own_pair_and_deploy_it(name):
    method = make(name)
    state, chain = run(method, 2)
    for layer, tuned in chain[-1].items():
        assert np.array_equal(state.deployed[layer].b, tuned.b)
        assert np.array_equal(method.start(state)[layer].a, tuned.a)


@pytest.mark.parametrize("name", ["ewc", "l2", "nmt-lora", "o-lora", "c-lora", "anchored", "anchored-merge"])
def test_there_is_nothing_to_hold_back_in_the_first_task(name):
    method, state = make(name), empty_state(LAYERS, RANK)
    assert method.penalty(method.start(state), state) is None


PENALTIES = ["ewc", "l2", "nmt-lora", "o-lora", "c-lora", "lorac", "anchored", "anchored-merge"]


@pytest.mark.parametrize("name", PENALTIES)
def test_a_penalty_is_the_same_in_every_library(xp, name):
    options = {"shrink": 0.1} if name == "o-lora" else {}
    method = make(name, options)
    state, _ = run(method, 2)
    tuned = {layer: noise(7, fields) for layer, fields in method.start(state).items()}
    expected = float(method.penalty(tuned, state))
    assert expected > 0
    there = {layer: type(fields)(*(single(xp, x) for x in fields)) for layer, fields in tuned.items()}
    assert float(method.penalty(there, state.to(xp))) == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("name", PENALTIES)
def test_mlx_differentiates_a_penalty_and_what_is_applied_as_finite_differences_do(name):
    mx = pytest.importorskip("mlx.core", reason="mlx is not installed: pip install 'mbf-mlx[cpu]'")
    options = {"shrink": 0.1} if name == "o-lora" else {}
    method = make(name, options)
    state, _ = run(method, 2)
    tuned = {layer: noise(8, fields, 0.1) for layer, fields in method.start(state).items()}
    kinds = {layer: type(fields) for layer, fields in tuned.items()}
    probe = {layer: np.random.default_rng(9).normal(size=(LAYERS[layer])).astype(np.float32) for layer in LAYERS}

    def loss(library, fields, state, probe):
        """The penalty, and a stand-in for the model's loss that sees every applied update."""
        pairs = method.effective(fields, state)
        seen = sum((probe[layer] * (pair.b @ pair.a)).sum() for layer, pair in pairs.items())
        return method.penalty(fields, state) + seen

    there = state.to(mx)
    on_mlx = {layer: mx.array(x) for layer, x in probe.items()}
    arrays_there = {layer: [mx.array(x) for x in fields] for layer, fields in tuned.items()}
    gradients = mx.grad(lambda f: loss(mx, {n: kinds[n](*x) for n, x in f.items()}, there, on_mlx))(arrays_there)
    exact = State(t=state.t, layers=state.layers, rank=RANK, deployed=_double(state.deployed), kept=_double(state.kept))
    step, generator = 1e-6, np.random.default_rng(10)
    for layer, fields in tuned.items():
        for i, x in enumerate(fields):
            index = tuple(generator.integers(0, n) for n in x.shape)
            sides = []
            for sign in (1, -1):
                moved = {n: [y.astype(np.float64).copy() for y in f] for n, f in tuned.items()}
                moved[layer][i][index] += sign * step
                sides.append(float(loss(np, {n: kinds[n](*y) for n, y in moved.items()}, exact, probe)))
            slope = (sides[0] - sides[1]) / (2 * step)
            assert float(gradients[layer][i][index]) == pytest.approx(slope, rel=1e-3, abs=1e-3), (layer, i)


def _double(tree):
    if isinstance(tree, dict):
        return {key: _double(value) for key, value in tree.items()}
    if isinstance(tree, Pair):
        return Pair(*(_double(x) for x in tree))
    return tree.astype(np.float64)


@pytest.mark.parametrize("name", PENALTIES)
def test_a_penalty_has_finite_gradients_at_the_start_of_a_task(name):
    mx = pytest.importorskip("mlx.core", reason="mlx is not installed: pip install 'mbf-mlx[cpu]'")
    options = {"shrink": 0.1} if name == "o-lora" else {"first_a": "orthonormal"}
    method = make(name, options)
    state, _ = run(method, 1)
    start = method.start(state)
    kinds, there = {n: type(f) for n, f in start.items()}, state.to(mx)
    fields = {n: [mx.array(x) for x in f] for n, f in start.items()}
    gradients = mx.grad(lambda f: method.penalty({n: kinds[n](*x) for n, x in f.items()}, there))(fields)
    assert all(bool(mx.isfinite(g).all()) for part in gradients.values() for g in part)


# --- anchored --------------------------------------------------------------------------------------------------------


def with_inputs(method, chain, inputs, layers):
    """The state after tasks that were tuned to `chain`, each having shown the layers its inputs, (n, in)."""
    state = empty_state(layers, RANK)
    for tuned, x in zip(chain, inputs, strict=True):
        asked = method.measure(state, tuned)
        seen = {name: Seen(p, ((x @ p.T).T @ x / len(x)).astype(np.float32)) for name, p in asked.items()}
        state = method.finish(state, tuned, inputs=seen)
    return state


@pytest.mark.parametrize("inner", [24, 500])  # all of the input's directions measured, and few of them
def test_anchored_pays_for_what_the_update_does_otherwise_to_old_inputs(inner):
    layers, generator, method = {"q": (30, inner), "v": (12, inner)}, np.random.default_rng(3), make("anchored")
    spread = generator.normal(size=(1, inner)), generator.normal(size=(1, inner))
    inputs = [generator.normal(size=(50, 1)) @ each for each in spread]  # two directions: fewer than are kept
    state = with_inputs(method, [drawn(t, layers) for t in range(2)], inputs, layers)
    new, expected = drawn(9, layers), []
    for name in layers:
        changed, old = update(new[name]) - update(state.deployed[name]), update(state.deployed[name])
        sizes = [np.mean([np.sum(np.square(x @ w.T)) / len(x) for x in inputs]) for w in (changed, old)]
        expected.append(sizes[0] / sizes[1])
    assert float(method.penalty(new, state)) == pytest.approx(10 * np.mean(expected), rel=1e-3)
    # What is nothing to old inputs costs nothing.
    seen = np.linalg.qr(np.concatenate(spread).T)[0].T
    free = {n: Pair(p.a + a - a @ seen.T @ seen, p.b) for (n, p), (a, _) in zip(state.deployed.items(), new.values())}
    assert float(method.penalty(free, state)) < 1e-4 * float(method.penalty(new, state))


def test_anchored_keeps_two_pairs_at_most_and_the_largest_directions():
    layers, method = {"q": (10, 10), "v": (4, 10), "up": (30, 10)}, make("anchored")
    generator = np.random.default_rng(1)
    inputs = [generator.normal(size=(90, 10)) * np.arange(10, 0, -1) ** 2 for _ in range(3)]
    state = with_inputs(method, [drawn(t, layers) for t in range(3)], inputs, layers)
    assert state.kept_bytes() <= 2 * 4 * sum(RANK * (out + inner) for out, inner in layers.values())
    gram = np.mean([x.T @ x / len(x) for x in inputs], axis=0)
    for name, count in {"q": 10, "v": 8, "up": 10}.items():
        assert state.kept["sketch"][name].dtype == np.float16
        kept = state.kept["sketch"][name].astype(np.float64)
        assert kept.shape == (count, 10)
        values, vectors = np.linalg.eigh(gram)
        nearest = (vectors[:, -count:] * values[-count:]) @ vectors[:, -count:].T
        assert np.linalg.norm(kept.T @ kept - gram) < 1.02 * np.linalg.norm(nearest - gram) + 1e-3 * np.linalg.norm(
            gram
        )


def test_anchored_stays_finite_where_inputs_are_larger_than_half_precision_knows():
    layers, method = {"q": (8, 9)}, make("anchored")
    state = with_inputs(method, [drawn(0, layers)], [1e7 * np.eye(9)], layers)
    assert state.kept["sketch"]["q"].max() == np.finfo(np.float16).max
    assert math.isfinite(method.penalty(drawn(1, layers), state))


def test_anchored_takes_a_layer_that_did_nothing_to_old_inputs_as_it_is():
    layers, method = {"q": (8, 9), "v": (7, 9)}, make("anchored", {"strength": 2})
    tuned = drawn(0, layers)
    tuned["v"] = Pair(tuned["v"].a, 0 * tuned["v"].b)
    state = with_inputs(method, [tuned], [np.eye(9)], layers)
    moved = tuned | {"v": Pair(np.eye(3, 9, dtype=np.float32), np.full((7, 3), 0.5, np.float32))}
    sketch = state.kept["sketch"]["v"].astype(np.float64)
    assert float(method.penalty(moved, state)) == pytest.approx(
        np.square(update(moved["v"]) @ sketch.T).sum(), rel=1e-4
    )


def test_anchored_merges_what_was_tuned_elsewhere_by_the_inputs_of_both():
    layers, method, generator = {"q": (30, 24), "v": (12, 24)}, make("anchored"), np.random.default_rng(5)
    directions = np.linalg.qr(generator.normal(size=(24, 4)))[0].T
    old, new = (generator.normal(size=(50, 2)) @ directions[i : i + 2] for i in (0, 2))
    before = with_inputs(method, [drawn(0, layers)], [old], layers)
    tuned = drawn(1, layers)
    seen = {n: Seen(p, ((new @ p.T).T @ new / 50).astype(np.float32)) for n, p in method.measure(before, tuned).items()}
    after = method.absorb(before, tuned, seen)
    assert after.t == 2
    for name in layers:
        was, wanted, now = (update(factors[name]) for factors in (before.deployed, tuned, after.deployed))
        for x, right in ((old, was), (new, wanted)):  # each side's outputs on its own inputs, up to the ridge
            assert np.linalg.norm(x @ (now - right).T) < 0.2 * np.linalg.norm(x @ (was - wanted).T)
        np.testing.assert_allclose(
            after.kept["sketch"][name], method.finish(before, tuned, seen).kept["sketch"][name], rtol=1e-6
        )
        a = after.deployed[name].a.astype(np.float64)
        np.testing.assert_allclose(a @ a.T, np.eye(RANK), atol=1e-5)


def test_anchored_merges_as_products_where_all_inputs_are_alike():
    layers, method = {"up": (30, 10)}, make("anchored")  # a layer whose sketch holds every direction
    before = with_inputs(method, [drawn(0, layers)], [np.eye(10)], layers)
    tuned = drawn(1, layers)
    seen = {n: Seen(p, (p / 10).astype(np.float32)) for n, p in method.measure(before, tuned).items()}
    after, weight = method.absorb(before, tuned, seen), 2**-0.5
    mixed = (1 - weight) * update(before.deployed["up"]) + weight * update(tuned["up"])
    left, values, right = np.linalg.svd(mixed)
    expected = (left[:, :RANK] * values[:RANK]) @ right[:RANK]
    half = 1e-3 * np.abs(expected).max()  # the sketch's precision
    np.testing.assert_allclose(update(after.deployed["up"]), expected, atol=half)


def test_anchored_absorbs_a_first_task_as_it_is_and_refuses_layers_too_small_for_two_pairs():
    layers, method = {"q": (30, 24), "small": (9, 5)}, make("anchored")
    state, tuned = empty_state(layers, RANK), drawn(0, layers)

    def seen(state):
        return {n: Seen(p, p) for n, p in method.measure(state, tuned).items()}

    state = method.absorb(state, tuned, seen(state))
    assert all(np.array_equal(state.deployed[n].b, tuned[n].b) for n in layers)
    wrong = r"^anchored: expected layers with at least 3 outputs and 6 inputs, .*got\n  small: 9 x 5$"
    with pytest.raises(InputError, match=wrong):
        method.absorb(state, tuned, seen(state))


def test_anchored_merge_takes_back_what_only_old_inputs_see_and_keeps_what_only_new_ones_do():
    layers, generator = {"q": (30, 24), "v": (12, 24)}, np.random.default_rng(5)
    method = make("anchored-merge")
    directions = np.linalg.qr(generator.normal(size=(24, 4)))[0].T
    old, new = (generator.normal(size=(50, 2)) @ directions[i : i + 2] for i in (0, 2))
    before = with_inputs(method, [drawn(0, layers)], [old], layers)
    tuned, plain = drawn(1, layers), make("anchored")
    seen = {n: Seen(p, ((new @ p.T).T @ new / 50).astype(np.float32)) for n, p in method.measure(before, tuned).items()}
    after, unmerged = method.finish(before, tuned, seen), plain.finish(before, tuned, seen)
    assert after.kept_bytes() == unmerged.kept_bytes() and float(method.penalty(after.deployed, after)) == 0.0
    for name in layers:
        was, wanted, now = (update(factors[name]) for factors in (before.deployed, tuned, after.deployed))
        apart = np.linalg.norm(old @ (wanted - was).T)
        # Up to the ridge and the cut; anchored alone leaves all of the first.
        assert np.linalg.norm(old @ (now - was).T) < 0.25 * apart
        assert np.linalg.norm(new @ (now - wanted).T) < 0.25 * np.linalg.norm(new @ (wanted - was).T)
        np.testing.assert_array_equal(after.kept["sketch"][name], unmerged.kept["sketch"][name])
        started = method.start(after)[name].a.astype(np.float64)
        np.testing.assert_allclose(started @ started.T, np.eye(RANK), atol=1e-5)


@pytest.mark.parametrize("weight", [0.0, 0.3, 1.0])
def test_anchored_merge_weighs_both_updates_where_all_inputs_are_alike(weight):
    layers, method = {"up": (30, 10)}, make("anchored-merge", {"weight": weight})
    before = with_inputs(method, [drawn(0, layers)], [np.eye(10)], layers)
    tuned = drawn(1, layers)
    seen = {n: Seen(p, (p / 10).astype(np.float32)) for n, p in method.measure(before, tuned).items()}
    mixed = (1 - weight) * update(before.deployed["up"]) + weight * update(tuned["up"])
    left, values, right = np.linalg.svd(mixed)
    expected = (left[:, :RANK] * values[:RANK]) @ right[:RANK]
    found = update(method.finish(before, tuned, seen).deployed["up"])
    np.testing.assert_allclose(found, expected, atol=1e-3 * np.abs(mixed).max())  # the sketch's precision


def test_anchored_merge_refuses_layers_too_small_for_two_pairs_before_anything_is_trained():
    wrong = r"^anchored-merge: expected layers with at least 3 outputs and 6 inputs, .*got\n  small: 9 x 5$"
    with pytest.raises(InputError, match=wrong):
        make("anchored-merge").start(empty_state({"q": (30, 24), "small": (9, 5)}, RANK))


# --- LoRA for translation --------------------------------------------------------------------------------------------


def test_the_history_of_gradients_is_a_mean_of_relative_magnitudes():
    # Squared gradients 1, 9 are magnitudes 1, 3, relative 0.5, 1.5; then 4, 4 are 1, 1; their mean is 0.75, 1.25.
    layers = {"w": (1, 2)}
    method = make("nmt-lora", {"strength": 2})
    pair = Pair(np.zeros((1, 2), np.float32), np.zeros((1, 1), np.float32))
    state = empty_state(layers, 1)
    for values in ([1, 9], [4, 4]):
        state = method.finish(state, {"w": pair})
        state = method.after_task(
            state, [], {"w": Pair(np.array([values], np.float32), np.full((1, 1), 25.0, np.float32))}
        )
    moved = {"w": Pair(np.array([[1.0, 2.0]], np.float32), np.array([[3.0]], np.float32))}
    assert float(method.penalty(moved, state)) == pytest.approx(0.75 * 1 + 1.25 * 4 + 1.0 * 9)


def test_modules_are_mixed_equally_and_again_without_training():
    method = make("nmt-lora", {"modules": "all"})
    assert method.grows and not method.needs
    state, chain = run(method, 3)
    again = method.calibrate(state, [0.0, 2.0, -0.5])
    for name in LAYERS:
        updates = [update(tuned[name]) for tuned in chain]
        np.testing.assert_allclose(update(state.deployed[name]), sum(updates) / 3, **CLOSE)
        np.testing.assert_allclose(update(again.deployed[name]), 2 * updates[1] - 0.5 * updates[2], **CLOSE)
    with pytest.raises(ValueError, match="expected 3 weights, one a task, got 2"):
        method.calibrate(state, [1.0, 1.0])


def test_modules_start_from_one_draw():
    method = make("nmt-lora", {"modules": "all"})
    state, _ = run(method, 2)
    first = method.start(empty_state(LAYERS, RANK))
    assert all(np.array_equal(method.start(state)[name].a, first[name].a) for name in LAYERS)


# --- rows ------------------------------------------------------------------------------------------------------------


def rows_of(task, count, length=40):
    """Rows that tell their task and their number; the last third of each is supervised."""
    tokens = [np.arange(length, dtype=np.int32) + 1_000_000 * task + 100 * i for i in range(count)]
    return [TokenRow(t, np.arange(length) >= 2 * length // 3) for t in tokens]


def fill(method, counts, length=40, seed=0):
    state = empty_state(LAYERS, RANK, seed)
    for t, count in enumerate(counts, start=1):
        state = method.finish(state, method.start(state))
        state = method.after_task(state, rows_of(t, count, length), {})
    return state


def tasks_in(rows):
    return [int(row.tokens[0]) // 1_000_000 for row in rows]


def test_rows_come_out_of_the_reservoir_as_they_went_in():
    method = make("replay", {"share": 1.0})
    state = fill(method, [5])
    got = {row.tokens.tobytes(): row for row in method.extra_rows(state, 100)}
    assert len(got) == 5
    for row in rows_of(1, 5):
        assert np.array_equal(got[row.tokens.tobytes()].supervised, row.supervised)
        assert got[row.tokens.tobytes()].tokens.dtype == np.int32


def test_the_reservoir_never_holds_more_bytes_than_it_may():
    for size in (2000, 5000, 40_000):
        method = make("replay", {"bytes": size})
        state = fill(method, [300, 300, 300])
        held = state.kept_bytes() - make("sequential").finish(empty_state(LAYERS, RANK), drawn(1)).kept_bytes()
        assert 0.9 * size < held <= size
        assert method.extra_rows(state, 10_000)


def test_the_tasks_share_the_reservoir_and_a_small_one_leaves_the_rest_to_the_others():
    method = make("replay", {"bytes": 20_000})
    counts = np.bincount(tasks_in(method.extra_rows(fill(method, [300, 10, 300]), 10_000)))
    assert counts[2] == 10 and abs(counts[1] - counts[3]) <= 1 and counts[1] > 30


def test_rows_in_the_reservoir_are_those_that_one_would_choose_with_all_at_hand():
    method = make("replay", {"bytes": 20_000})
    streamed = {row.tokens.tobytes() for row in method.extra_rows(fill(method, [200, 200, 200]), 10_000)}
    # All rows in a reservoir large enough for everything, then squeezed into the small one at once.
    large = make("replay", {"bytes": 1_000_000})
    everything = fill(large, [200, 200, 200])
    squeezed = method.after_task(everything, [], {})
    assert streamed == {row.tokens.tobytes() for row in method.extra_rows(squeezed, 10_000)}


def test_another_seed_keeps_other_rows():
    method = make("replay", {"bytes": 5000})
    one, other = (method.extra_rows(fill(method, [200], seed=seed), 10_000) for seed in (0, 1))
    assert {row.tokens.tobytes() for row in one} != {row.tokens.tobytes() for row in other}


def test_replay_mixes_in_a_share_of_the_tasks_own_rows():
    method = make("replay", {"share": 0.25})
    state = fill(method, [100, 100])
    chosen = method.extra_rows(state, 80)
    assert len(chosen) == 20 and len({row.tokens.tobytes() for row in chosen}) == 20
    assert [row.tokens.tobytes() for row in chosen] == [row.tokens.tobytes() for row in method.extra_rows(state, 80)]
    assert method.extra_rows(empty_state(LAYERS, RANK), 80) == []


def test_a_row_that_would_fill_the_reservoir_never_enters():
    method = make("replay", {"bytes": 2000})
    state = method.after_task(fill(method, [5]), [TokenRow(np.ones(300, np.int32), np.ones(300, bool))], {})
    assert len(method.extra_rows(state, 100)) == 5


def test_replay_goes_on_top_of_another_method():
    for name in ("slao", "products", "inclora"):
        inner, method = make(name), make("replay", {"method": name})
        state, alone = fill(method, [5, 5, 5]), empty_state(LAYERS, RANK)
        for _ in range(3):
            alone = inner.finish(alone, inner.start(alone))
        for layer in LAYERS:
            np.testing.assert_allclose(state.deployed[layer].b, alone.deployed[layer].b, **CLOSE)
            np.testing.assert_allclose(method.start(state)[layer].a, inner.start(alone)[layer].a, **CLOSE)
        assert len(method.extra_rows(state, 15)) == 15
        assert method.grows == inner.grows and method.rates(state) == inner.rates(state)


def test_replay_refuses_a_method_that_looks_at_rows_or_gradients_itself():
    with pytest.raises(InputError, match="replay: method: ewc needs a task's gradients itself"):
        make("replay", {"method": "ewc"})
    with pytest.raises(InputError, match="expected one of slao"):
        make("replay", {"method": "none"})
    with pytest.raises(InputError, match="replay: bytes: expected a number of at least 1000, got 10"):
        make("replay", {"bytes": 10})


def test_joint_training_sees_every_row_from_the_first_draw():
    method = make("joint")
    state = fill(method, [3, 4])
    assert tasks_in(method.extra_rows(state, 1)) == [1, 1, 1, 2, 2, 2, 2]
    first = method.start(empty_state(LAYERS, RANK))
    assert all(np.array_equal(method.start(state)[name].a, first[name].a) for name in LAYERS)
    tuned = make("joint", {"start": "tuned"}).start(state)
    assert all(np.array_equal(tuned[name].b, state.deployed[name].b) for name in LAYERS)


# --- pairs that grow -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["inclora", "o-lora"])
def test_a_new_pair_for_every_task_and_all_are_summed(name):
    method = make(name)
    state, chain = run(method, 3)
    for layer in LAYERS:
        expected = sum(update(tuned[layer]) for tuned in chain)
        np.testing.assert_allclose(update(state.deployed[layer]), expected, **CLOSE)
        assert state.deployed[layer].a.shape == (3 * RANK, 9)
        start = method.start(state)[layer]
        assert start.a.shape == (RANK, 9) and not start.b.any()
        assert not np.array_equal(start.a, method.start(empty_state(LAYERS, RANK))[layer].a)


def test_while_a_task_trains_the_old_pairs_are_applied_with_the_new_one(xp):
    method = make("inclora")
    state, chain = run(method, 2)
    tuned = {layer: Pair(single(xp, pair.a), single(xp, pair.b)) for layer, pair in drawn(5).items()}
    for layer, pair in method.effective(tuned, state.to(xp)).items():
        expected = update(chain[0][layer]) + update(chain[1][layer]) + update(drawn(5)[layer])
        np.testing.assert_allclose(to_numpy(pair.b) @ to_numpy(pair.a), expected, atol=1e-4)


def test_o_lora_by_hand():
    # A_old = (1, 2), A_new = (3, -1): |3 - 2| = 1, times 0.5. Norms of the new: root 10 and 2, times 0.1.
    layers = {"w": (1, 2)}
    method = make("o-lora", {"shrink": 0.1})
    old = {"w": Pair(np.array([[1.0, 2.0]], np.float32), np.ones((1, 1), np.float32))}
    new = {"w": Pair(np.array([[3.0, -1.0]], np.float32), np.array([[2.0]], np.float32))}
    state = method.finish(empty_state(layers, 1), old)
    assert float(method.penalty(new, state)) == pytest.approx(0.5 + 0.1 * (np.sqrt(10) + 2))


# --- LoRAC -----------------------------------------------------------------------------------------------------------


def test_lorac_weighs_the_old_pairs_and_adds_a_new_one():
    method = make("lorac", {"freeze": 0.0})
    state, chain = run(method, 3)
    for layer in LAYERS:
        first, second, third = (tuned[layer] for tuned in chain)
        assert isinstance(second, Composed) and third.omega.shape == (2,)
        expected = third.omega[0] * second.omega[0] * update(first) + third.omega[1] * update(second) + update(third)
        np.testing.assert_allclose(update(state.deployed[layer]), expected, atol=1e-5)
        np.testing.assert_array_equal(method.start(state)[layer].omega, np.ones(3))
    assert method.rates(state) == {"omega": 0.1}


def test_lorac_penalizes_stacked_rows_that_are_not_orthonormal_by_hand():
    # First task: A = (2): |4 - 1| = 3. Second: rows (2, 0), (0, 1): Q Q^T - I = diag(3, 0), its norm 3 again.
    method = make("lorac")
    layers = {"w": (2, 2)}
    old = {"w": Pair(np.array([[2.0, 0.0]], np.float32), np.ones((2, 1), np.float32))}
    new = {"w": Pair(np.array([[0.0, 1.0]], np.float32), np.ones((2, 1), np.float32))}
    empty = empty_state(layers, 1)
    assert float(method.penalty(old, empty)) == pytest.approx(3)
    assert float(method.penalty(new, method.finish(empty, old))) == pytest.approx(3)


def test_lorac_closes_the_layers_that_matter_most_and_they_never_change_again():
    layers = {f"layer{i}": (4, 5) for i in range(4)}
    method, state = make("lorac", {"freeze": 0.25}), empty_state({f"layer{i}": (4, 5) for i in range(4)}, 1)
    order = [2, 0, 3]
    for matters in order:
        start = method.start(state)
        tuned = {name: noise(1, fields, 0.5) for name, fields in start.items()}
        before = {name: update(pair) for name, pair in state.deployed.items()}
        state = method.finish(state, tuned)
        for name in layers:
            assert state.deployed[name].a.shape == (state.t, 5)
            if name not in tuned:
                np.testing.assert_allclose(update(state.deployed[name]), before[name], **CLOSE)
        size = {name: 100.0 if name == f"layer{matters}" else 1.0 for name in tuned}
        gradients = {n: type(f)(*(np.full_like(x, size[n]) for x in f)) for n, f in tuned.items()}
        state = method.after_task(state, [], gradients)
        assert f"layer{matters}" in state.kept["closed"]
    assert sorted(method.start(state)) == ["layer1"]
    tuned = method.start(state)
    state = method.after_task(method.finish(state, tuned), [], squares(tuned))
    assert sorted(method.start(state)) == ["layer1"]  # one layer always stays free


def test_lorac_importance_is_the_size_of_the_factor_times_that_of_its_gradient():
    # Layer x: |A| 1 with gradient 3, |B| 1 with gradient 1: 4. Layer y: 2 * 1 + 1 * 1 = 3. So x is closed.
    layers = {"x": (1, 1), "y": (1, 1)}
    method = make("lorac", {"freeze": 0.5})
    pair = lambda a, b: Pair(np.full((1, 1), a, np.float32), np.full((1, 1), b, np.float32))  # noqa: E731
    state = method.finish(empty_state(layers, 1), {"x": pair(-1, 1), "y": pair(2, 1)})
    state = method.after_task(state, [], {"x": pair(9, 1), "y": pair(1, 1)})
    assert set(state.kept["closed"]) == {"x"}


# --- C-LoRA ----------------------------------------------------------------------------------------------------------


def test_c_lora_routes_between_its_factors():
    method = make("c-lora")
    state, chain = run(method, 3)
    for layer in LAYERS:
        routing = sum(tuned[layer].r.astype(np.float64) for tuned in chain)
        a, b, _ = chain[-1][layer]
        np.testing.assert_allclose(update(state.deployed[layer]), b @ routing @ a, atol=1e-5)
        start = method.start(state)[layer]
        assert np.array_equal(start.a, a) and np.array_equal(start.b, b) and not start.r.any()
    applied = method.effective(method.start(state), state)
    for layer, pair in applied.items():
        np.testing.assert_allclose(pair.b, state.deployed[layer].b, **CLOSE)


def test_c_lora_begins_as_plain_lora():
    method, state = make("c-lora"), empty_state(LAYERS, RANK)
    plain = make("sequential").start(state)
    for layer, pair in method.effective(method.start(state), state).items():
        assert np.array_equal(pair.a, plain[layer].a) and not pair.b.any()
        np.testing.assert_array_equal(method.start(state)[layer].r, np.eye(RANK))


def test_c_lora_penalizes_new_routing_that_overlaps_the_old_by_hand():
    # R_old = [[2, 0], [0, 0]], R_delta = [[1, 0], [3, 0]]: R_old^T R_delta = [[2, 0], [0, 0]], squared 4, times 0.5.
    method = make("c-lora", {"orthogonal": 0.5})
    layers = {"w": (2, 2)}
    start = method.start(empty_state(layers, 2))["w"]
    state = method.finish(empty_state(layers, 2), {"w": start._replace(r=np.array([[2, 0], [0, 0]], np.float32))})
    tuned = {"w": method.start(state)["w"]._replace(r=np.array([[1, 0], [3, 0]], np.float32))}
    assert float(method.penalty(tuned, state)) == pytest.approx(2.0)
    assert method.rates(state) == {"a": 1.0, "b": 1.0}


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("ewc", {"strength": -1}, "ewc: strength: expected a number of at least 0, got -1"),
        ("ewc", {"fading": 2}, r"ewc: fading: expected a number in \[0, 1\], got 2"),
        ("l2", {"strength": None}, "l2: strength: expected a number of at least 0, got None"),
        ("nmt-lora", {"modules": "two"}, "nmt-lora: modules: expected one of one, all, got 'two'"),
        ("replay", {"share": -0.5}, "replay: share: expected a number of at least 0, got -0.5"),
        ("joint", {"start": "merged"}, "joint: start: expected one of first, tuned, got 'merged'"),
        ("inclora", {"first_a": 1}, "inclora: first_a: expected one of uniform, orthonormal, got 1"),
        ("o-lora", {"orthogonal": "much"}, "o-lora: orthogonal: expected a number of at least 0, got 'much'"),
        ("anchored", {"strength": -1}, "anchored: strength: expected a number of at least 0, got -1"),
        ("lorac", {"freeze": 1.5}, r"lorac: freeze: expected a number in \[0, 1\], got 1.5"),
        ("c-lora", {"rate_shared": -1}, "c-lora: rate_shared: expected a number of at least 0, got -1"),
    ],
)
def test_methods_that_train_along_refuse_options_outside_their_choices(name, options, message):
    with pytest.raises(InputError, match=message):
        make(name, options)


def test_these_methods_can_be_had():
    wanted = "slao sequential products frozen-a running-mean magmax task-arithmetic ties dare opcm ewc l2 replay"
    assert set(names()) == {
        *wanted.split(),
        "anchored",
        "anchored-merge",
        "inclora",
        "o-lora",
        "joint",
        "lorac",
        "c-lora",
        "nmt-lora",
    }
