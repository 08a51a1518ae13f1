"""Every flag of `mbf learn` changes the factors, the record, what is fixed, or the output; or it is refused."""

import inspect
import json
from dataclasses import dataclass, field

import numpy as np
import pytest
from typer.testing import CliRunner

from mbf_mlx import commands
from mbf_mlx.commands.learn import learn
from mbf_mlx.device import bfloat16
from tests.support.rows import rows_of
from tests.support.tiny_llama import write_tiny_llama

pytest.importorskip("mlx.core", reason="mlx is not installed: pip install 'mbf-mlx[cpu]'")

from mbf_mlx import Stream
from mbf_mlx.learning import learner
from mbf_mlx.learning.learner import load_learner

ALWAYS = ("--learning-rate", "5e-3", "--batch-size", "4", "--epochs", "1")
MEASURED = {"seconds", "tokens_per_second", "peak_memory_bytes", "settings", "machine"}


@dataclass(frozen=True)
class Try:
    """A command line with a flag, and what has to differ from the one without it."""

    words: tuple[str, ...]
    differs: str  # "factors", "record", "settings", "identity", "packed", "output" or "exit code"
    said: str = ""  # what the command with the flag says
    beside: tuple[str, ...] = ALWAYS  # other words of both command lines
    after: tuple[str, ...] = field(default=())  # flags with which the task `first` is learned before


FAR = ("--learning-rate", "3", "--batch-size", "4")
STILL = ("--learning-rate", "1e-30", "--batch-size", "4", "--epochs", "5")  # no validation is better than the first
STEPS = (*ALWAYS[:4], "--iters", "4")
TRIES = {
    "model": Try(("--model", "no-such-model"), "exit code", "no such model"),
    "name": Try(("--name", "other"), "record"),
    "method": Try(("--method", "sequential"), "identity"),
    "method_options": Try(("--method-options", "strength=3"), "identity"),
    "keep_quantized": Try(("--keep-quantized",), "packed"),
    "keep_awake": Try(("--keep-awake",), "output", "--keep-awake without effect: it works on a Mac only"),
    "quantize": Try(("--quantize", "4"), "exit code", "--quantize is for GGUF files"),
    "config": Try(("--config", "{folder}/learn.toml"), "identity"),
    "json": Try(("--json",), "output", '"scores"'),
    "epochs": Try(("--epochs", "2"), "record", beside=ALWAYS[:4]),
    "learning_rate": Try(("--learning-rate", "1e-3"), "factors", beside=ALWAYS[2:]),
    "batch_size": Try(("--batch-size", "2"), "record", beside=(*ALWAYS[:2], *ALWAYS[4:])),
    "max_seq_length": Try(("--max-seq-length", "32"), "record", "rows have more than 32 tokens"),
    "rank": Try(("--rank", "3"), "identity"),
    "seed": Try(("--seed", "1"), "factors"),
    "scale": Try(("--scale", "4"), "identity"),
    "keys": Try(("--keys", "q_proj"), "identity"),
    "num_layers": Try(("--num-layers", "1"), "identity"),
    "dropout": Try(("--dropout", "0.5"), "factors"),
    "template": Try(("--template", "none"), "factors"),
    "iters": Try(("--iters", "2"), "record", beside=ALWAYS[:4]),
    "grad_accumulation_steps": Try(("--grad-accumulation-steps", "2"), "record"),
    "warmup": Try(("--warmup", "0.9"), "factors", beside=STEPS),
    "weight_decay": Try(("--weight-decay", "0.5"), "factors"),
    "max_grad_norm": Try(("--max-grad-norm", "0.001"), "factors", beside=STEPS),
    "mask_prompt": Try(("--no-mask-prompt",), "factors"),
    "val_every": Try(("--val-every", "1"), "record", beside=(*STILL, "--patience", "1")),
    "patience": Try(("--patience", "1"), "record", beside=STILL),
    "throttle": Try(("--throttle", "0.01"), "output", "rests 0.01 s after each step"),
    "guard": Try(
        ("--no-guard",),
        "exit code",
        beside=(*FAR, "--iters", "30"),
        after=("--learning-rate", "1e-2", "--iters", "60", "--keys", "q_proj,o_proj,down_proj"),
    ),
    "grad_checkpoint": Try(("--grad-checkpoint",), "settings"),
    "precision": Try(("--precision", "bfloat16"), "factors" if bfloat16.library() else "exit code"),
    "memory_limit": Try(("--memory-limit", "1MB"), "exit code", "--memory-limit"),
    "save_every": Try(("--save-every", "1"), "settings"),
    "score_tasks": Try(("--score-tasks", "1"), "record", after=ALWAYS),
    "score_rows": Try(("--score-rows", "2"), "record"),
    "again": Try(("{folder}/first", "--again"), "record", after=ALWAYS, beside=("{folder}/first", *ALWAYS)),
    "date": Try(("--date", "2031-03-04"), "output", "--date without effect: prompts say no date"),
    "restart": Try(("--restart",), "output", "--restart without effect: no run was interrupted"),
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    root = tmp_path_factory.mktemp("flags")
    for seed, name in enumerate(("first", "task")):
        for split, count, which in (("train", 8, seed), ("valid", 3, 20 + seed), ("test", 4, 10 + seed)):
            path = root / name / f"{split}.jsonl"
            path.parent.mkdir(exist_ok=True)
            path.write_text("".join(json.dumps(row) + "\n" for row in rows_of(count, which)))
    (root / "learn.toml").write_text("rank = 2\n")
    return root


@pytest.fixture(scope="module")
def outcome(folder, tiny_llama, tmp_path_factory):
    """`outcome(words, after)`: what a command line comes to, by what may differ; the same words run once."""
    known, loaded = {}, []

    def load(*given):
        loaded.append(load_learner(*given))
        return loaded[-1]

    def call(stream, words):
        words = [word.format(folder=folder) for word in words]
        task = [] if words[0].startswith(str(folder)) else [folder / "task"]
        model = [] if "--model" in words else ["--model", tiny_llama]
        return CliRunner().invoke(commands.app, list(map(str, ["learn", stream, *task, *model, *words])))

    def outcome(words, after):
        if (words, after) in known:
            return known[words, after]
        stream = tmp_path_factory.mktemp("streams") / "s"
        if after:
            assert call(stream, ("{folder}/first", *after)).exit_code == 0
        done = call(stream, words)
        assert done.exit_code in (0, 1), done.exception
        found = {"exit code": done.exit_code, "output": done.output}
        if done.exit_code == 0:
            opened = Stream.open(stream)
            state, document = opened.folder.state(), opened.status()
            found["factors"] = {layer: [np.array(f) for f in pair] for layer, pair in state.deployed.items()}
            task = {name: value for name, value in document["tasks"][-1].items() if name not in MEASURED}
            found["record"] = [task, document["scores"]]
            found["packed"] = loaded[-1].packed
            found["settings"] = document["settings"]
            found["identity"] = json.loads(opened.folder.identity.to_json()) | {"id": None}
        known[words, after] = found
        return found

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(learner, "load_learner", load)
        yield outcome


def test_every_flag_of_learn_is_tried():
    flags = set(inspect.signature(learn).parameters) - {"stream", "tasks"}
    assert flags == set(TRIES)


@pytest.mark.parametrize("flag", TRIES)
def test_a_flag_has_an_effect_or_is_refused(outcome, flag):
    tried = TRIES[flag]
    without = outcome(tried.beside, tried.after)
    with_it = outcome((*tried.beside, *tried.words) if flag != "again" else tried.words + ALWAYS, tried.after)
    assert tried.said in with_it["output"] and (not tried.said or tried.said not in without["output"])
    if tried.differs != "exit code":
        assert with_it["exit code"] == without["exit code"] == 0, with_it["output"] + without["output"]
    one, other = without[tried.differs], with_it[tried.differs]
    if tried.differs == "factors":
        same = all(np.array_equal(a, b) for layer in one for a, b in zip(one[layer], other[layer], strict=True))
    else:
        same = one == other
    assert not same


def test_weights_that_are_not_quantized_cannot_stay_so(folder, tmp_path):
    base = write_tiny_llama(tmp_path / "base", bits=None)
    words = ["learn", tmp_path / "s", folder / "task", "--model", base, "--iters", 1, "--keep-quantized"]
    done = CliRunner().invoke(commands.app, list(map(str, words)))
    assert done.exit_code == 0 and "--keep-quantized without effect: the base's weights are not quan" in done.output


def test_bits_for_a_gguf_file_need_one(folder, tmp_path):
    done = CliRunner().invoke(commands.app, ["learn", str(tmp_path / "s"), str(folder / "task"), "--quantize", "4"])
    assert done.exit_code == 1 and "error: --quantize: expected --model with a GGUF file beside it" in done.output
