"""A small task, new streams of the tiny Llama to learn it, and a stop in the middle of learning it."""

import pytest

from mbf_mlx import Stream
from mbf_mlx.config import LoRAConfig
from mbf_mlx.learning.events import Events
from tests.support.rows import rows_of


@pytest.fixture
def task(write_jsonl):
    write_jsonl("task/test.jsonl", rows_of(5, seed=10))
    return write_jsonl("task/train.jsonl", rows_of(12)).parent


@pytest.fixture
def open_stream(tiny_llama, tmp_path):
    """`open_stream(name)`: a new stream."""
    return lambda name: Stream.open(tmp_path / name, base=str(tiny_llama), lora=LoRAConfig(rank=4))


class Killed(Events):
    """Stops a run after a step, before that step is saved."""

    def __init__(self, at):
        self.at = at

    def step(self, name, step, peak_memory):
        if step.step == self.at:
            raise KeyboardInterrupt
