"""Every continual method learns through the real way of learning, and what takes part in training does what it says.

Long, because one table of methods drives all of it.
"""

import dataclasses

import numpy as np
import pytest

from mbf_mlx import exchange, methods
from mbf_mlx.adapters import peft
from mbf_mlx.config import DataConfig, LoRAConfig, TrainConfig
from mbf_mlx.data.encode import Encoded, Encoder
from mbf_mlx.data.task import read_task
from mbf_mlx.errors import MemoryLimitError
from mbf_mlx.learning.events import Events
from mbf_mlx.methods import empty_state, make
from tests.support.rows import rows_of
from tests.support.streams import tune
from tests.support.taught import arrays, assert_same

mx = pytest.importorskip("mlx.core", reason="mlx is not installed: pip install 'mbf-mlx[cpu]'")

from mlx import nn  # noqa: E402

from mbf_mlx import Stream  # noqa: E402
from mbf_mlx.data.batches import make_batch  # noqa: E402
from mbf_mlx.engine import cpu_ops  # noqa: E402
from mbf_mlx.engine.choose import prepare  # noqa: E402
from mbf_mlx.engine.lora_layers import lora_layers  # noqa: E402
from mbf_mlx.engine.taps import called_by  # noqa: E402
from mbf_mlx.learning.after_training import after_training, with_extra  # noqa: E402
from mbf_mlx.learning.learner import load_learner  # noqa: E402
from mbf_mlx.learning.measure import input_moments, squared_gradients  # noqa: E402
from mbf_mlx.learning.train import train  # noqa: E402
from mbf_mlx.learning.tuning import Tuning  # noqa: E402

LORA = LoRAConfig(rank=2)
QUICK = TrainConfig(iters=2, batch_size=4, learning_rate=5e-3)
ALL = [(name, {}) for name in methods.names()] + [
    ("products", {"metric": "inputs"}),
    *(
        pytest.param(name, options, marks=pytest.mark.slow)  # few of the methods' variants need anything of their own
        for name, options in (
            ("products", {"rank": 3}),
            ("slao", {"train": "a", "start_a": "keep", "merged": "a"}),
            ("nmt-lora", {"modules": "all"}),
            ("ties", {"memory": "exact"}),
            ("replay", {"method": "inclora", "bytes": 2000}),
        )
    ),
]


@pytest.fixture(scope="module")
def learner(tiny_llama):
    """One tiny Llama for all methods; every task writes all of its factors."""
    return load_learner(tiny_llama, LORA)


@pytest.fixture(scope="module")
def tasks(tmp_path_factory):
    import json

    folder = tmp_path_factory.mktemp("tasks")
    for number in range(3):
        for split, count, seed in (("train", 8, number), ("test", 3, 10 + number)):
            path = folder / f"task{number}" / f"{split}.jsonl"
            path.parent.mkdir(exist_ok=True)
            path.write_text("".join(json.dumps(row) + "\n" for row in rows_of(count, seed)))
    return [folder / f"task{number}" for number in range(3)]


@pytest.fixture(scope="module")
def encoded(learner, tasks):
    task = read_task(tasks[0])
    return Encoder(learner.tokenizer, DataConfig()).all(task.train, task.path)


@pytest.fixture
def open_stream(tmp_path, tiny_llama, learner):
    """`open_stream(name, options)`: a new stream that uses the one loaded model."""

    def open_stream(name, options=None, folder="s"):
        return Stream.open(
            tmp_path / folder,
            base=str(tiny_llama),
            method=name,
            method_options=options,
            lora=LORA,
            load_learner=lambda *_: learner,
        )

    return open_stream


@pytest.mark.parametrize(("name", "options"), ALL, ids=lambda value: str(value))
def test_every_method_learns_three_tasks_and_keeps_as_much_as_it_says(name, options, open_stream, tasks, tmp_path):
    stream, sizes = open_stream(name, options), []
    for task in tasks:
        (record,) = stream.learn(task, train=QUICK)
        assert record.steps == 2 and record.scores[-1] is not None
        sizes.append(stream.status()["kept_bytes"])
    document = Stream.open(tmp_path / "s").status()
    assert [len([v for v in row if v is not None]) for row in document["scores"]] == [1, 2, 3]
    assert document["method"] == name
    assert (sizes[2] > sizes[1]) == make(name, options).grows, sizes


@pytest.mark.parametrize(
    ("name", "options"),
    [("c-lora", {}), pytest.param("lorac", {"freeze": 0.3}, marks=pytest.mark.slow), ("replay", {"bytes": 4000})],
    ids=lambda value: str(value),
)
def test_a_killed_run_of_a_method_with_hooks_goes_on_to_the_same_bits(name, options, open_stream, tasks):
    class Killed(Events):
        def step(self, name, step, peak_memory):
            if name == "task1" and step.step == 3:
                raise KeyboardInterrupt

    config = dataclasses.replace(QUICK, iters=4, save_every="1")
    whole, cut = open_stream(name, options), open_stream(name, options, "cut")
    whole.learn(*tasks[:2], train=config)
    with pytest.raises(KeyboardInterrupt):
        cut.learn(*tasks[:2], train=config, events=Killed())
    assert cut.folder.interrupted() == {"task": "task1", "step": 2}
    cut.learn(*tasks[:2], train=config)
    assert_same(arrays(cut), arrays(whole))


def two_tasks(name, options, learner, encoded, config=QUICK):
    """The state after one task, and the tuning of the second one as training left it."""
    method, state = make(name, options), empty_state(learner.layers, LORA.rank)
    for last in (False, True):
        tuning = Tuning(learner.base.model, method, state)
        train(tuning, learner.engine, with_extra(method, state, encoded), [], config)
        if last:
            return method, state, tuning
        state = after_training(method, state, tuning, learner.engine, encoded, 4)
    raise AssertionError


def test_a_factor_whose_rate_is_0_stays_to_the_bit_and_half_the_rate_goes_half_as_far(learner, encoded):
    _, state, tuning = two_tasks("frozen-a", {}, learner, encoded)
    for layer, pair in tuning.named().items():
        np.testing.assert_array_equal(pair.a, state.deployed[layer].a)
        assert not np.array_equal(pair.b, state.deployed[layer].b)
    config, moved = dataclasses.replace(QUICK, iters=1, max_grad_norm=0.0), {}
    for rate in (0.5, 0.999999):
        method, state, tuning = two_tasks("products", {"rate_a": rate}, learner, encoded, config)
        start = method.start(state)
        moved[rate] = np.concatenate([(pair.a - start[n].a).ravel() for n, pair in tuning.named().items()])
    np.testing.assert_allclose(2 * moved[0.5], moved[0.999999], rtol=0.01, atol=1e-6)


def test_a_penalty_takes_part_in_every_step(learner, encoded):
    def distance(strength):
        _, state, tuning = two_tasks("l2", {"strength": strength}, learner, encoded, config)
        pairs = tuning.named()
        return sum(float(np.square(x - y).sum()) for n in pairs for x, y in zip(pairs[n], state.deployed[n]))

    config = dataclasses.replace(QUICK, iters=12, max_grad_norm=0.0)
    assert distance(1e5) < 0.5 * distance(0.0)


def test_anchored_holds_what_the_update_does_to_old_rows(learner, encoded):
    def change(strength):
        _, state, tuning = two_tasks("anchored", {"strength": strength}, learner, encoded, config)
        return float(make("anchored", {"strength": 1}).penalty(tuning.named(), state))

    config = dataclasses.replace(QUICK, iters=12)
    assert change(100.0) < 0.2 * change(0.0)


def test_the_model_applies_the_effective_pairs_and_gradients_go_through_them(learner, encoded):
    """Along a random direction the loss changes as its gradient says, for what trains in C-LoRA and LoRAC."""
    batch = make_batch(encoded, range(4))
    for name in ("c-lora", "lorac", "inclora"):
        method, state, tuning = two_tasks(name, {}, learner, encoded)
        tuned = tuning.named()
        expected = method.effective(tuned, state)
        model_pairs = {n: (np.array(la.lora_a).T, np.array(la.lora_b).T) for n, la in tuning._layers.items()}
        for layer, pair in expected.items():
            for x, y in zip(pair, model_pairs[layer], strict=True):
                np.testing.assert_allclose(x, y, atol=1e-6)

        def loss(changed, tuning=tuning):
            tuning.apply(changed)
            return learner.engine.loss_sum(batch)

        generator = np.random.default_rng(0)
        along = {n: mx.array(generator.normal(size=a.shape).astype(np.float32)) for n, a in tuning.arrays.items()}
        gradient = mx.grad(loss)(tuning.arrays)
        said = sum(float((gradient[n] * along[n]).sum()) for n in along)
        step = 2e-3
        ahead, behind = (
            float(loss({n: a + sign * step * along[n] for n, a in tuning.arrays.items()})) for sign in (1, -1)
        )
        assert said == pytest.approx((ahead - behind) / (2 * step), rel=0.02, abs=2e-2), name
        tuning.apply(tuning.arrays)


@pytest.mark.parametrize("name", ["slao", "c-lora", "inclora", "lorac"])
def test_compiled_steps_train_what_plain_ones_do(name, learner, encoded, compiler):
    found = {}
    for compiled in (False, True):
        engine = prepare(learner.base.model, by_hand=False, compiled=compiled)
        _, _, tuning = two_tasks(name, {}, dataclasses.replace(learner, engine=engine), encoded)
        found[compiled] = tuning.arrays
    for array, expected in found[False].items():
        np.testing.assert_allclose(np.array(found[True][array]), np.array(expected), rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("by_hand", [True, False])
@pytest.mark.parametrize("name", ["ewc", "lorac", "c-lora"])
def test_squared_gradients_are_the_mean_over_rows(name, by_hand, learner, encoded):
    _, _, tuning = two_tasks(name, {}, learner, encoded)  # of the second task: lorac and c-lora train more than a pair
    engine, told = prepare(learner.base.model, by_hand=by_hand), []
    learner.base.model.eval()
    tokens = encoded[1].tokens
    silent = Encoded(tokens, np.zeros(len(tokens), bool), len(tokens), 0, encoded[1].row)
    rows = [*encoded[:3], silent]
    found = squared_gradients(tuning, engine, rows, 4, lambda done, total: told.append((done, total)))
    assert told[-1] == (4, 4) and len(told) == (1 if by_hand else 4)
    by_rows = {array: 0.0 for array in tuning.arrays}
    for index in range(3):
        batch = make_batch(rows, [index])

        def loss(arrays, batch=batch):
            tuning.apply(arrays)
            return engine.loss_sum(batch) / len(batch.targets)

        for array, gradient in mx.grad(loss)(tuning.arrays).items():
            by_rows[array] = by_rows[array] + np.array(gradient) ** 2 / len(rows)
    tuning.apply(tuning.arrays)
    for layer, fields in found.items():
        for field, values in fields._asdict().items():
            expected = by_rows[f"{layer}.{field}"]
            assert expected.any() and values.shape == expected.shape
            np.testing.assert_allclose(values, expected, rtol=1e-3, atol=1e-5 * expected.max())


@pytest.mark.parametrize("cores", [1, 2, 0], ids=["alone", "in two threads", "mlx-lm's way"])
@pytest.mark.parametrize("checkpoint", [True, False])
@pytest.mark.parametrize("together", [0, 10_000], ids=["few rows at a time", "all rows"])
def test_input_moments_weigh_tokens_by_the_squared_gradients_of_what_is_made_of_them(
    cores, checkpoint, together, learner, encoded, monkeypatch
):
    if cores > cpu_ops.CORES:
        pytest.skip("one core")
    monkeypatch.setattr("mbf_mlx.engine.by_hand.WATCHED_TOKENS", together)
    model, generator = learner.base.model, np.random.default_rng(0)
    tuning = Tuning(model, make("slao"), empty_state(learner.layers, LORA.rank))
    tuning.update({n: mx.array(generator.normal(size=a.shape).astype(np.float32)) for n, a in tuning.arrays.items()})
    model.eval()
    engine = prepare(model, by_hand=cores > 0, checkpoint=checkpoint)
    engine.cores = max(1, cores)
    directions = {n: generator.normal(size=(3, inner)).astype(np.float32) for n, (_, inner) in learner.layers.items()}
    told = []
    found = input_moments(tuning, engine, encoded[:3], directions, 3, lambda done, total: told.append((done, total)))
    if cores and together:
        assert told == [(3, 3)]
    else:
        assert told == ([(2, 3), (3, 3)] if cores == 2 else [(1, 3), (2, 3), (3, 3)])
    assert all(seen.directions is directions[name] for name, seen in found.items())
    # By another way: what is added to a layer's output has the gradient of that output.
    layers, added, inputs, expected = lora_layers(model), {}, {}, dict.fromkeys(learner.layers, 0.0)

    def call(name, layer, x):
        inputs[name] = x[0]
        return layer(x) + added[name]

    with called_by(call, model, layers):
        for row in encoded[:3]:
            tokens, supervised = mx.array(row.tokens), mx.array(row.supervised[1:])

            def loss(zeros, tokens=tokens, supervised=supervised):
                added.update(zeros)
                return (nn.losses.cross_entropy(model(tokens[None, :-1])[0], tokens[1:]) * supervised).sum()

            zeros = {name: mx.zeros((len(row.tokens) - 1, out)) for name, (out, _) in learner.layers.items()}
            gradients = mx.grad(loss)(zeros)
            mx.eval(gradients)
            loss(zeros)
            for name, p in directions.items():
                x, weights = np.array(inputs[name]), np.square(np.array(gradients[name])).sum(axis=1)
                expected[name] = expected[name] + ((x @ p.T) * (weights / weights.sum())[:, None]).T @ x / 3
    again = input_moments(tuning, engine, encoded[:3], directions, 3)
    for name, seen in found.items():
        np.testing.assert_array_equal(again[name].moments, seen.moments)
        np.testing.assert_allclose(seen.moments, expected[name], rtol=1e-3, atol=1e-4 * np.abs(expected[name]).max())
    assert {type(module).__name__ for module in lora_layers(model).values()} == {"LoRALinear"}


@pytest.mark.parametrize("by_hand", [True, False])
def test_rows_in_which_nothing_is_supervised_show_no_inputs(by_hand, learner, encoded):
    tuning = Tuning(learner.base.model, make("slao"), empty_state(learner.layers, LORA.rank))
    engine = prepare(learner.base.model, by_hand=by_hand)
    directions = {name: np.eye(inner, dtype=np.float32) for name, (_, inner) in learner.layers.items()}
    tokens = encoded[1].tokens
    silent = Encoded(tokens, np.zeros(len(tokens), bool), len(tokens), 0, encoded[1].row)
    one, with_it, none = (
        input_moments(tuning, engine, rows, directions, 8) for rows in ([encoded[0]], [silent, encoded[0]], [silent])
    )
    for name, seen in one.items():
        assert seen.moments.any() and not none[name].moments.any()
        np.testing.assert_allclose(2 * with_it[name].moments, seen.moments, rtol=1e-6)


def test_rows_are_watched_one_by_one_where_memory_has_no_room_for_more(learner, encoded):
    engine, asked = prepare(learner.base.model, by_hand=True), []

    def before(batch, training):
        asked.append(len(batch.indices))
        if len(batch.indices) > most:
            raise MemoryLimitError("too much")

    engine.before, most = before, 1
    (batch,) = engine.watched_together(encoded, 1, 8)
    assert batch.indices == (1,) and asked[0] > engine.cores and asked[1:] == [1]
    most = 0
    with pytest.raises(MemoryLimitError):
        engine.watched_together(encoded, 1, 8)
    most = 8
    assert sum(len(batch.indices) for batch in engine.watched_together(encoded, 1, 1)) == engine.cores


@pytest.mark.parametrize(("name", "options"), [("anchored", {}), ("products", {"metric": "inputs"})])
def test_a_method_that_measures_inputs_absorbs_with_the_rows(name, options, open_stream, tasks, tmp_path):
    stream = open_stream(name, options)
    stream.learn(tasks[0], train=QUICK)
    start = peft_files(exchange.next_start(stream.folder, "peft"), tmp_path / "start")
    tuned = tune(stream.folder.state(), peft.read_peft(start).factors)
    files = peft.peft_files(tuned, stream.folder.identity.scale, base="tiny", num_blocks=2)
    done = stream.absorb(peft_files(files, tmp_path / "tuned"), "mail", task=tasks[1])
    state = stream.folder.state()
    assert done.record.t == state.t == 2 and done.record.train_rows == 8
    moved = [state.deployed[n].b @ state.deployed[n].a - tuned[n].b @ tuned[n].a for n in tuned]
    assert all(np.abs(each).max() > 1e-4 for each in moved)  # merged, not taken as it is
    stream.learn(tasks[2], train=QUICK)
    assert stream.status()["scores"][2][1] is not None


def peft_files(files, folder):
    folder.mkdir()
    for name, data in files.items():
        (folder / name).write_bytes(data)
    return folder


def test_the_options_of_a_method_come_from_the_command_line():
    from mbf_mlx.commands.options import options_of
    from mbf_mlx.errors import InputError

    assert options_of(None) is None
    assert options_of("start=merged, basis=balanced,exponent=0.7,rate-a=1") == {
        "start": "merged",
        "basis": "balanced",
        "exponent": 0.7,
        "rate_a": 1,
    }
    with pytest.raises(InputError, match=r"--method-options: expected KEY=VALUE,KEY=VALUE, got 'merged'"):
        options_of("start=merged,merged")


@pytest.mark.parametrize(("name", "said"), [("replay", True), ("ewc", False)])
def test_status_says_where_rows_are_kept(name, said, open_stream, tasks):
    from mbf_mlx.report.terminal import summary

    stream = open_stream(name)
    stream.learn(tasks[0], train=QUICK)
    assert any("this method keeps rows of its tasks" in line for line in summary(stream.status())) == said
