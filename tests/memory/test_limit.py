"""The limit that stops a run before a batch that would not fit."""

import pytest

from mbf_mlx.config import LearnConfig, LoRAConfig, TrainConfig
from mbf_mlx.errors import MemoryLimitError
from tests.support.rows import rows_of


@pytest.fixture
def stream(tiny_llama, tmp_path):
    from mbf_mlx import Stream

    return Stream.open(tmp_path / "s", base=str(tiny_llama), lora=LoRAConfig(rank=4))


def test_a_run_stops_before_a_batch_that_would_not_fit_and_names_what_would(stream, write_jsonl):
    task = write_jsonl("words/train.jsonl", rows_of(12)).parent
    with pytest.raises(MemoryLimitError, match=r"a batch of 8 rows .* and the limit is 1.0 MB \(--memory-limit\)"):
        stream.learn(task, config=LearnConfig(memory_limit=1_000_000))
    assert stream.status()["tasks"] == []


def test_a_run_that_was_stopped_goes_on_to_the_same_result(tiny_llama, stream, write_jsonl, tmp_path, monkeypatch):
    from mbf_mlx import Stream
    from mbf_mlx.memory import limit
    from tests.support.taught import arrays, assert_same

    rows = rows_of(8) + [{**row, "prompt": row["prompt"] + " and so on" * 12} for row in rows_of(8, seed=3)]
    write_jsonl("words/test.jsonl", rows_of(3, seed=5))
    task = write_jsonl("words/train.jsonl", rows).parent
    train = TrainConfig(epochs=2, batch_size=4, save_every="0")
    whole = Stream.open(tmp_path / "whole", base=str(tiny_llama), lora=LoRAConfig(rank=4))
    whole.learn(task, train=train)

    calls = []

    def at_the_fifth(self, batch, training):
        calls.append(training)
        if len(calls) == 8:
            raise MemoryLimitError("no room")

    with monkeypatch.context() as patched:
        patched.setattr(limit.Limit, "__call__", at_the_fifth)
        with pytest.raises(MemoryLimitError):
            stream.learn(task, train=train)
    assert stream.status()["interrupted"]["step"] > 0
    stream.learn(task, train=TrainConfig(epochs=2, batch_size=4, save_every="0", grad_checkpoint=True))
    assert_same(arrays(stream), arrays(whole))


def test_grad_checkpoint_reaches_the_engine(stream, write_jsonl):
    task = write_jsonl("words/train.jsonl", rows_of(8)).parent
    stream.learn(task, train=TrainConfig(iters=1, grad_checkpoint=True))
    assert stream._learner.engine.checkpoint
    stream.learn(task, train=TrainConfig(iters=1), again=True)
    assert not stream._learner.engine.checkpoint
