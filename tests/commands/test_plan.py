"""`mbf plan`, from its words to what it prints."""

import json
import re

import pytest
from typer.testing import CliRunner

from mbf_mlx import commands, units
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


def test_the_table_in_docs_is_what_its_command_says(no_models):
    section = (ROOT / "docs" / "memory.md").read_text("utf-8").partition("## Will it fit")[2].partition("\n## ")[0]
    command = re.search(r"\$ mbf plan (--model (?:[^\\\n]|\\\n)+)\n", section)[1].replace("\\\n", " ")
    done = run(*command.split(), "--json")
    assert done.exit_code == 0, done.output
    rows = {}
    for each in json.loads(done.stdout)["plans"]:
        rows.setdefault(each["model"], [units.size(each["peak_bytes"])]).append(each["verdict"])
    table = [[cell.strip() for cell in line.strip("| ").split("|")] for line in section.splitlines() if line[:1] == "|"]
    assert [row[1:] for row in table[2:]] == list(rows.values())
    assert [f"{row[0].lower().replace(' ', '-')}-instruct" for row in table[2:]] == list(rows)


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
