"""`--precision`: what is taken, what is written down, and how an interrupted run goes on."""

import dataclasses
from types import SimpleNamespace

import pytest

from mbf_mlx.config import LoRAConfig, TrainConfig
from mbf_mlx.device import bfloat16
from mbf_mlx.errors import InputError
from tests.support.taught import arrays, assert_same

pytest.importorskip("mlx.core", reason="mlx is not installed: pip install 'mbf-mlx[cpu]'")

from mbf_mlx.learning.precision import chosen, expected
from tests.support import one_task
from tests.support.one_task import Killed

needs_library = pytest.mark.skipif(bfloat16.library() is None, reason=bfloat16.reason())
QUICK = TrainConfig(iters=4, batch_size=4, learning_rate=5e-3, save_every="1")
task, open_stream = one_task.task, one_task.open_stream
HALVES = dataclasses.replace(QUICK, precision="bfloat16")


@needs_library
def test_the_record_names_the_precision_and_what_multiplied(open_stream, task):
    halves, plain = open_stream("halves"), open_stream("plain")
    (one,), (other,) = halves.learn(task, train=HALVES), plain.learn(task, train=QUICK)
    assert one.settings["precision"] == "bfloat16" and one.machine["products"] == bfloat16.reason()
    if not bfloat16.is_faster():
        assert "precision" not in other.settings and "products" not in other.machine
    assert one.loss_after == pytest.approx(other.loss_after, rel=0.05)


@needs_library
@pytest.mark.parametrize("then", ["auto", "bfloat16"])
def test_an_interrupted_run_goes_on_in_its_own_precision_to_the_same_bits(open_stream, task, then):
    whole, cut = open_stream("whole"), open_stream("cut")
    whole.learn(task, train=HALVES)
    with pytest.raises(KeyboardInterrupt):
        cut.learn(task, train=HALVES, events=Killed(3))
    cut.learn(task, train=dataclasses.replace(QUICK, precision=then))
    assert_same(arrays(cut), arrays(whole))


@needs_library
@pytest.mark.parametrize(("first", "then"), [("bfloat16", "float32"), ("float32", "bfloat16")])
def test_an_interrupted_run_in_another_precision_is_refused(open_stream, task, first, then):
    stream = open_stream("s")
    with pytest.raises(KeyboardInterrupt):
        stream.learn(task, train=dataclasses.replace(QUICK, precision=first), events=Killed(3))
    with pytest.raises(InputError, match=f"precision: '{first}' was saved, '{then}' is asked for now"):
        stream.learn(task, train=dataclasses.replace(QUICK, precision=then))


@needs_library
def test_a_run_begun_in_bfloat16_where_there_is_none_any_more_says_what_to_do(open_stream, task, monkeypatch):
    stream = open_stream("s")
    with pytest.raises(KeyboardInterrupt):
        stream.learn(task, train=HALVES, events=Killed(3))
    monkeypatch.setattr(bfloat16, "library", lambda: None)
    monkeypatch.setattr(bfloat16, "reason", lambda: "it is gone")
    with pytest.raises(InputError, match="multiplies in bfloat16, and this one cannot: it is gone\nhint: --restart"):
        stream.learn(task, train=QUICK)


def test_a_save_of_before_goes_on_in_float32(open_stream, task, monkeypatch):
    whole, cut = open_stream("whole"), open_stream("cut")
    whole.learn(task, train=QUICK)
    with pytest.raises(KeyboardInterrupt):
        cut.learn(task, train=QUICK, events=Killed(3))
    assert bfloat16.is_faster() or "precision" not in cut.folder.saves.load().run
    if not bfloat16.is_faster():
        monkeypatch.setattr(bfloat16, "is_faster", lambda: True)  # the save says float32: so it goes on
        cut.learn(task, train=QUICK)
        assert_same(arrays(cut), arrays(whole))


def test_bfloat16_where_it_cannot_be_had_is_refused_before_anything_is_done(open_stream, task, monkeypatch):
    monkeypatch.setattr(bfloat16, "library", lambda: None)
    monkeypatch.setattr(bfloat16, "reason", lambda: "it is not installed")
    stream = open_stream("s")
    with pytest.raises(InputError, match="--precision: expected auto or float32, got bfloat16: it is not installed"):
        stream.learn(task, train=HALVES)
    assert stream.status()["tasks"] == [] and stream.folder.interrupted() is None


@pytest.mark.parametrize(
    ("by_hand", "packed", "team", "faster", "taken"),
    [
        (True, False, None, True, "bfloat16"),
        (True, False, None, False, "float32"),
        (True, True, None, True, "float32"),
        (False, False, None, True, "float32"),
        (True, False, "a team", True, "float32"),
    ],
)
def test_auto_is_bfloat16_only_where_it_is_faster_and_alone(monkeypatch, by_hand, packed, team, faster, taken):
    monkeypatch.setattr(bfloat16, "is_faster", lambda: faster)
    learner = SimpleNamespace(engine=SimpleNamespace(by_hand=by_hand), packed=packed)
    assert chosen(TrainConfig(), learner, team) == taken
    assert chosen(TrainConfig(precision="float32"), learner, team) == "float32"


def test_packed_weights_are_not_multiplied_in_bfloat16(monkeypatch):
    monkeypatch.setattr(bfloat16, "library", lambda: "a library")
    learner = SimpleNamespace(engine=SimpleNamespace(by_hand=True), packed=True)
    with pytest.raises(InputError, match="only a Llama on a CPU, without dropout and with unpacked weights"):
        chosen(HALVES, learner)


def test_an_experiment_knows_the_precision_before_it_loads_a_base(tiny_llama, monkeypatch):
    monkeypatch.setattr(bfloat16, "is_faster", lambda: True)
    assert expected(TrainConfig(), LoRAConfig(), tiny_llama) == "bfloat16"
    assert expected(TrainConfig(), LoRAConfig(dropout=0.1), tiny_llama) == "float32"
    assert expected(TrainConfig(precision="float32"), LoRAConfig(), tiny_llama) == "float32"
    monkeypatch.setattr(bfloat16, "is_faster", lambda: False)
    assert expected(TrainConfig(), LoRAConfig(), tiny_llama) == "float32"
