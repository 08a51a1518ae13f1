"""Every rotary embedding that mlx-lm has for a Llama, each in a fresh process: what is lazy there crosses no thread."""

import json
import subprocess
import sys

import pytest

from tests.conftest import ROOT
from tests.support.rows import rows_of

pytest.importorskip("mlx.core", reason="mlx is not installed: pip install 'mbf-mlx[cpu]'")

LLAMA3 = {"factor": 32.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}
YARN = {"factor": 4.0, "original_max_position_embeddings": 128}
LONG = {"original_max_position_embeddings": 128, "short_factor": [1.5] * 8, "long_factor": [1.5] * 8}
ROPES = {
    "default": {"rope_type": "default"},
    "linear": {"type": "linear", "factor": 2.0},
    "dynamic": {"type": "dynamic", "factor": 2.0},
    "llama3": {"rope_type": "llama3", **LLAMA3},
    "yarn": {"rope_type": "yarn", **YARN},
    "longrope": {"rope_type": "longrope", **LONG},
    "proportional": {"rope_type": "proportional", "partial_rotary_factor": 0.5},
    "mrope": {"rope_type": "mrope", "mrope_section": [2, 3, 3]},
}
# Loads the base as `mbf learn` does, and holds one batch's loss against mlx-lm's own module, called row by row.
COMPARE = """
import sys
from pathlib import Path
import numpy as np
from mbf_mlx.device import backend
backend.setup()
import mlx.core as mx
from mbf_mlx.data.batches import make_batch
from mbf_mlx.config import LoRAConfig
from mbf_mlx.learning.learner import load_learner
from tests.support.llamas import plain_loss, rows_with
learner = load_learner(Path(sys.argv[1]), LoRAConfig())
model = learner.base.model
for name in list(learner.layers):
    layer = dict(model.named_modules())[name]
    layer.lora_b = 0.1 * mx.random.normal(layer.lora_b.shape)
rows = rows_with(12, [5, 9, 3, 7])
batch = make_batch(rows, range(len(rows)))
value = learner.engine.loss_sum(batch).item()
print(value, plain_loss(model, rows).item())
"""


def run(*words):
    command = [sys.executable, *map(str, words)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, timeout=300)
    assert done.returncode == 0, done.stderr
    return done.stdout


def base_with(tmp_path, scaling):
    from tests.support.tiny_llama import write_tiny_llama

    return write_tiny_llama(tmp_path / "base", rope_scaling=scaling, max_position_embeddings=256)


@pytest.mark.parametrize("kind", ROPES)
def test_a_fresh_process_learns_with_every_rope_and_computes_mlx_lms_loss(tmp_path, kind):
    base = base_with(tmp_path, ROPES[kind])
    ours, theirs = map(float, run("-c", COMPARE, base).split())
    assert ours == pytest.approx(theirs, rel=1e-5)


def test_llama_3_is_planned_learned_and_answers(tmp_path, write_jsonl):
    """Three commands, each a process of its own, as a user starts them."""
    base = base_with(tmp_path, ROPES["llama3"])
    write_jsonl("words/test.jsonl", rows_of(3))
    task = write_jsonl("words/train.jsonl", rows_of(6)).parent
    run("cli.py", "plan", tmp_path / "s", task, "--model", base)
    learned = json.loads(
        run("cli.py", "learn", tmp_path / "s", task, "--model", base, "--template", "none", "--iters", 2, "--json")
    )
    assert learned["tasks"][0]["steps"] == 2 and learned["scores"][0][0] is not None
    run("cli.py", "generate", tmp_path / "s", "a b c", "--max-tokens", 2)
