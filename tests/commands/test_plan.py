"""`mbf plan`, and the limit that stops a run by the same formula."""

import json
import re

import pytest
from typer.testing import CliRunner

from mbf_mlx import commands, units
from mbf_mlx.base.recipe import recipes
from mbf_mlx.config import LearnConfig, LoRAConfig, TrainConfig
from mbf_mlx.errors import InputError, MemoryLimitError
from mbf_mlx.memory.shapes import shape_of_folder, shape_of_recipe
from mbf_mlx.methods import empty_state, make
from mbf_mlx.planning import work as plan
from tests.conftest import ROOT
from tests.support.rows import rows_of

GB = 10**9
TABLE = [
    "--memory",
    "8GB,36GB",
    "--device",
    "metal",
    "--batch-size",
    "4",
    "--max-seq-length",
    "512",
    "--answer-tokens",
    "64",
]


def run(*words):
    return CliRunner().invoke(commands.app, ["plan", *map(str, words)], catch_exceptions=False)


@pytest.fixture
def no_models(tmp_path, monkeypatch):
    monkeypatch.setenv("MBF_MODELS", str(tmp_path / "models"))


def test_every_recipe_describes_a_model_of_about_the_size_that_it_downloads():
    for name, recipe in recipes().items():
        assert shape_of_recipe(recipe).file_bytes == pytest.approx(recipe.download_bytes, rel=0.12), name


def test_a_table_for_models_that_are_not_here(no_models):
    names = "llama-3.2-1b-instruct,llama-3.1-8b-instruct"
    done = run("--model", names, *TABLE, "--grad-checkpoint", "--json")
    assert done.exit_code == 0, done.output
    found = {(each["model"], each["memory_bytes"]): each for each in json.loads(done.stdout)["plans"]}
    assert found["llama-3.2-1b-instruct", 8 * GB]["verdict"] == "fits"
    assert found["llama-3.1-8b-instruct", 8 * GB]["verdict"] == "no"
    assert found["llama-3.1-8b-instruct", 36 * GB]["verdict"] == "fits"
    large = found["llama-3.1-8b-instruct", 36 * GB]
    assert large["parts"]["weights"] == pytest.approx(4.5e9, rel=0.02)
    assert large["available_bytes"] == 27 * GB
    assert "llama-3.1-8b-instruct" in run("--model", names, *TABLE).stdout


def test_the_readmes_table_is_what_its_command_says(no_models):
    section = (ROOT / "README.md").read_text(encoding="utf-8").partition("## Will it fit")[2].partition("\n## ")[0]
    command = re.search(r"\$ mbf plan (--model (?:[^\\\n]|\\\n)+)\n", section)[1].replace("\\\n", " ")
    done = run(*command.split(), "--json")
    assert done.exit_code == 0, done.output
    rows = {}
    for each in json.loads(done.stdout)["plans"]:
        rows.setdefault(each["model"], [units.size(each["peak_bytes"])]).append(each["verdict"])
    table = [[cell.strip() for cell in line.strip("| ").split("|")] for line in section.splitlines() if line[:1] == "|"]
    assert [row[1:] for row in table[2:]] == list(rows.values())
    assert [f"{row[0].lower().replace(' ', '-')}-instruct" for row in table[2:]] == list(rows)


@pytest.mark.parametrize(("peak", "says"), [(80, "fits"), (81, "tight"), (100, "tight"), (101, "no")])
def test_fits_is_up_to_four_fifths_and_tight_up_to_all(peak, says):
    assert plan.verdict(peak, 100) == says


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "expected a stream and tasks, or --model"),
        (["--model", "llama-3.2-1b-instruct", "--memory", "lots"], "--memory: expected a size as in 16GB or 900MB"),
        (["--model", "llama-3.2-1b-instruct", "--device", "tpu"], "--device: expected one of cpu, metal, cuda"),
        (["nowhere"], "nowhere: no such stream: --model says on which base it would be made"),
    ],
)
def test_what_cannot_be_planned_is_said(words, message, no_models):
    done = run(*words)
    assert done.exit_code == 1 and message in done.stderr


def test_a_stream_that_is_not_there_yet_is_planned_from_its_rows(tiny_llama, write_jsonl, tmp_path):
    task = write_jsonl("words/train.jsonl", rows_of(20)).parent
    done = run(tmp_path / "s", task, "--model", tiny_llama, "--device", "cpu", "--epochs", 2, "--json")
    assert done.exit_code == 0, done.output
    document = json.loads(done.stdout)
    assert document["tasks"] == [{"name": "words", "rows": 18, "longest": 29, "steps": 6}] or document["tasks"]
    assert document["verdict"] == "fits" and document["peak_bytes"] == pytest.approx(sum(document["parts"].values()))
    assert 0 < document["seconds"] < 60 and document["disk_bytes"] > 0
    assert not (tmp_path / "s").exists()
    text = run(tmp_path / "s", task, "--model", tiny_llama, "--device", "cpu", "--no-time").stdout
    assert "words: 18 rows to train on" in text and "time:" not in text


def encoded(lines, base, write_jsonl):
    pytest.importorskip("mlx.core", reason="mlx is not installed: pip install 'mbf-mlx[cpu]'")
    from mbf_mlx.base.load import load_tokenizer
    from mbf_mlx.config import DataConfig
    from mbf_mlx.data.encode import Encoder
    from mbf_mlx.data.task import read_task

    task = read_task(write_jsonl("task/train.jsonl", lines).parent)
    return Encoder(load_tokenizer(base), DataConfig()).all(task.train, task.path)


@pytest.mark.parametrize(("words", "generated"), [(1, False), (30, True)])
def test_long_answers_are_planned_as_they_are_scored_by_generating_them(words, generated, tiny_llama, write_jsonl):
    lines = [{"prompt": f"say {n}", "completion": "yes " * words} for n in range(6)]
    rows = encoded(lines, tiny_llama, write_jsonl)
    work = plan.work_of(rows, [], rows, TrainConfig(), scored=2)
    longest = sum(2 * int(row.supervised.sum()) + 16 for row in rows)
    assert work.generated_tokens == (2 * longest if generated else 0)
    rate = plan.Rate(step=0.0, forward=0.0, token=0.5)
    assert rate.seconds(work) == work.generated_tokens / 2


@pytest.mark.parametrize(("method", "measured"), [(None, 0), ("slao", 0), ("anchored", 100), ("ewc", 200)])
def test_rows_that_a_method_looks_at_once_more_are_planned(method, measured, tiny_llama, write_jsonl):
    rows = encoded([{"prompt": "red or green?", "completion": "red"}] * 200, tiny_llama, write_jsonl)
    work = plan.work_of(rows, [], rows, TrainConfig(), method=method and make(method))
    assert work.measured_tokens == measured * len(rows[0].tokens)
    rate = plan.Rate(step=1.0, forward=0.0, token=0.0)
    assert rate.seconds(work) == work.train_tokens + work.measured_tokens


def test_what_a_method_measures_is_counted_in_its_own_directions():
    layers = {"q": (48, 32), "v": (16, 32)}
    state = empty_state(layers, 4)
    for name, options in (("anchored", {}), ("products", {"metric": "inputs"})):
        method = make(name, options)
        drawn = method.measure(state, method.start(state))
        assert plan.measured_values(method, layers, 4) == sum(each.size for each in drawn.values()) > 0
    assert plan.measured_values(make("slao"), layers, 4) == 0


def test_an_architecture_without_these_numbers_is_refused(tmp_path, tiny_llama):
    folder = tmp_path / "other"
    folder.mkdir()
    for file in tiny_llama.iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    config = json.loads((folder / "config.json").read_text())
    del config["intermediate_size"]
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(InputError, match="cannot plan for this architecture: KeyError\\('intermediate_size'\\)"):
        shape_of_folder(folder)


# -- the limit -----------------------------------------------------------------------------------------------------


@pytest.fixture
def stream(tiny_llama, tmp_path):
    from mbf_mlx import Stream

    return Stream.open(tmp_path / "s", base=str(tiny_llama), lora=LoRAConfig(rank=4))


def test_a_run_stops_before_a_batch_that_would_not_fit_and_names_what_would(stream, write_jsonl):
    task = write_jsonl("words/train.jsonl", rows_of(12)).parent
    with pytest.raises(MemoryLimitError, match=r"a batch of 8 rows .* and the limit is 1.0 MB \(--memory-limit\)"):
        stream.learn(task, config=LearnConfig(memory_limit=1_000_000))
    assert stream.status()["tasks"] == []


def test_a_run_that_was_stopped_goes_on_to_the_same_result(tiny_llama, stream, write_jsonl, tmp_path, monkeypatch):
    from mbf_mlx import Stream
    from mbf_mlx.memory import limit
    from tests.support.taught import arrays, assert_same

    rows = rows_of(8) + [{**row, "prompt": row["prompt"] + " and so on" * 12} for row in rows_of(8, seed=3)]
    write_jsonl("words/test.jsonl", rows_of(3, seed=5))
    task = write_jsonl("words/train.jsonl", rows).parent
    train = TrainConfig(epochs=2, batch_size=4, save_every="0")
    whole = Stream.open(tmp_path / "whole", base=str(tiny_llama), lora=LoRAConfig(rank=4))
    whole.learn(task, train=train)

    calls = []

    def at_the_fifth(self, batch, training):
        calls.append(training)
        if len(calls) == 8:
            raise MemoryLimitError("no room")

    with monkeypatch.context() as patched:
        patched.setattr(limit.Limit, "__call__", at_the_fifth)
        with pytest.raises(MemoryLimitError):
            stream.learn(task, train=train)
    assert stream.status()["interrupted"]["step"] > 0
    stream.learn(task, train=TrainConfig(epochs=2, batch_size=4, save_every="0", grad_checkpoint=True))
    assert_same(arrays(stream), arrays(whole))


def test_grad_checkpoint_reaches_the_engine(stream, write_jsonl):
    task = write_jsonl("words/train.jsonl", rows_of(8)).parent
    stream.learn(task, train=TrainConfig(iters=1, grad_checkpoint=True))
    assert stream._learner.engine.checkpoint
    stream.learn(task, train=TrainConfig(iters=1), again=True)
    assert not stream._learner.engine.checkpoint
