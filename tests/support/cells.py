"""The result of an experiment's cell, as a line of results.jsonl holds it."""

from mbf_mlx.experiment.results import measured


def row(seed=0, order="ab", tasks=("a", "b"), scores=((0.8,), (0.6, 0.9)), label="slao", **changes):
    fields = {
        "hash": f"{label}{order}{seed}",
        "label": label,
        "setting": "",
        "order": order,
        "tasks": list(tasks),
        "seed": seed,
        "grows": False,
        "scores": [list(r) for r in scores],
        "kept_bytes": [1000, 2000],
        "train_seconds": [30.0, 40.0],
        "method": "slao",
        "options": {},
        "task_hashes": ["aa", "bb"],
        "trainings": ["x", "y"],
        "steps": [4, 4],
        "curves": [[[1, 2.0], [4, 1.0]], [[1, 2.5], [4, 0.75]]],
        "settings": {"train": {"epochs": 1, "seed": 0}, "lora": {"rank": 8}},
        "rows": {"train": 320, "valid": 0, "test": 200},
        "scored_on": "test",
        "base": {"name": "tiny", "fingerprint": "ff"},
        "machine": {"device": "cpu"},
        **measured([list(r) for r in scores], None),
    }
    return {**fields, **changes}
