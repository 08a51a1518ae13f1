"""A stream that has learned a task on a real tiny model, and what two streams have to hold in common."""

import json

import numpy as np

from mbf_mlx import Stream
from mbf_mlx.config import LoRAConfig, TrainConfig
from tests.support.rows import rows_of


def taught(folder, base):
    task = folder.with_name("words") / "train.jsonl"
    task.parent.mkdir()
    task.write_text("".join(json.dumps(row) + "\n" for row in rows_of(16)))
    stream = Stream.open(folder, base=str(base), lora=LoRAConfig(rank=4))
    stream.learn(task.parent, train=TrainConfig(iters=2, batch_size=4, learning_rate=5e-3))
    return stream


def arrays(stream):
    state = stream.folder.state()
    kept = {f"{name}.{layer}": a for name, tensors in state.kept.items() for layer, a in tensors.items()}
    return {f"{name}.{i}": f for name, pair in state.deployed.items() for i, f in enumerate(pair)} | kept


def assert_same(one, other):
    assert one.keys() == other.keys()
    for name in one:
        np.testing.assert_array_equal(one[name], other[name], err_msg=name)
