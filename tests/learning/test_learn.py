"""Learn tasks into a stream, from Python: what is committed, resumed, skipped and refused.

Long, because all cases share one small stream and its tasks.
"""

import dataclasses
import json
import os
import shutil
import signal
import subprocess
import sys
import time

import numpy as np
import pytest

from mbf_mlx.base.recipe import recipes
from mbf_mlx.config import LearnConfig, LoRAConfig, TrainConfig
from mbf_mlx.errors import InputError
from mbf_mlx.learning.events import Events
from mbf_mlx.methods import make
from mbf_mlx.stream.records import spans_to_score
from tests.conftest import ROOT
from tests.support.rows import rows_of
from tests.support.streams import contents
from tests.support.taught import arrays, assert_same
from tests.support.tiny_gguf import write_tiny_gguf

pytest.importorskip("mlx.core", reason="mlx is not installed: pip install 'mbf-mlx[cpu]'")

from mbf_mlx import Stream
from mbf_mlx.learning.scores import TestRows, score_all

QUICK = TrainConfig(epochs=1, batch_size=4, learning_rate=5e-3)
LORA = LoRAConfig(rank=4)


@pytest.fixture
def tasks(write_jsonl):
    """Three small tasks, as folders."""
    folders = []
    for number in range(3):
        write_jsonl(f"task{number}/test.jsonl", rows_of(5, seed=10 + number))
        folders.append(write_jsonl(f"task{number}/train.jsonl", rows_of(12, seed=number)).parent)
    return folders


class Tuned(Events):
    """Notes what happens."""

    def __init__(self):
        self.notes, self.records = [], []

    def note(self, message):
        self.notes.append(message)

    def learned(self, record, seconds):
        self.records.append(record)


@pytest.mark.parametrize("what", ["loop", "file"])
def test_what_is_in_the_place_of_saves_is_named_before_training(tiny_llama, tasks, tmp_path, what):
    stream, events = Stream.open(tmp_path / "s", base=str(tiny_llama), lora=LORA), Tuned()
    stream.learn(tasks[0], train=QUICK)
    if what == "loop":
        stream.folder.working.symlink_to("working")
    else:
        stream.folder.working.write_text("mine")
    with pytest.raises(InputError, match="s/working: expected the folder of a task in training, got something else"):
        stream.learn(tasks[1], train=QUICK, events=events)
    assert len(stream.folder.history()) == 1 and events.notes == [] and os.path.lexists(stream.folder.working)


def test_three_tasks_are_learned_merged_scored_and_reported(tiny_llama, tasks, tmp_path):
    stream = Stream.open(tmp_path / "s", base=str(tiny_llama), lora=LORA)
    events = Tuned()
    stream.learn(*tasks, train=QUICK, events=events)
    status = stream.status()
    assert [task["name"] for task in status["tasks"]] == ["task0", "task1", "task2"] == [r.name for r in events.records]
    assert [[value is None for value in row] for row in status["scores"]] == [
        [False, True, True],
        [False, False, True],
        [False, False, False],
    ]
    assert all(0 <= value <= 1 for row in status["scores"] for value in row if value is not None)
    assert status["average_accuracy"] == pytest.approx(np.mean(status["scores"][2]))
    assert all(task["loss_after"] < task["loss_before"] for task in status["tasks"])
    assert all(task["tokens_per_second"] > 0 and task["train_tokens"] > 0 for task in status["tasks"])
    assert json.loads(json.dumps(status)) == status


def test_the_state_is_what_algorithm_1_makes_of_the_tuned_factors(tiny_llama, tasks, tmp_path, monkeypatch):
    """The factors that training starts from and ends with are caught, and merged again by hand."""
    from mbf_mlx.methods.slao import Slao

    def copied(factors):
        return {name: (np.array(a), np.array(b)) for name, (a, b) in factors.items()}

    def starting(method, state):
        starts.append(copied(start(method, state)))
        return start(method, state)

    def finishing(method, state, factors, inputs=None):
        after = finish(method, state, factors)
        tuned.append(copied(factors))
        deployed.append(copied(after.deployed))
        return after

    start, finish, starts, tuned, deployed = Slao.start, Slao.finish, [], [], []
    monkeypatch.setattr(Slao, "start", starting)
    monkeypatch.setattr(Slao, "finish", finishing)
    stream = Stream.open(tmp_path / "s", base=str(tiny_llama), lora=LORA, method="slao")
    stream.learn(*tasks, train=QUICK)
    for name in starts[0]:
        merged = tuned[0][name][1].astype(np.float64)
        np.testing.assert_array_equal(deployed[0][name][1], tuned[0][name][1])
        for t in (2, 3):
            before, start, after = tuned[t - 2][name], starts[t - 1][name], tuned[t - 1][name]
            q, r = np.linalg.qr(before[0].astype(np.float64).T)
            np.testing.assert_allclose(start[0], (q * np.where(np.diag(r) < 0, -1, 1)).T, atol=1e-6)
            np.testing.assert_array_equal(start[1], before[1])
            merged += (after[1] - merged) / np.sqrt(t)
            np.testing.assert_array_equal(deployed[t - 1][name][0], after[0])
            np.testing.assert_allclose(deployed[t - 1][name][1], merged, atol=1e-6)


def test_learning_in_one_go_equals_learning_on_another_day(tiny_llama, tasks, tmp_path):
    one = Stream.open(tmp_path / "one", base=str(tiny_llama), lora=LORA)
    one.learn(*tasks, train=QUICK)
    for task in tasks:
        Stream.open(tmp_path / "other", base=str(tiny_llama), lora=None).learn(task, train=QUICK) if (
            tmp_path / "other"
        ).exists() else Stream.open(tmp_path / "other", base=str(tiny_llama), lora=LORA).learn(task, train=QUICK)
    other = Stream.open(tmp_path / "other")
    assert_same(arrays(one), arrays(other))
    assert one.status()["scores"] == other.status()["scores"]


def test_state_files_and_arrays_keep_their_size_from_task_2_to_task_12(tiny_llama, write_jsonl, tmp_path):
    folders = []
    for number in range(12):
        write_jsonl(f"many{number}/test.jsonl", rows_of(2, seed=100 + number))
        folders.append(write_jsonl(f"many{number}/train.jsonl", rows_of(4, seed=number)).parent)
    stream = Stream.open(tmp_path / "s", base=str(tiny_llama), lora=LORA)
    config = dataclasses.replace(QUICK, iters=1)
    stream.learn(*folders[:2], train=config, score_tasks=1)

    def sizes():
        folder = stream.folder.current().folder
        files = {name: (folder / name).stat().st_size for name in ("adapter/adapters.safetensors", "state.safetensors")}
        status = stream.status()
        return files, status["adapter_bytes"], status["state_bytes"], status["kept_bytes"]

    after_two = sizes()
    stream.learn(*folders[2:], train=config, score_tasks=1)
    assert stream.status()["tasks"][-1]["t"] == 12
    assert sizes() == after_two
    assert after_two[1] == after_two[0]["adapter/adapters.safetensors"] > 0


def test_of_many_tasks_some_are_scored_and_the_missing_are_named_together(tiny_llama, tasks, tmp_path):
    """A stream of 120 tasks, the newest of them gone, learns one more. The first two wait for their turn."""
    stream = Stream.open(tmp_path / "s", base=str(tiny_llama), lora=LORA)
    stream.learn(*tasks[:2], train=QUICK)
    folder, second = stream.folder, stream.folder.history()[-1]
    with folder.writer():
        for t in range(3, 121):
            copy = {"name": f"gone{t}", "t": t, "path": f"/gone/{t}", "scores": [0.5] * t, "losses": [1.0] * t}
            state = dataclasses.replace(folder.state(), t=t)
            folder.commit(folder.current(), state, second.model_copy(update=copy), str(tiny_llama), {})
    events = Tuned()
    (record,) = stream.learn(tasks[2], train=QUICK, events=events)
    assert record.t == 121 and record.scored == spans_to_score(121) == ((51, 71), (72, 121))
    assert [note for note in events.notes if "not scored" in note][-1] == (
        "not scored: 67 more tasks, for reasons like these"
    )
    assert sum("not scored" in note for note in events.notes) == 4
    assert record.scores[:-1] == [None] * 70 and record.scores[-1] is not None
    assert Stream.open(tmp_path / "s").learn(tasks[0], tasks[2], train=QUICK) == []
    status = Stream.open(tmp_path / "s").status()
    assert status["learned"] == len(status["tasks"]) == 121 and status["scores"][-1][-1] == record.scores[-1]
    undone = stream.undo()
    (record,) = stream.learn(tasks[2], train=QUICK, score_tasks=2)
    assert undone.t == 121 and record.scored == ((120, 121),) and len(record.scores) == 2


def test_a_task_known_already_is_skipped_and_another_of_its_name_refused(tiny_llama, tasks, write_jsonl, tmp_path):
    stream = Stream.open(tmp_path / "s", base=str(tiny_llama), lora=LORA)
    stream.learn(tasks[0], train=QUICK)
    before, events = contents(tmp_path / "s"), Tuned()
    assert stream.learn(tasks[0], train=QUICK, events=events) == []
    assert events.notes == ["task0: learned already, skipped (--again learns it once more)"]
    assert contents(tmp_path / "s") == before
    write_jsonl("task0/train.jsonl", rows_of(9, seed=77))
    with pytest.raises(InputError, match="has learned a task named 'task0' with other content\nhint: .*--name"):
        stream.learn(tasks[0], train=QUICK)
    assert contents(tmp_path / "s") == before
    stream.learn(tasks[0], name="task0-new", train=QUICK)
    stream.learn(tasks[0], again=True, name="task0-new", train=QUICK)
    assert [task["name"] for task in stream.status()["tasks"]] == ["task0", "task0-new", "task0-new"]


def test_undo_and_learning_again_give_the_same_bytes(tiny_llama, tasks, tmp_path):
    stream = Stream.open(tmp_path / "s", base=str(tiny_llama), lora=LORA)
    stream.learn(*tasks[:2], train=QUICK)
    before = arrays(stream)
    assert stream.undo().name == "task1"
    stream.learn(tasks[1], train=QUICK)
    assert_same(arrays(stream), before)


def test_test_rows_that_are_gone_or_changed_are_named_and_left_blank(tiny_llama, tasks, write_jsonl, tmp_path):
    stream = Stream.open(tmp_path / "s", base=str(tiny_llama), lora=LORA)
    stream.learn(*tasks[:2], train=QUICK)
    write_jsonl("task0/test.jsonl", rows_of(3, seed=55))
    for file in tasks[1].iterdir():
        file.unlink()
    tasks[1].rmdir()
    events = Tuned()
    stream.learn(tasks[2], train=QUICK, events=events)
    assert [value is None for value in stream.status()["scores"][2]] == [True, True, False]
    assert any("task0" in note and "has changed since it was learned" in note for note in events.notes)
    assert any("task1" in note and "is not there any more" in note for note in events.notes)


def test_a_stream_refuses_another_base_and_other_fixed_settings(tiny_llama, tasks, tmp_path):
    from tests.support.tiny_llama import write_tiny_llama

    Stream.open(tmp_path / "s", base=str(tiny_llama), lora=LORA).learn(tasks[0], train=QUICK)
    write_tiny_llama(tmp_path / "other", seed=5)
    with pytest.raises(
        InputError, match="is not the base model of .*: expected .* with fingerprint .*, got .*\nhint: --model"
    ):
        Stream.open(tmp_path / "s", base=str(tmp_path / "other")).learn(tasks[1], train=QUICK)
    message = (
        "made with other settings, which stay for its life:\n  method: .*'anchored', got 'sequential'\n"
        "  rank: .*4, got 8"
    )
    with pytest.raises(InputError, match=message):
        Stream.open(tmp_path / "s", method="sequential", lora=LoRAConfig(rank=8))


def test_a_base_that_moved_is_found_with_model(tiny_llama, tasks, tmp_path):
    import shutil

    base = shutil.copytree(tiny_llama, tmp_path / "base")
    Stream.open(tmp_path / "s", base=str(base), lora=LORA).learn(tasks[0], train=QUICK)
    base.rename(tmp_path / "moved")
    with pytest.raises(
        InputError, match="its base model is not where it was .*\nhint: say where it is now with --model"
    ):
        Stream.open(tmp_path / "s").learn(tasks[1], train=QUICK)
    Stream.open(tmp_path / "s", base=str(tmp_path / "moved")).learn(tasks[1], train=QUICK)
    Stream.open(tmp_path / "s").learn(tasks[2], train=QUICK)
    assert len(Stream.open(tmp_path / "s").status()["tasks"]) == 3


def test_a_gguf_base_of_types_that_mlx_lacks_is_quantized_only_when_asked(tmp_path, tasks, monkeypatch):
    monkeypatch.setenv("MBF_MODELS", str(tmp_path / "models"))
    file = tmp_path / "tiny.gguf"
    write_tiny_gguf(file, tmp_path / "scratch", types={"ffn_up.weight": "Q5_0", "": "Q4_0"})
    with pytest.raises(InputError, match="of type Q5_0(.|\n)*hint: --quantize 4"):
        Stream.open(tmp_path / "s", base=str(file), lora=LORA)
    assert not (tmp_path / "s").exists()
    said = []
    Stream.open(tmp_path / "s", base=str(file), lora=LORA, quantize=4, report=said.append).learn(tasks[0], train=QUICK)
    assert len(said) == 1 and said[0].startswith("converting tiny.gguf")
    Stream.open(tmp_path / "s").learn(tasks[1], train=QUICK)  # its base is the converted folder
    assert len(Stream.open(tmp_path / "s", base=str(file), quantize=4).status()["tasks"]) == 2


@pytest.mark.parametrize("by", ["folder", "name"])
def test_a_base_that_a_recipe_vouches_for_is_taught_as_it_was_tried(smollm2, tmp_path, monkeypatch, by):
    monkeypatch.setenv("MBF_MODELS", str(smollm2.parent))
    known = recipes()["smollm2-135m-instruct"].lora
    stream = Stream.open(tmp_path / "tried", base=str(smollm2) if by == "folder" else smollm2.name, load=False)
    lora = stream.status()["settings"]["lora"]
    assert (lora["rank"], lora["scale"]) == (known.rank, known.scale)
    assert stream.learning_rate == known.learning_rate
    one = Stream.open(tmp_path / "one", base=str(smollm2), lora={"rank": 2}, load=False).folder.identity
    assert (one.rank, one.scale) == (2, known.scale)
    whole = Stream.open(tmp_path / "whole", base=str(smollm2), lora=LORA, load=False).folder.identity
    assert (whole.rank, whole.scale) == (LORA.rank, LORA.scale)


def test_a_known_task_is_skipped_though_the_base_has_moved(tiny_llama, tasks, tmp_path):
    base = tmp_path / "base"
    shutil.copytree(tiny_llama, base)
    Stream.open(tmp_path / "s", base=str(base), lora=LORA).learn(tasks[0], train=QUICK)
    base.rename(tmp_path / "elsewhere")
    stream, events = Stream.open(tmp_path / "s"), Tuned()
    assert stream.learn(tasks[0], learning_rate=stream.learning_rate, events=events) == []
    assert events.notes == ["task0: learned already, skipped (--again learns it once more)"]


def test_any_other_base_is_taught_with_the_defaults(tiny_llama, tmp_path):
    stream = Stream.open(tmp_path / "s", base=str(tiny_llama), load=False)
    assert (stream.folder.identity.rank, stream.folder.identity.scale) == (LoRAConfig.rank, LoRAConfig.scale)
    assert stream.learning_rate == TrainConfig.learning_rate


def test_a_task_of_one_row_is_learned_and_never_scored(tiny_llama, tasks, write_jsonl, tmp_path):
    one = write_jsonl("one.jsonl", [{"prompt": "red or green?", "completion": "green"}])
    stream = Stream.open(tmp_path / "s", base=str(tiny_llama), lora=LORA)
    stream.learn(one, tasks[0], train=QUICK)
    status = stream.status()
    assert status["tasks"][0]["test_rows"] == 0
    assert status["scores"] == [[None, None], [None, status["average_accuracy"]]]
    assert [task["score"] is None for task in stream.evaluate()["tasks"]] == [True, False]
    assert stream.evaluate(one)["tasks"][0]["rows"] == 0
    stream.undo()
    assert stream.status()["average_accuracy"] is None


def test_sequential_keeps_nothing_beside_the_adapter(tiny_llama, tasks, tmp_path):
    stream = Stream.open(tmp_path / "s", base=str(tiny_llama), lora=LORA, method="sequential")
    stream.learn(*tasks[:2], train=QUICK)
    assert make("sequential").name == stream.status()["method"]
    assert stream.folder.state().kept == {}


def run_learn(stream, tasks, base, *more, kill_at=None):
    """Run `mbf learn`; `kill_at` is a pattern: the first file operation on such a path is the process's last."""
    program = [ROOT / "cli.py"] if kill_at is None else [ROOT / "tests/support/killed.py", f"{stream}/{kill_at}"]
    command = [sys.executable, *program, "learn", stream, *tasks, "--model", base, "--rank", "4", "--batch-size", "2"]
    command += ["--epochs", "2", "--save-every", "1", *more]
    done = subprocess.run([str(part) for part in command], capture_output=True, text=True, cwd=ROOT, timeout=120)
    return done.returncode, done.stderr


@pytest.mark.parametrize("place", ["working/step-00000003", "working/step-00000012", "generations/building-000002*"])
def test_a_killed_run_ends_equal_to_the_bit(tiny_llama, tasks, tmp_path, place):
    code, error = run_learn(tmp_path / "whole", tasks[:2], tiny_llama)
    assert code == 0, error
    code, _ = run_learn(tmp_path / "killed", tasks[:2], tiny_llama, kill_at=place)
    assert code == -signal.SIGKILL
    code, error = run_learn(tmp_path / "killed", tasks[:2], tiny_llama)
    assert code == 0, error
    whole, killed = Stream.open(tmp_path / "whole"), Stream.open(tmp_path / "killed")
    assert_same(arrays(whole), arrays(killed))
    for name in ("adapter/adapters.safetensors", "state.safetensors"):
        files = [(stream.folder.current().folder / name).read_bytes() for stream in (whole, killed)]
        assert files[0] == files[1]
    assert whole.status()["scores"] == killed.status()["scores"]
    assert not (tmp_path / "killed/working").exists()


def test_an_interrupted_run_with_other_settings_is_refused_until_restart(tiny_llama, tasks, tmp_path):
    run_learn(tmp_path / "s", tasks[:1], tiny_llama, kill_at="working/step-00000003")
    assert Stream.open(tmp_path / "s").status()["interrupted"]["task"] == "task0"
    code, error = run_learn(tmp_path / "s", tasks[:1], tiny_llama, "--learning-rate", "0.001")
    assert code == 1
    assert "learning_rate: 0.0005 was saved, 0.001 is asked for" in error and "--restart" in error
    code, error = run_learn(tmp_path / "s", tasks[:1], tiny_llama, "--learning-rate", "0.001", "--restart")
    assert code == 0, error
    assert "without effect" not in error


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_the_run_with_its_code_and_everything_kept(tiny_llama, tasks, tmp_path, number):
    stream = tmp_path / "s"
    command = [
        sys.executable,
        str(ROOT / "cli.py"),
        "learn",
        str(stream),
        *map(str, tasks),
        "--model",
        str(tiny_llama),
        "--rank",
        "4",
        "--save-every",
        "1",
    ]
    process = subprocess.Popen([*command, "--iters", "5000"], stderr=subprocess.PIPE, cwd=ROOT, env=os.environ)
    while process.poll() is None and not list(stream.glob("working/step-*")):
        time.sleep(0.01)
    process.send_signal(number)
    _, error = process.communicate(timeout=60)
    assert process.returncode == 128 + number, error
    assert b"Traceback" not in error
    assert Stream.open(stream).status()["interrupted"]["step"] >= 1


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        (2, r"step 1: the validation loss \(nan\) is not finite, on rows .*valid.jsonl:\d+.*; the stream is as it was"),
        (0, r"step 1: the loss after training \(nan\) is not finite, on rows .*train.jsonl:\d+.*; the stream is as it"),
    ],
)
def test_numbers_that_go_wrong_leave_the_stream_as_it_was(tiny_llama, tasks, write_jsonl, tmp_path, rows, message):
    stream = Stream.open(tmp_path / "s", base=str(tiny_llama), lora=LORA)
    stream.learn(tasks[0], train=QUICK)
    before = contents(tmp_path / "s")
    if rows:
        write_jsonl("task1/valid.jsonl", rows_of(rows, seed=5))
    wild = TrainConfig(iters=1, batch_size=4, learning_rate=1e38, max_grad_norm=0.0, save_every="0")
    with pytest.raises(InputError, match=message):
        stream.learn(tasks[1], train=wild)
    shutil.rmtree(tmp_path / "s/working", ignore_errors=True)
    assert contents(tmp_path / "s") == before
    stream.learn(tasks[1], train=QUICK, restart=True)


def test_merged_factors_and_scores_that_are_not_finite_are_refused_by_name(tiny_llama, tasks, tmp_path):
    """Here the model itself is broken after training, as a kernel's fault would leave it."""
    from mbf_mlx.learning import learn as learning
    from mbf_mlx.methods import Pair

    stream = Stream.open(tmp_path / "s", base=str(tiny_llama), lora=LORA)
    stream.learn(tasks[0], train=QUICK)
    state, learner = stream.folder.state(), stream._load()
    layer = next(iter(state.deployed))
    broken = {**state.deployed, layer: Pair(state.deployed[layer].a, state.deployed[layer].b * np.nan)}
    with pytest.raises(InputError, match=f"mail: the merged factors of {layer} are not finite"):
        learning.check_finite(dataclasses.replace(state, deployed=broken), "mail")
    learner.deploy(broken)
    tests = TestRows(learner.tokenizer, "chat")
    with pytest.raises(InputError, match=r"test.jsonl:\d: the model's answer to this row is not finite"):
        score_all(stream.folder.history(), None, learner, LearnConfig(), Events(), tests)


def test_a_task_of_every_kind_can_be_undone_and_learned_again_to_the_same_bytes(tiny_llama, write_jsonl, tmp_path):
    long = " ".join(["red green blue"] * 12)
    kinds = {
        "exact_match": [{"prompt": "a b", "completion": "yes"}, {"prompt": "b a", "completion": "no"}],
        "rouge_l": [{"prompt": "a b", "completion": long}, {"prompt": "b a", "completion": long + " warm"}],
        "loss": [{"text": "red green"}, {"text": "green red blue"}],
    }
    stream = Stream.open(tmp_path / "s", base=str(tiny_llama), lora=LORA)
    for metric, rows in kinds.items():
        write_jsonl(f"{metric}/test.jsonl", [{key: value + " x" for key, value in rows[0].items()}])
        task = write_jsonl(f"{metric}/train.jsonl", rows).parent
        before = contents(tmp_path / "s")
        stream.learn(task, train=QUICK)
        learned = arrays(stream)
        assert stream.status()["tasks"][-1]["metric"] == metric
        assert stream.undo().name == metric
        assert {name for name in before if not name.startswith("generations/00000")} <= set(contents(tmp_path / "s"))
        with pytest.raises(InputError, match="only one step back is kept, and it is used up|nothing to undo"):
            stream.undo()
        stream.learn(task, train=QUICK)
        assert_same(arrays(stream), learned)
