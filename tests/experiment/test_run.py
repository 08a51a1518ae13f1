"""An experiment through the real harness on a tiny model: what is shared, what is never run again, what comes out."""

import contextlib
import dataclasses
import functools
import json
import subprocess
import sys
import time

import numpy as np
import pytest
from filelock import FileLock
from typer.testing import CliRunner

from mbf_mlx.errors import InputError
from mbf_mlx.experiment import results
from mbf_mlx.experiment.plan_file import read_plan
from mbf_mlx.report.results_page import results_page
from tests.conftest import ROOT
from tests.support.rows import rows_of

pytest.importorskip("mlx.core", reason="mlx is not installed: pip install 'mbf-mlx[cpu]'")

from mbf_mlx import Stream
from mbf_mlx.config import DataConfig, LoRAConfig
from mbf_mlx.experiment import run as experiment
from mbf_mlx.experiment.cell import Watch
from mbf_mlx.experiment.run import Experiment
from mbf_mlx.learning.learner import load_learner

HEAD = """tasks = "tasks"
[orders]
abc = ["a", "b", "c"]
[lora]
rank = 2
[train]
iters = 2
batch_size = 4
learning_rate = 5e-3
"""


class Counted(Watch):
    """Counts optimizer steps, and stops at one of them."""

    def __init__(self, stop=None):
        self.steps, self.stop, self.cells = [], stop, []

    def cell(self, number, cell, task):
        self.cells.append((number, cell.label, cell.tasks[task]))

    def step(self, name, step, peak_memory):
        self.steps.append((name, step.step))
        if len(self.steps) == self.stop:
            raise KeyboardInterrupt


@pytest.fixture(scope="module")
def bench(tiny_llama, tmp_path_factory):
    """`bench(methods, head, folder)`: an experiment on three tiny tasks; all tests share one loaded model."""
    root = tmp_path_factory.mktemp("experiment")
    for number, name in enumerate("abc"):
        for split, count, seed in (("train", 10, number), ("valid", 3, 20 + number), ("test", 4, 10 + number)):
            path = root / "tasks" / name / f"{split}.jsonl"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text("".join(json.dumps(row) + "\n" for row in rows_of(count, seed)))
    load = functools.cache(load_learner)

    def bench(methods, head="", folder="results", watch=None, name="tiny", lora="rank = 2\n"):
        text = f"base = {str(tiny_llama)!r}\n{head}{HEAD}".replace("rank = 2\n", lora)
        text += "".join(f"[[methods]]\nmethod = {m!r}\noptions = {o}\n" for m, o in methods)
        (root / f"{name}.toml").write_text(text)
        return Experiment(read_plan(root / f"{name}.toml"), root / folder, watch or Counted(), load)

    bench.root = root
    return bench


def test_methods_that_differ_only_after_training_share_one_chain(bench):
    methods = [("slao", "{first_a = 'orthonormal'}"), ("products", "{}"), ("products", "{exponent = 1.0}")]
    watch = Counted()
    rows = bench(methods, folder="shared", watch=watch).run()
    assert len(watch.steps) == 3 * 2  # three tasks, two steps: once for all three methods
    assert rows[0]["trainings"] == rows[1]["trainings"] == rows[2]["trainings"]
    assert len(watch.cells) == 9
    apart = Counted()
    others = bench([("slao", "{}"), ("sequential", "{}"), ("ewc", "{}")], folder="shared", watch=apart).run()
    # The first task starts alike; the second with a QR start, as it was, and with a penalty.
    assert len({row["trainings"][0] for row in others}) == 1
    assert len({row["trainings"][1] for row in others}) == 3
    assert len(apart.steps) == 2 * (1 + 3 * 2)


def test_a_finished_experiment_is_not_run_again_and_another_seed_adds_only_its_cells(bench):
    watch = Counted()
    first = bench([("sequential", "{}")], folder="again", watch=watch).run()
    watch.steps.clear(), watch.cells.clear()
    made = bench([("sequential", "{}")], folder="again", watch=watch)
    assert made.missing() == [] and made.run() == first
    assert watch.steps == watch.cells == []
    rows = bench([("sequential", "{}")], "seeds = [0, 1]\n", folder="again", watch=watch).run()
    assert [row["seed"] for row in rows] == [0, 1] and rows[0] == first[0]
    assert len(watch.steps) == 6


def test_a_cell_under_two_names_is_run_once(bench):
    watch = Counted()
    named = [("sequential", "{}\nlabel = 'one'"), ("sequential", "{}\nlabel = 'two'")]
    made = bench(named, folder="names", watch=watch)
    rows = made.run()
    assert [row["label"] for row in rows] == ["one", "two"] and len({row["hash"] for row in rows}) == 1
    assert len(watch.cells) == 3 and len(list(made.results.read())) == 1


def test_another_process_takes_what_nobody_is_at_and_waits_for_the_rest(bench):
    others = []

    class Meeting(Counted):
        def step(self, name, step, peak_memory):
            super().step(name, step, peak_memory)
            if not others:  # it finds seed 0 begun, so it runs seed 1, then waits for us
                command = [sys.executable, ROOT / "cli.py", "experiment", "tiny.toml", "--out", "several", "--json"]
                others.append(subprocess.Popen(command, cwd=bench.root, stdout=subprocess.PIPE, text=True))
                while others[0].poll() is None and not made.results.read():
                    time.sleep(0.05)
                assert [row["seed"] for row in made.results.read()] == [1]
                with pytest.raises(subprocess.TimeoutExpired):
                    others[0].wait(0.5)

    made = bench([("sequential", "{}")], "seeds = [0, 1]\n", folder="several", watch=(watch := Meeting()))
    rows = made.run()
    assert [row["seed"] for row in rows] == [0, 1] and len(watch.steps) == 6
    said, _ = others[0].communicate(timeout=60)
    assert others[0].returncode == 0 and len(json.loads(said)["cells"]) == 2
    assert len(made.results.read()) == 2


def test_what_others_finished_is_not_waited_for_though_they_go_on_with_more(bench):
    finished = bench([("sequential", "{}")], "seeds = [1]\n", folder="others").run()

    class Beside(Counted):
        def step(self, name, step, peak_memory):
            super().step(name, step, peak_memory)
            if len(self.steps) == 1:
                made.results.add(finished[0])

    made = bench([("sequential", "{}")], "seeds = [0, 1]\n", folder="beside", watch=Beside())
    with FileLock(made.folder / "cache" / f"{experiment._sharing(made.plan.cells[1])}.lock"):
        assert [row["seed"] for row in made.run()] == [0, 1]
    assert len(made.watch.steps) == 6


def test_progress_counts_what_other_processes_finish(bench, monkeypatch):
    from mbf_mlx.commands import app, console

    (elsewhere,) = bench([("sequential", "{}")], "seeds = [2]\n", folder="elsewhere").run()
    made, told = bench([("sequential", "{}")], "seeds = [0, 1, 2]\n", folder="bar", name="bar"), []

    @contextlib.contextmanager
    def progress(what, total, unit):
        def update(done, **more):
            if "step" not in more:
                told.append((done, total))
            if len(told) == 1 and "step" in more and len(made.results.read()) == 0:
                made.results.add(elsewhere)

        yield update

    monkeypatch.setattr(console, "progress", progress)
    done = CliRunner().invoke(app, ["experiment", str(bench.root / "bar.toml"), "--out", str(made.folder), "--json"])
    assert done.exit_code == 0 and len(json.loads(done.stdout)["cells"]) == 3, done.output
    assert told == [(0, 9), (4, 9), (5, 9), (6, 9), (7, 9), (8, 9), (9, 9)]


def test_files_with_other_settings_do_not_wait_for_each_other(bench):
    def locks(settings):
        made = bench([("sequential", "{}")], folder="apart", watch=Counted())
        cells = (dataclasses.replace(c, train=dataclasses.replace(c.train, **settings)) for c in made.plan.cells)
        made.plan = dataclasses.replace(made.plan, cells=tuple(cells))
        made.run()
        return {path.name for path in (made.folder / "cache").glob("*.lock")}

    assert len(locks({})) + 1 == len(locks({"learning_rate": 1e-4})) == len(locks({"save_every": "1"}))


def test_a_killed_experiment_goes_on_to_the_same_result(bench):
    head, methods = "train_rows = 6\n", [("replay", "{bytes = 4000}"), ("c-lora", "{}")]
    whole = bench(methods, head, folder="whole").run()
    watch = Counted(stop=6)
    made = bench(methods, head, folder="killed", watch=watch)
    made.plan = dataclasses.replace(
        made.plan,
        cells=tuple(
            dataclasses.replace(c, train=dataclasses.replace(c.train, save_every="1")) for c in made.plan.cells
        ),
    )
    with pytest.raises(KeyboardInterrupt):
        made.run()
    (bench.root / "killed" / "results.jsonl").write_bytes(b'{"hash": "half a li')
    made.watch = Counted()
    rows = made.run()
    assert made.watch.steps[0] == ("c", 2)  # of the first cell's last training the first step was saved
    timeless = {"seconds", "train_seconds", "peak_memory_bytes"}
    for one, other in zip(whole, rows, strict=True):
        assert {k: v for k, v in one.items() if k not in timeless} == {
            k: v for k, v in other.items() if k not in timeless
        }
    assert len(results.read_results(bench.root / "killed")) == 2


def test_a_cell_is_what_mbf_learn_makes_of_the_same_tasks(bench, tiny_llama, tmp_path):
    made = bench([("slao", "{}")], folder="same")
    (row,) = made.run()
    stream = Stream.open(tmp_path / "s", base=str(tiny_llama), lora=LoRAConfig(rank=2), method="slao")
    train = dataclasses.replace(made.plan.cells[0].train, seed=0)
    for name in "abc":
        # An experiment trains to the end; a stream keeps the best step by its valid rows, so it is given none.
        folder = tmp_path / name
        folder.mkdir()
        for split in ("train", "test"):
            (folder / f"{split}.jsonl").write_bytes((bench.root / "tasks" / name / f"{split}.jsonl").read_bytes())
        stream.learn(folder, train=train, data=DataConfig())
    document = stream.status()
    assert [r[: t + 1] for t, r in enumerate(row["scores"])] == [
        [v for v in r if v is not None] for r in document["scores"]
    ]
    np.testing.assert_allclose(
        [r[t] for t, r in enumerate(row["losses"])], [r[t] for t, r in enumerate(document["losses"])], atol=2e-6
    )
    assert row["kept_bytes"][-1] == document["kept_bytes"]


def test_a_method_or_layer_that_does_not_fit_the_base_is_refused_before_anything_runs(bench):
    with pytest.raises(
        InputError, match=r"products rank=40: products: expected layers with at least 40 outputs and 40 inputs"
    ):
        bench([("products", "{rank = 40}"), ("slao", "{}")], folder="wrong")
    with pytest.raises(InputError, match=r"nope"):
        bench([("slao", "{}")], folder="wrong", lora='keys = ["nope"]\n')
    assert not (bench.root / "wrong" / "results.jsonl").exists()


def test_forward_transfer_needs_the_base_and_the_task_just_before_it_is_learned(bench):
    (row,) = bench([("slao", "{}")], folder="forward").run()
    assert [len(r) for r in row["scores"]] == [2, 3, 3] and len(row["before"]) == 3
    gains = [row["scores"][j - 1][j] - row["before"][j] for j in (1, 2)]
    assert row["forward_transfer"] == pytest.approx(np.mean(gains))
    (row,) = bench([("slao", "{}")], "forward_transfer = false\n", folder="forward").run()
    assert [len(r) for r in row["scores"]] == [1, 2, 3] and row["forward_transfer"] is None


def test_a_ceiling_is_trained_once_and_is_what_training_after_each_task_ends_with(bench):
    whole, once = Counted(), Counted()
    (each,) = bench([("joint", "{}")], folder="each", watch=whole).run()
    (last,) = bench([("joint", "{}\nonly_last = true")], folder="last", watch=once).run()
    assert [task for _, _, task in once.cells] == ["c"]
    assert once.steps == whole.steps[-2:] and last["hash"] != each["hash"]
    for same in ("average_accuracy", "newest", "kept_bytes"):
        assert last[same] == each[same]
    assert last["scores"] == [[None], [None, None], each["scores"][2]] and last["losses"][2] == each["losses"][2]
    assert last["backward_transfer"] is last["forgetting"] is last["forward_transfer"] is None
    assert last["trainings"] == ["", "", each["trainings"][2]] and each["backward_transfer"] is not None
    page = results_page("ceiling", [{**each, "label": "each"}, {**last, "label": "once"}])
    assert "backward transfer, points, abc" in page and results.read_results(bench.root / "last") == [last]


def test_rows_are_limited_alike_for_all_cells_and_valid_rows_can_be_scored(bench):
    head = "train_rows = 6\ntest_rows = 2\nscore_on = 'valid'\nmetric = 'loss'\n"
    made = bench([("slao", "{}")], head, folder="few")
    (row,) = made.run()
    rows = {(name, split): len(found) for (name, split, _, _), found in made.bench._encoded.items()}
    assert rows == {(n, s): c for n in "abc" for s, c in (("train", 6), ("valid", 2))}
    assert row["metrics"] == ["loss"] * 3 and row["average_accuracy"] is None
    assert row["scored_on"] == "valid"


def test_what_the_template_leaves_out_of_a_task_is_said_once_for_all_cells(bench, tmp_path):
    from mbf_mlx.commands import app

    bench([("sequential", "{}")], "seeds = [0, 1]\n", name="tools")
    (tmp_path / "tasks").mkdir()
    rows = [{**row, "tools": [{"type": "function", "function": {"name": "add"}}]} for row in rows_of(12, 3)]
    for name in "abc":
        (tmp_path / "tasks" / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    arguments = ["experiment", bench.root / "tools.toml", "--tasks", tmp_path / "tasks", "--out", tmp_path / "out"]
    done = CliRunner().invoke(app, [str(each) for each in arguments])
    assert done.exit_code == 0, done.output
    assert done.stderr.count("b: the chat template leaves out: tools (") == 1


def test_the_command_prints_the_table_and_the_same_as_markdown_and_json(bench):
    from mbf_mlx.commands import app

    made = bench([("sequential", "{}"), ("products", "{}")], "seeds = [0, 1]\n", folder="cli", name="cli")
    made.run()
    arguments = ["experiment", str(bench.root / "cli.toml"), "--out", str(bench.root / "cli")]
    shown = CliRunner().invoke(app, arguments)
    assert shown.exit_code == 0 and "forgetting" in shown.stdout and "products" in shown.stdout, shown.output
    assert "MOPD" not in shown.stdout  # of one order there is none
    lines = CliRunner().invoke(app, [*arguments, "--markdown", "--show"]).stdout.strip().splitlines()
    assert lines[0].startswith("| method | order | seeds | AA | BWT |") and len(lines) == 4
    document = json.loads(CliRunner().invoke(app, [*arguments, "--json"]).stdout)
    assert [line["label"] for line in document["table"]] == ["sequential", "products"]
    accuracies = [cell["average_accuracy"] for cell in document["cells"] if cell["label"] == "products"]
    found = document["table"][1]["measures"]["average_accuracy"]
    assert found["mean"] == pytest.approx(np.mean(accuracies))
    assert found["deviation"] == pytest.approx(np.std(accuracies, ddof=1)) and found["seeds"] == 2
    other = [cell["average_accuracy"] for cell in document["cells"] if cell["label"] == "sequential"]
    held = [*arguments, "--show", "--against", "sequential"]
    assert "against sequential" in CliRunner().invoke(app, held).stdout
    lines = CliRunner().invoke(app, [*held, "--markdown"]).stdout.strip().splitlines()
    assert lines[5].startswith("| method | cells | mean |") and lines[7].startswith("| products | 2 |")
    against = json.loads(CliRunner().invoke(app, [*held, "--json"]).stdout)["against"]
    assert against["name"] == "sequential"
    assert against["differences"][0]["mean"] == pytest.approx(np.mean(accuracies) - np.mean(other))
    alone = bench.root / "alone"
    alone.mkdir()
    kept = [line for line in made.results.path.read_text().splitlines() if '"label": "sequential"' in line]
    (alone / "results.jsonl").write_text("\n".join(kept) + "\n")
    nothing = CliRunner().invoke(app, [*arguments[:3], str(alone), "--show", "--against", "products"])
    assert nothing.exit_code == 0 and "no finished cell has the order and seed of a finished one of" in nothing.stderr
    wrong = CliRunner().invoke(app, [*arguments, "--against", "slao"])
    assert wrong.exit_code == 1 and not wrong.stdout
    without_tasks = [*held, "--markdown", "--tasks", str(bench.root / "nowhere")]
    assert CliRunner().invoke(app, without_tasks).stdout.strip().splitlines() == lines  # what is shown needs no rows


def test_a_changed_bit_in_the_cache_is_computed_again(bench):
    first = bench([("sequential", "{}")], folder="bits", watch=Counted())
    (whole,) = first.run()
    cache = first.bench.cache
    for file in sorted(cache.glob("*.safetensors")):
        data = bytearray(file.read_bytes())
        data[-3] ^= 64
        file.write_bytes(data)
    scores = cache / "scores.jsonl"
    scores.write_text(scores.read_text().replace('"loss": ', '"loss": 1'))
    (cache.parent / results.RESULTS).unlink()
    (again,) = bench([("sequential", "{}")], folder="bits", watch=(watch := Counted())).run()
    assert again["scores"] == whole["scores"] and again["losses"] == whole["losses"]
    assert len(watch.steps) == 6
