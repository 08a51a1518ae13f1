"""`mbf learn`, `eval`, `experiment`, `absorb` and an export give one task the same score, to the row."""

import json

import numpy as np
import pytest

from tests.support.command_line import mbf
from tests.support.rows import WORDS, rows_of

pytest.importorskip("mlx.core", reason="mlx is not installed: pip install 'mbf-mlx[cpu]'")

from mbf_mlx.config import DataConfig
from mbf_mlx.data.encode import Encoder
from mbf_mlx.data.task import read_task
from mbf_mlx.learning.evaluate import longest_answer
from mbf_mlx.learning.rouge import RougeL

KEYS = "q_proj,k_proj,v_proj,o_proj,gate_proj,up_proj,down_proj"
SENTENCES = [f"the {word} one stays where it was and the other comes along with it" for word in WORDS]


def short_rows(count, seed):
    return rows_of(count, seed)


def long_rows(count, seed):
    return [
        {"prompt": row["prompt"], "completion": SENTENCES[WORDS.index(row["prompt"].split()[0]) % 5]}
        for row in rows_of(count, seed)
    ]


def text_rows(count, seed):
    return [{"text": row["prompt"] + " " + row["completion"]} for row in rows_of(count, seed)]


# kind of rows -> what makes them, the metric, flags of `learn`
KINDS = {
    "short": (short_rows, "exact_match", {}),
    "short, cut and with learned prompts": (short_rows, "exact_match", {"max_seq_length": 32, "mask_prompt": False}),
    "short, as raw text": (short_rows, "exact_match", {"template": "none"}),
    "long": (long_rows, "rouge_l", {}),
    "text": (text_rows, "loss", {}),
}


def done(*words):
    finished = mbf(*words)
    assert finished.returncode == 0, finished.stderr
    return finished.stdout


def flags_of(settings):
    return [
        word
        for name, value in settings.items()
        for word in ([f"--no-{name.replace('_', '-')}"] if value is False else [f"--{name.replace('_', '-')}", value])
    ]


def answers(folder, data, task):
    """Return for each test row what mlx-lm itself answers from an exported folder, and the encoded row."""
    from mlx_lm import load, stream_generate

    model, tokenizer = load(str(folder))
    for row in Encoder(tokenizer, data).all(task.test, task.path):
        prompt = row.tokens[: row.prompt_length].tolist()
        parts = stream_generate(model, tokenizer, prompt, max_tokens=longest_answer(row))
        yield "".join(part.text for part in parts), row


def cell_of(folder, base, train, data):
    """Return the results of an experiment with one cell on the task `words`."""
    parts = {"lora": {"keys": KEYS.split(",")}, "train": train, "data": data}
    text = f"base = {str(base)!r}\ntasks = {str(folder)!r}\n[orders]\none = ['words']\n"
    for part, settings in parts.items():
        text += f"[{part}]\n" + "".join(f"{name} = {json.dumps(value)}\n" for name, value in settings.items())
    (folder / "plan.toml").write_text(text + "[[methods]]\nmethod = 'slao'\n")
    done("experiment", folder / "plan.toml", "--out", folder / "results")
    return json.loads((folder / "results/results.jsonl").read_text())


@pytest.mark.parametrize("kind", KINDS)
def test_one_task_has_one_score(tiny_llama, write_jsonl, tmp_path, kind):
    make, metric, settings = KINDS[kind]
    train = {"iters": 40, "learning_rate": 1e-2, "batch_size": 8}
    write_jsonl("words/test.jsonl", make(24, 1))
    task = write_jsonl("words/train.jsonl", make(48, 0)).parent
    new = ["--model", tiny_llama, "--method", "slao", "--keys", KEYS]

    learned = json.loads(done("learn", tmp_path / "s", task, *new, *flags_of(train | settings), "--json"))
    (score,), (loss,) = learned["scores"][0], learned["losses"][0]
    assert (learned["tasks"][0]["metric"], learned["tasks"][0]["test_rows"]) == (metric, 24)
    assert score is None if metric == "loss" else 0.2 < score < 1

    def check(found_metric, found_score, found_loss):
        assert found_metric == metric
        assert found_score == (None if score is None else pytest.approx(score, abs=1e-6))
        assert found_loss == pytest.approx(loss, abs=1e-5)

    def check_eval(*words):
        (found,) = json.loads(done("eval", *words, "--json"))["tasks"]
        assert found["rows"] == 24
        check(found["metric"], found["score"], found["loss"])

    check_eval(tmp_path / "s")
    check_eval(tmp_path / "s", task)

    cell = cell_of(tmp_path, tiny_llama, train, settings)
    check(cell["metrics"][0], cell["scores"][0][0], cell["losses"][0][0])

    done("export", tmp_path / "s", "adapter", tmp_path / "tuned")
    template = flags_of({name: value for name, value in settings.items() if name == "template"})
    done("next", tmp_path / "absorbing", tmp_path / "start", *new, *template)
    done("absorb", tmp_path / "absorbing", tmp_path / "tuned", "--name", "words", "--task", task)
    if "max_seq_length" not in settings:  # an absorbed task has no length of its own
        check_eval(tmp_path / "absorbing")

    if metric == "loss":
        return
    done("export", tmp_path / "s", "mlx", tmp_path / "fused", "--bits", 32)
    told = list(answers(tmp_path / "fused", DataConfig(**{**settings, "mask_prompt": True}), read_task(task)))
    if metric == "exact_match":
        assert sum(answer == row.row.completion for answer, row in told) == round(24 * score)
    else:
        measure = RougeL()
        assert np.mean([measure(answer, [row.row.completion]) for answer, row in told]) == pytest.approx(
            score, abs=1e-6
        )
