"""The work of a task, and how long a rate makes it."""

import pytest

from mbf_mlx.config import TrainConfig
from mbf_mlx.methods import empty_state, make
from mbf_mlx.planning import work as planning


def encoded(lines, base, write_jsonl):
    pytest.importorskip("mlx.core", reason="mlx is not installed: pip install 'mbf-mlx[cpu]'")
    from mbf_mlx.base.load import load_tokenizer
    from mbf_mlx.config import DataConfig
    from mbf_mlx.data.encode import Encoder
    from mbf_mlx.data.task import read_task

    task = read_task(write_jsonl("task/train.jsonl", lines).parent)
    return Encoder(load_tokenizer(base), DataConfig()).all(task.train, task.path)


@pytest.mark.parametrize(("words", "generated"), [(1, False), (30, True)])
def test_long_answers_are_planned_as_they_are_scored_by_generating_them(words, generated, tiny_llama, write_jsonl):
    lines = [{"prompt": f"say {n}", "completion": "yes " * words} for n in range(6)]
    rows = encoded(lines, tiny_llama, write_jsonl)
    work = planning.work_of(rows, [], rows, TrainConfig(), scored=2)
    longest = sum(2 * int(row.supervised.sum()) + 16 for row in rows)
    assert work.generated_tokens == (2 * longest if generated else 0)
    rate = planning.Rate(step=0.0, forward=0.0, token=0.5)
    assert rate.seconds(work) == work.generated_tokens / 2


@pytest.mark.parametrize(("method", "measured"), [(None, 0), ("slao", 0), ("anchored", 100), ("ewc", 200)])
def test_rows_that_a_method_looks_at_once_more_are_planned(method, measured, tiny_llama, write_jsonl):
    rows = encoded([{"prompt": "red or green?", "completion": "red"}] * 200, tiny_llama, write_jsonl)
    work = planning.work_of(rows, [], rows, TrainConfig(), method=method and make(method))
    assert work.measured_tokens == measured * len(rows[0].tokens)
    in_training = planning.work_of(rows, [], rows, TrainConfig(), method=method and make(method), by_hand=True)
    share = planning.IN_TRAINING if method == "anchored" else 1
    assert in_training.measured_tokens == pytest.approx(share * work.measured_tokens)
    rate = planning.Rate(step=1.0, forward=0.0, token=0.0)
    assert rate.seconds(work) == work.train_tokens + work.measured_tokens


def test_what_a_method_measures_is_counted_in_its_own_directions():
    layers = {"q": (48, 32), "v": (16, 32)}
    state = empty_state(layers, 4)
    for name, options in (("anchored", {}), ("products", {"metric": "inputs"})):
        method = make(name, options)
        drawn = method.measure(state, method.start(state))
        assert planning.measured_values(method, layers, 4) == sum(each.size for each in drawn.values()) > 0
    assert planning.measured_values(make("slao"), layers, 4) == 0
