"""A tiny Llama with factors, ready to be trained without a stream."""

import numpy as np
import pytest

from mbf_mlx.config import DataConfig, LoRAConfig, TrainConfig
from mbf_mlx.data.encode import Encoder
from mbf_mlx.data.task import read_task
from mbf_mlx.engine.lora_layers import read_factors, write_factors
from mbf_mlx.learning.learner import load_learner
from mbf_mlx.learning.train import train
from mbf_mlx.learning.tuning import Tuning
from mbf_mlx.methods import empty_state, make
from tests.support.rows import rows_of

QUICK = TrainConfig(epochs=2, batch_size=4, learning_rate=5e-3, save_every="1")
LORA = LoRAConfig(rank=4, keys=("q_proj", "v_proj"))


class Bench:
    """A tiny Llama with factors as the first task starts, and rows to train it on."""

    def __init__(self, folder, task, lora=LORA):
        learner = load_learner(folder, lora)
        self.base, self.engine = learner.base, learner.engine
        self.rows = Encoder(self.base.tokenizer, DataConfig()).all(task.train, task.path)
        self.start = make("slao").start(empty_state(learner.layers, lora.rank))

    def run(self, config=QUICK, rows=None, valid=(), start=True, **options):
        if start:
            write_factors(self.base.model, self.start)
        return train(Tuning(self.base.model), self.engine, rows or self.rows, valid, config, **options)

    def factors(self):
        return {name: (np.array(a), np.array(b)) for name, (a, b) in read_factors(self.base.model).items()}


@pytest.fixture
def bench(tiny_llama, write_jsonl):
    write_jsonl("words/test.jsonl", rows_of(6, seed=1))
    return Bench(tiny_llama, read_task(write_jsonl("words/train.jsonl", rows_of(22)).parent))
