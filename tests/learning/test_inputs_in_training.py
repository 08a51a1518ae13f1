"""What the last steps of a training measure of layers' inputs: against each row by itself, resumed, and shared."""

import dataclasses
import json

import numpy as np
import pytest

from mbf_mlx.config import TrainConfig
from mbf_mlx.experiment.plan_file import read_plan
from mbf_mlx.learning.events import Events
from tests.support.rows import rows_of
from tests.support.taught import arrays, assert_same

pytest.importorskip("mlx.core", reason="mlx is not installed: pip install 'mbf-mlx[cpu]'")

import mlx.core as mx
from mlx import nn

from mbf_mlx.data.batches import make_batch
from mbf_mlx.engine import cpu_ops
from mbf_mlx.engine.choose import prepare
from mbf_mlx.engine.taps import called_by
from mbf_mlx.experiment.run import Experiment
from mbf_mlx.learning import learn
from mbf_mlx.learning.inputs_in_training import InputsInTraining, inputs_in_training
from mbf_mlx.learning.progress import Progress
from mbf_mlx.methods import empty_state, make
from tests.support import one_task
from tests.support.llamas import LLAMA, build, rows_with
from tests.support.one_task import Killed

task, open_stream = one_task.task, one_task.open_stream

KEYS = ("self_attn.q_proj", "self_attn.v_proj", "mlp.up_proj", "mlp.down_proj")
# 12 rows, 4 a step: step 4 begins the last 12 rows
TRAIN = TrainConfig(epochs=2, batch_size=4, learning_rate=5e-3, save_every="1")


def measured(model, rows, directions, cores, **options):
    """What one training pass over `rows` measures."""
    engine = prepare(model, **options)
    engine.cores = cores
    sums = InputsInTraining(directions, 1)
    engine.training_note = sums.note
    loss = nn.value_and_grad(model, engine.loss_sum)
    mx.eval(loss(make_batch(rows, range(len(rows)))))
    return sums.seen()


def alone(model, names, row):
    """Inputs (T, in) and squared output gradients (T,) of a row by itself, by layer; from plain mlx."""
    layers, inputs, added = dict(model.named_modules()), {}, {}

    def call(name, layer, x):
        inputs[name] = x[0]
        return layer(x) + added[name]

    def loss(zeros):
        added.update(zeros)
        losses = nn.losses.cross_entropy(model(mx.array(row.tokens)[None, :-1])[0], mx.array(row.tokens[1:]))
        return (losses * mx.array(row.supervised[1:])).sum()

    outs = {name: layers[name].lora_b.shape[1] for name in names}
    zeros = {name: mx.zeros((len(row.tokens) - 1, out)) for name, out in outs.items()}
    with called_by(call, model, {name: layers[name] for name in names}):
        gradients = mx.grad(loss)(zeros)
        mx.eval(gradients)
        loss(zeros)
        return {n: (np.array(inputs[n]), np.array(gradients[n])) for n in names}


@pytest.mark.parametrize("checkpoint", [False, True])
@pytest.mark.parametrize("cores", [1, 2])
@pytest.mark.parametrize("prefix", [0, 20])
def test_tokens_are_weighed_as_in_each_row_by_itself_and_a_shared_prefix_evenly(prefix, cores, checkpoint):
    if cores > cpu_ops.CORES:
        pytest.skip("one core")
    model, rows = build(LLAMA, keys=KEYS), rows_with(prefix, [9, 14, 11, 12])
    names = [name for name, module in model.named_modules() if "lora_a" in module]
    draw, layers = np.random.default_rng(0), dict(model.named_modules())
    sizes = {name: layers[name].lora_a.shape[0] for name in names}
    directions = {name: draw.normal(size=(3, inner)).astype(np.float32) for name, inner in sizes.items()}
    found = measured(model, rows, directions, cores, checkpoint=checkpoint)
    by_row = [alone(model, names, row) for row in rows]
    for name in names:
        # The prefix's gradients are known as their sum over rows only; each row gets an equal share of its square.
        together = sum(each[name][1][:prefix] for each in by_row)
        of_prefix = np.square(together).sum(axis=1) / len(rows)
        expected = 0.0
        for each in by_row:
            x, g = each[name]
            squares = np.concatenate([of_prefix, np.square(g[prefix:]).sum(axis=1)])
            expected = expected + ((x @ directions[name].T) * (squares / squares.sum())[:, None]).T @ x / len(rows)
        seen = found[name]
        assert seen.directions is not None
        np.testing.assert_allclose(seen.moments, expected, rtol=2e-3, atol=2e-4 * np.abs(expected).max(), err_msg=name)


class Told(Events):
    def __init__(self):
        self.measured = 0

    def measuring(self, name, done, total):
        self.measured = done


@pytest.mark.parametrize("at", [2, 3, 5, 6])
def test_a_killed_run_measures_the_same_bits(open_stream, task, at):
    whole, cut = open_stream("whole"), open_stream("cut")
    whole.learn(task, train=TRAIN)
    with pytest.raises(KeyboardInterrupt):
        cut.learn(task, train=TRAIN, events=Killed(at))
    assert cut.folder.interrupted() == {"task": "task", "step": at - 1}
    told = Told()
    cut.learn(task, train=TRAIN, events=told)
    assert told.measured == 0
    assert_same(arrays(cut), arrays(whole))


def test_a_save_of_before_that_lacks_the_sums_is_measured_after_training(open_stream, task, monkeypatch):
    stream = open_stream("s")
    with monkeypatch.context() as before:
        before.setattr(learn, "inputs_in_training", lambda *_: None)
        with pytest.raises(KeyboardInterrupt):
            stream.learn(task, train=TRAIN, events=Killed(6))
    told = Told()
    stream.learn(task, train=TRAIN, events=told)
    assert told.measured == 12 and stream.status()["tasks"]


def test_with_validation_rows_the_factors_that_are_kept_are_measured(open_stream, task, write_jsonl):
    write_jsonl("task/valid.jsonl", rows_of(4, seed=20))
    told = Told()
    open_stream("s").learn(task, train=TRAIN, events=told)
    assert told.measured == 12


@pytest.mark.parametrize(
    ("rows", "changes", "since"),
    [
        (12, {}, 4),
        (1000, {"epochs": 1, "batch_size": 8}, 125 - 16 + 1),
        (1000, {"iters": 3}, 1),
        (12, {"iters": 7}, 5),
        (3, {"epochs": 4}, 4),
        (20, {"batch_size": 2, "grad_accumulation_steps": 3, "epochs": 2}, 8 - 4 + 1),
    ],
)
def test_the_last_128_rows_are_measured_or_as_many_as_the_task_has(rows, changes, since):
    engine, state = prepare(build(LLAMA)), empty_state({"layer": (24, 16)}, 2)
    config = dataclasses.replace(TRAIN, **changes)
    method = make("anchored")
    assert inputs_in_training(method, state, method.start(state), engine, config, rows, None).since == since


def test_what_cannot_be_measured_in_training_is_measured_after_it():
    model, state = build(LLAMA), empty_state({"layer": (24, 16)}, 2)
    method = make("anchored")
    start = method.start(state)
    assert inputs_in_training(method, state, start, prepare(model, by_hand=False), TRAIN, 12, None) is None
    assert inputs_in_training(method, state, start, prepare(model), TRAIN, 12, "a team") is None
    by_tuned = make("products", {"metric": "inputs"})
    assert inputs_in_training(by_tuned, state, start, prepare(model), TRAIN, 12, None) is None


def test_sums_that_a_save_lacks_matter_only_after_they_have_begun():
    sums = InputsInTraining({"layer": np.eye(3)}, 4)
    assert sums.take(Progress(step=3), {"factor.x": np.ones(2)}).keys() == {"factor.x"}
    sums.note(0, 1, "layer", mx.ones((2, 3)), mx.ones((2, 5)), np.array([0, 0]))
    np.testing.assert_allclose(sums.seen()["layer"].moments, np.ones((3, 3)))
    sums.take(Progress(step=4), {"factor.x": np.ones(2)})
    assert sums.seen() is None


def test_a_cell_that_shares_a_training_gets_what_it_measured(tiny_llama, task, tmp_path):
    found = {}
    for name, methods in (("both", ("anchored", "anchored-merge")), ("one", ("anchored-merge",))):
        path = tmp_path / f"{name}.toml"
        text = f"base = {str(tiny_llama)!r}\ntasks = {str(task.parent)!r}\nforward_transfer = false\n"
        text += (
            "[orders]\none = ['task']\n[lora]\nrank = 2\n[train]\nepochs = 2\nbatch_size = 4\nlearning_rate = 0.005\n"
        )
        path.write_text(text + "".join(f"[[methods]]\nmethod = {method!r}\n" for method in methods))
        rows = Experiment(read_plan(path), tmp_path / name).run()
        found[name] = next(row for row in rows if row["method"] == "anchored-merge")
        keys = {key for row in rows for key in row["trainings"]}
        assert len(keys) == 1 and len(list((tmp_path / name / "cache").glob("*.safetensors"))) == 1
    timed = ("seconds", "train_seconds", "peak_memory_bytes", "hash")
    one, both = ({k: v for k, v in found[name].items() if k not in timed} for name in ("one", "both"))
    assert json.dumps(one) == json.dumps(both)
