"""A cell of an experiment and `mbf learn` go one way: the same bits, and no setting that one of them ignores."""

import json
import time
from dataclasses import fields

import numpy as np
import pytest

from mbf_mlx.config import DataConfig, LoRAConfig, TrainConfig
from mbf_mlx.errors import InputError, MemoryLimitError
from mbf_mlx.experiment.plan_file import read_plan
from tests.support.rows import rows_of

pytest.importorskip("mlx.core", reason="mlx is not installed: pip install 'mbf-mlx[cpu]'")

from mbf_mlx import Stream
from mbf_mlx.experiment.cell import Watch
from mbf_mlx.experiment.run import Experiment
from mbf_mlx.learning.learner import load_learner

TRAIN = {"iters": 4, "batch_size": 4, "learning_rate": 5e-3, "grad_accumulation_steps": 2, "warmup": 0.3}
TRAIN |= {"weight_decay": 0.01, "max_grad_norm": 0.5, "val_every": 2, "patience": 3}


class Seen(Watch):
    """Keeps the states after each task, and whether activations were recomputed."""

    def __init__(self):
        self.states, self.checkpoints, self.learners = [], set(), []

    def load(self, *given):
        self.learners.append(load_learner(*given))
        return self.learners[-1]

    def step(self, name, step, peak_memory):
        self.checkpoints |= {learner.engine.checkpoint for learner in self.learners}

    def merged(self, name, state):
        self.states.append(state)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A folder with two small tasks; their first rows are longer than 40 tokens."""
    root = tmp_path_factory.mktemp("one-way")
    for number, name in enumerate("ab"):
        for split, count, seed in (("train", 10, number), ("valid", 3, 20 + number), ("test", 4, 10 + number)):
            rows = rows_of(count, seed)
            rows[0]["prompt"] = "red green blue " * 9 + rows[0]["prompt"]
            path = root / "tasks" / name / f"{split}.jsonl"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return root


@pytest.fixture
def experiment(folder, tiny_llama, tmp_path):
    """`experiment(watch, method, train=...)`: an experiment with one cell, on both tasks."""

    def experiment(watch, method="slao", options="{}", out=None, head="valid_rows = 3\n", **parts):
        parts = {"lora": {"rank": 2}, "train": TRAIN, **parts}
        text = f"base = {str(tiny_llama)!r}\ntasks = {str(folder / 'tasks')!r}\n{head}[orders]\nab = ['a', 'b']\n"
        for part, settings in parts.items():
            text += f"[{part}]\n" + "".join(f"{name} = {json.dumps(value)}\n" for name, value in settings.items())
        path = tmp_path / "one.toml"
        path.write_text(text + f"[[methods]]\nmethod = {method!r}\noptions = {options}\n")
        return Experiment(read_plan(path), tmp_path / (out or "results"), watch, watch.load)

    return experiment


def same(one, other):
    """Return whether two states hold the same bits."""
    pairs = [(one.deployed[layer], other.deployed[layer]) for layer in one.deployed | other.deployed]
    kept = [(one.kept[name][layer], other.kept[name][layer]) for name in one.kept for layer in one.kept[name]]
    assert one.kept.keys() == other.kept.keys() and (one.t, one.rank, one.seed) == (other.t, other.rank, other.seed)
    return all(np.array_equal(x, y) for a, b in pairs for x, y in zip(a, b, strict=True)) and all(
        np.array_equal(x, y) for x, y in kept
    )


@pytest.mark.parametrize(
    ("method", "dropout"),
    [("slao", 0.1), ("anchored", 0.0), ("ewc", 0.0), ("replay", 0.0), ("o-lora", 0.1), ("joint", 0.0)],
)
def test_a_cell_and_mbf_learn_end_with_the_same_bits(experiment, folder, tiny_llama, tmp_path, method, dropout):
    lora, data = {"rank": 2, "dropout": dropout}, {"mask_prompt": False, "max_seq_length": 40}
    (row,) = experiment(watch := Seen(), method, lora=lora, data=data).run()
    stream = Stream.open(tmp_path / "s", base=str(tiny_llama), lora=LoRAConfig(**lora), method=method)
    learned = Seen()
    for name in "ab":
        stream.learn(folder / "tasks" / name, train=TrainConfig(**TRAIN), data=DataConfig(**data), events=learned)
    assert len(watch.states) == len(learned.states) == 2
    assert all(same(one, other) for one, other in zip(watch.states, learned.states, strict=True))
    document = stream.status()
    assert [r[: t + 1] for t, r in enumerate(row["scores"])] == [r[: t + 1] for t, r in enumerate(document["scores"])]
    assert row["steps"] == [task["steps"] for task in document["tasks"]]
    assert row["train_tokens"] == [task["train_tokens"] for task in document["tasks"]]


CHANGED = {
    LoRAConfig: {"rank": 3, "scale": 1.0, "keys": ["o_proj"], "num_layers": 1, "dropout": 0.2},
    DataConfig: {"template": "none", "mask_prompt": False, "max_seq_length": 40},
    TrainConfig: {
        "epochs": 2, "iters": 3, "batch_size": 2, "grad_accumulation_steps": 1, "learning_rate": 1e-3, "warmup": 0.9,
        "weight_decay": 0.5, "max_grad_norm": 0.01, "val_every": 1, "patience": 1,
    },
}  # fmt: skip
# A seed stands in `seeds`; a date changes what only some templates write; a precision takes a library that need not be
# here; the others change no number.
ELSEWHERE = {"seed", "date", "precision", "grad_checkpoint", "save_every"}


def test_every_setting_that_a_file_may_hold_is_tried_here():
    assert {field.name for kind in CHANGED for field in fields(kind)} == {
        name for changes in CHANGED.values() for name in changes
    } | ELSEWHERE


@pytest.mark.parametrize("name", [name for changes in CHANGED.values() for name in changes])
def test_every_setting_changes_what_a_cell_comes_to(experiment, name):
    kind = next(kind for kind, changes in CHANGED.items() if name in changes)
    part = {LoRAConfig: "lora", DataConfig: "data", TrainConfig: "train"}[kind]
    # Steps that get worse, so that patience and the step of a validation decide.
    train = {"iters": 12, "batch_size": 4, "learning_rate": 0.3, "warmup": 0.0, "grad_accumulation_steps": 2}
    train |= {"val_every": 4, "patience": 2}
    parts = {"lora": {"rank": 2}, "train": train, "data": {}}
    if name == "epochs":
        del train["iters"]
    before, one = outcome(experiment, "before", parts)
    parts[part] = parts[part] | {name: CHANGED[kind][name]}
    after, other = outcome(experiment, "after", parts)
    assert before != after and one != other


def outcome(experiment, out, parts):
    """Return a cell's hash, and what it came to: steps, tokens, losses, factors."""
    (row,) = experiment(watch := Seen(), out=out, **parts).run()
    factors = {layer: [x.tobytes() for x in pair] for layer, pair in watch.states[-1].deployed.items()}
    return row["hash"], (row["steps"], row["train_tokens"], row["losses"], factors)


def test_a_cell_recomputes_activations_where_it_is_told_to_and_saves_as_often_as_it_is_told(experiment, monkeypatch):
    from mbf_mlx.stream.saves import Working

    save, steps = Working.save, []
    monkeypatch.setattr(Working, "save", lambda self, step, *more: (steps.append(step), save(self, step, *more))[1])
    plain, again = Seen(), Seen()
    experiment(plain, train={**TRAIN, "save_every": "0"}, out="plain").run()
    assert steps == [4, 4] and plain.checkpoints == {False}
    steps.clear()
    experiment(again, train={**TRAIN, "save_every": "1", "grad_checkpoint": True}, out="again").run()
    assert steps == [1, 2, 3, 4, 1, 2, 3, 4] and again.checkpoints == {True}
    assert all(same(one, other) for one, other in zip(plain.states, again.states, strict=True))


def test_a_memory_limit_stops_a_cell_with_its_name_and_what_would_fit(experiment):
    made = experiment(Seen(), head="valid_rows = 3\nmemory_limit = '1MB'\n")
    with pytest.raises(InputError, match=r"^slao, ab, seed 0: a batch of 4 rows .* the limit is 1.0 MB") as stopped:
        made.run()
    assert isinstance(stopped.value.__cause__, MemoryLimitError)
    assert made.rows() == []
    (row,) = experiment(Seen(), head="valid_rows = 3\nmemory_limit = '900GB'\n").run()
    (same_row,) = experiment(Seen()).run()
    assert row == same_row  # a limit that is not reached changes nothing, the hash included


@pytest.mark.parametrize("method", ["anchored", "ewc"])
def test_a_cells_time_counts_the_measuring_pass(experiment, method):
    class Slow(Seen):
        def measuring(self, name, done, total):
            time.sleep(0.5)

    (before,) = experiment(Seen(), method, out="before").run()
    (after,) = experiment(Slow(), method, out="before-again").run()
    assert all(
        later > sooner + 0.2 for sooner, later in zip(before["train_seconds"], after["train_seconds"], strict=True)
    )


def test_a_task_without_test_rows_has_no_score_and_stops_nothing(experiment, folder):
    one = folder / "tasks" / "b"
    kept = {file: file.read_bytes() for file in one.iterdir()}
    try:
        for file in one.iterdir():
            file.unlink()
        (one / "train.jsonl").write_text(json.dumps({"prompt": "red or green?", "completion": "green"}) + "\n")
        (row,) = experiment(Seen(), train={"iters": 1}, head="").run()
    finally:
        for file, data in kept.items():
            file.write_bytes(data)
    assert [[value is None for value in line] for line in row["scores"]] == [[False, True], [False, True]]
