"""A task is scored by the settings that it was learned with, whatever the command that scores it was given."""

import json

import pytest

from tests.support.command_line import mbf

pytest.importorskip("mlx.core", reason="mlx is not installed: pip install 'mbf-mlx[cpu]'")

KEYS = "q_proj,k_proj,v_proj,o_proj,gate_proj,up_proj,down_proj"
WORDS = ["red", "green", "blue", "warm", "cold", "old", "new", "slow"]


def task_of(write_jsonl, name, answers, filler, rows=8):
    """Each prompt begins with the word that decides, which a cut on the left takes away."""
    made = [{"prompt": f"{WORDS[i % 4]} {filler} {WORDS[i // 4]}", "completion": answers[i % 4]} for i in range(rows)]
    write_jsonl(f"{name}/test.jsonl", made)
    return write_jsonl(f"{name}/train.jsonl", [{**row, "prompt": "now " + row["prompt"]} for row in made]).parent


@pytest.fixture
def learned(tiny_llama, write_jsonl, tmp_path):
    """A stream that has learned rows of some 100 tokens by heart."""
    long = task_of(write_jsonl, "long", ["a", "b", "c", "d"], "and the rest of it " * 6)
    done = mbf(
        "learn", tmp_path / "s", long, "--model", tiny_llama, "--template", "none", "--iters", 60, "--json",
        "--learning-rate", 0.01, "--keys", KEYS, "--method", "sequential",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["scores"][0][0] >= 0.75
    return tmp_path / "s"


def eval_of(stream, *flags):
    done = mbf("eval", stream, "--json", *flags)
    assert done.returncode == 0, done.stderr
    return [(task["score"], task["rows"]) for task in json.loads(done.stdout)["tasks"]]


@pytest.mark.parametrize(
    "flags",
    [
        ["--max-seq-length", 32],
        ["--max-seq-length", 16],
        ["--score-rows", 1],
        ["--no-mask-prompt"],
    ],
)
def test_a_later_tasks_flags_do_not_change_how_an_earlier_one_is_scored(learned, write_jsonl, flags):
    before = json.loads(mbf("status", learned, "--json").stdout)["scores"][0][0]
    short = task_of(write_jsonl, "short", ["yes", "no", "yes", "no"], "is")
    done = mbf("learn", learned, short, "--learning-rate", 1e-12, "--iters", 1, "--json", *flags)
    assert done.returncode == 0, done.stderr
    (first, _), (old, new) = json.loads(done.stdout)["scores"]
    assert old == first == before
    assert eval_of(learned) == [(old, 8), (new, 1 if "--score-rows" in flags else 8)]
    assert eval_of(learned, learned.parent / "short")[0][0] == new  # named by its file, it is the learned task
    assert eval_of(learned, learned.parent / "long") == [(old, 8)]


def test_no_prompt_token_counts_as_an_answer(tiny_llama, write_jsonl, tmp_path):
    task = task_of(write_jsonl, "task", ["a", "b", "c", "d"], "is")
    done = mbf(
        "learn", tmp_path / "s", task, "--model", tiny_llama, "--template", "none", "--no-mask-prompt", "--iters", 60,
        "--learning-rate", 0.01, "--keys", KEYS, "--json",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    document = json.loads(done.stdout)
    assert document["tasks"][0]["metric"] == "exact_match"
    assert [(document["scores"][0][0], 8)] == eval_of(tmp_path / "s")
    assert document["scores"][0][0] > 0


def test_eval_says_how_many_rows_it_was_told_to_take(learned):
    assert [rows for _, rows in eval_of(learned, "--score-rows", 3)] == [3]


def test_tasks_that_moved_with_their_stream_are_found_again(tiny_llama, write_jsonl, tmp_path):
    old = tmp_path / "old"
    for name, answers in (("a", ["yes", "no"] * 2), ("b", ["old", "new"] * 2)):
        task = task_of(write_jsonl, f"old/tasks/{name}", answers, "is")
        done = mbf("learn", old / "streams/s", task, "--model", tiny_llama, "--template", "none", "--iters", 1)
        assert done.returncode == 0, done.stderr
    scores = eval_of(old / "streams/s")
    old.rename(tmp_path / "elsewhere")
    assert eval_of(tmp_path / "elsewhere/streams/s") == scores and scores[0][1] == 8
    (tmp_path / "elsewhere/tasks/a/test.jsonl").write_text('{"prompt": "a", "completion": "b"}\n')
    assert eval_of(tmp_path / "elsewhere/streams/s")[0] == (None, 0)  # another content is another task
