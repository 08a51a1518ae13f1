"""Small streams without a model, for tests of what is on the disk."""

import numpy as np

from mbf_mlx.methods import Pair, make
from mbf_mlx.stream.folder import StreamFolder
from mbf_mlx.stream.records import FORMAT_VERSION, BaseRecord, Identity, TaskRecord

LAYERS = {f"model.layers.{block}.self_attn.{key}": (24, 16) for block in range(2) for key in ("q_proj", "v_proj")}


def identity(name="a", method="slao", **changes):
    fields = {
        "format_version": FORMAT_VERSION,
        "id": name,
        "base": BaseRecord(name="tiny", fingerprint="f" * 64, quantization="none", architecture="llama", num_layers=2),
        "method": method,
        "method_options": {},
        "rank": 4,
        "scale": 2.0,
        "keys": ["self_attn.q_proj", "self_attn.v_proj"],
        "num_layers": 2,
        "dropout": 0.0,
        "template": "none",
        "template_sha256": "",
        "layers": LAYERS,
    }
    return Identity(**{**fields, **changes})


def new_stream(path, files=None, **changes):
    return StreamFolder.create(path, identity(**changes), "models/tiny", 0, files)


def record(t, name=None, **changes):
    fields = {
        "name": name or f"task{t}",
        "t": t,
        "path": f"/data/task{t}.jsonl",
        "sha256": f"{t:064d}",
        "format": "jsonl",
        "metric": "exact_match",
        "train_rows": 10,
        "valid_rows": 0,
        "test_rows": 5,
        "held_out": 0,
        "cut_rows": 0,
        "train_tokens": 100,
        "computed_tokens": 120,
        "steps": 4,
        "best_step": 4,
        "seconds": 1.0,
        "tokens_per_second": 100.0,
        "loss_before": 3.0,
        "loss_after": 1.0,
        "peak_memory_bytes": 1000,
        "settings": {"epochs": 1},
        "labels": ["yes", "no"],
        "curve": [(1, 3.0), (4, 1.0)],
        "machine": {"device": "cpu"},
        "scores": [round(0.9 / (1 + t - j), 6) for j in range(1, t + 1)],
        "losses": [1.0] * t,
    }
    return TaskRecord(**{**fields, **changes})


def tune(state, start):
    """Return factors as training could leave them. They depend on the task's number alone."""
    generator = np.random.default_rng(100 + state.t)
    return {
        name: Pair(*(f + generator.normal(size=f.shape).astype(np.float32) * 0.1 for f in pair))
        for name, pair in start.items()
    }


def learn(stream, count=1):
    """Learn and commit `count` tasks as learning/learn.py does, without a model."""
    method = make(stream.identity.method, stream.identity.method_options)
    for _ in range(count):
        with stream.writer():
            state = stream.state()
            tuned = tune(state, method.start(state))
            stream.commit(
                stream.current(), method.finish(state, tuned), record(state.t + 1), "models/tiny", {"train": {}}
            )
    return stream


def contents(path):
    """Everything that a stream holds, by name: links as their targets, files as their bytes. The lock is left out."""
    found = {}
    for entry in sorted(path.rglob("*")):
        name = str(entry.relative_to(path))
        if name in ("lock", "lock.json"):
            continue
        if entry.is_symlink():
            found[name] = "-> " + str(entry.readlink())
        elif entry.is_file():
            found[name] = entry.read_bytes()
    return found
