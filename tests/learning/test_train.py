import dataclasses
import time

import numpy as np
import pytest

from mbf_mlx.config import LoRAConfig, TrainConfig
from mbf_mlx.errors import InputError

mx = pytest.importorskip("mlx.core", reason="mlx is not installed: pip install 'mbf-mlx[cpu]'")

import mlx.optimizers as optim  # noqa: E402

from mbf_mlx.data.batches import make_batch  # noqa: E402
from mbf_mlx.data.task import read_task  # noqa: E402
from mbf_mlx.engine.lora_layers import write_factors  # noqa: E402
from mbf_mlx.learning.progress import Progress  # noqa: E402
from mbf_mlx.learning.step_rules import FLOOR, clipped, rate_at  # noqa: E402
from tests.support import bench as a_bench  # noqa: E402
from tests.support.bench import QUICK, Bench  # noqa: E402
from tests.support.rows import rows_of  # noqa: E402

bench = a_bench.bench


def same(one, other):
    return all(np.array_equal(x, y) for name in one for x, y in zip(one[name], other[name], strict=True))


def test_training_lowers_the_loss_and_counts_every_row_once_an_epoch(bench):
    steps = []
    trained = bench.run(report=steps.append)
    assert len(steps) == 2 * 6 == steps[-1].steps
    assert trained.loss_after < trained.progress.loss_before
    assert trained.progress.real_tokens == 2 * sum(len(row.tokens) for row in bench.rows)


def test_two_runs_are_equal_to_the_bit_and_another_seed_is_not(bench):
    bench.run()
    first = bench.factors()
    bench.run()
    assert same(bench.factors(), first)
    bench.run(dataclasses.replace(QUICK, seed=1))
    assert not same(bench.factors(), first)


@pytest.mark.parametrize("stop", [1, 5, 12])
def test_a_run_continued_from_a_save_ends_equal_to_the_bit(bench, stop):
    saves = []
    config = dataclasses.replace(QUICK, grad_accumulation_steps=1, max_grad_norm=0.5, weight_decay=0.01)
    whole = bench.run(config, valid=bench.rows[:5], save=lambda *saved: saves.append(saved))
    expected = bench.factors()
    assert [progress.step for progress, _ in saves] == list(range(1, 13))
    progress, tensors = saves[stop - 1]
    again = bench.run(config, valid=bench.rows[:5], resume=(Progress(**dataclasses.asdict(progress)), tensors))
    assert same(bench.factors(), expected)
    timeless = {"seconds": 0.0}
    assert dataclasses.replace(again.progress, **timeless) == dataclasses.replace(whole.progress, **timeless)


def test_dropout_is_continued_to_the_bit_too(tiny_llama, write_jsonl):
    write_jsonl("words/test.jsonl", rows_of(6, seed=1))
    task = read_task(write_jsonl("words/train.jsonl", rows_of(12)).parent)
    bench = Bench(tiny_llama, task, LoRAConfig(rank=4, dropout=0.3))
    saves = []
    bench.run(save=lambda *saved: saves.append(saved))
    expected = bench.factors()
    bench.run(resume=saves[1])
    assert same(bench.factors(), expected)


def test_the_best_step_is_chosen_by_the_factors_own_loss_without_dropout(tiny_llama, write_jsonl):
    write_jsonl("words/test.jsonl", rows_of(6, seed=1))
    task = read_task(write_jsonl("words/train.jsonl", rows_of(12)).parent)
    bench = Bench(tiny_llama, task, LoRAConfig(rank=4, dropout=0.5))
    valid, seen = bench.rows[:5], []
    bench.run(valid=valid, report=seen.append)
    judged = {step.step: step.valid_loss for step in seen if step.valid_loss is not None}
    assert len(judged) == 2
    bench.base.model.eval()
    batch = make_batch(valid, range(len(valid)))
    own = float(bench.engine.loss_sum(batch)) / len(batch.targets)  # of the best step, which is put back at the end
    assert min(judged.values()) == pytest.approx(own, rel=1e-5)


def test_accumulated_batches_give_the_step_of_one_large_batch(bench):
    one = dataclasses.replace(QUICK, epochs=1, batch_size=len(bench.rows), learning_rate=1e-3)
    trained = bench.run(one)
    large = bench.factors()
    small = bench.run(dataclasses.replace(one, batch_size=3, grad_accumulation_steps=8))
    assert len(small.progress.losses) == len(trained.progress.losses) == 1
    for name, pair in bench.factors().items():
        for x, y in zip(pair, large[name], strict=True):
            # AdamW's first step is the sign of the gradient: entries next to zero may differ
            assert np.mean(np.abs(x - y) < 1e-5) > 0.98
    np.testing.assert_allclose(small.progress.losses, trained.progress.losses, rtol=1e-5)


def test_iters_take_the_place_of_epochs(bench):
    steps = []
    bench.run(dataclasses.replace(QUICK, iters=7), report=steps.append)
    assert [step.step for step in steps] == list(range(1, 8))


def test_the_rate_warms_up_and_decays_to_a_tenth(bench):
    steps = []
    bench.run(dataclasses.replace(QUICK, iters=10, warmup=0.2), report=steps.append)
    rates = [step.learning_rate for step in steps]
    assert rates[0] == pytest.approx(QUICK.learning_rate / 2)
    assert max(rates) == rates[1] == QUICK.learning_rate
    assert rates[-1] == pytest.approx(QUICK.learning_rate / 10)
    assert rates[1:] == sorted(rates[1:], reverse=True)


def test_the_best_step_by_validation_is_kept_and_patience_ends_the_run(bench):
    config = dataclasses.replace(QUICK, epochs=40, learning_rate=0.05, val_every=2, patience=2)
    steps = []
    saves = {}

    def save(progress, tensors):
        saves[progress.step] = tensors

    trained = bench.run(config, valid=bench.rows[:4], report=steps.append, save=save, guard=False)
    losses = {step.step: step.valid_loss for step in steps if step.valid_loss is not None}
    progress = trained.progress
    assert progress.stopped and progress.step < 240
    assert progress.best_loss == min(losses.values())
    assert losses[progress.best_step] == progress.best_loss
    assert progress.step == progress.best_step + 4
    name = next(iter(bench.start))
    np.testing.assert_array_equal(saves[progress.best_step][f"factor.{name}.b"], bench.factors()[name][1])


def test_a_loss_that_is_not_finite_stops_with_the_step_and_its_rows(bench):
    broken = {name: (a, b * np.nan) for name, (a, b) in bench.start.items()}
    from mbf_mlx.methods import Pair

    write_factors(bench.base.model, {name: Pair(*pair) for name, pair in broken.items()})
    message = r"step 1: the loss \(nan\) is not finite, on rows .*train.jsonl:\d+.*\nhint: .*smaller --learning-rate"
    with pytest.raises(InputError, match=message):
        bench.run(start=False)


def test_a_loss_that_explodes_stops_the_run_unless_the_guard_is_off(bench):
    bench.run(dataclasses.replace(QUICK, epochs=15))  # a start from which the loss can grow by a factor of three
    wild = dataclasses.replace(QUICK, learning_rate=3000.0, max_grad_norm=0.0, epochs=40)
    with pytest.raises(InputError, match=r"above 3 x that of the first step .* for 50 steps .*\nhint: .*--no-guard"):
        bench.run(wild, start=False)


def test_the_curve_has_at_most_24_points_and_ends_at_the_last_step(bench):
    trained = bench.run(dataclasses.replace(QUICK, iters=60))
    assert len(trained.curve) == 24
    assert trained.curve[-1][0] == 60


@pytest.mark.parametrize("steps", [1, 2, 5, 40, 1000])
@pytest.mark.parametrize("warmup", [0.0, 0.1, 0.9])
def test_the_rate_is_that_of_mlxs_own_schedules_but_for_its_last_bits(steps, warmup):
    config, rising = TrainConfig(learning_rate=5e-4, warmup=warmup), max(1, round(warmup * steps))
    falling = optim.cosine_decay(5e-4, max(1, steps - rising), FLOOR * 5e-4)
    theirs = optim.join_schedules([optim.linear_schedule(0.0, 5e-4, rising), falling], [rising])
    for step in range(1, steps + 1):
        assert rate_at(config, steps, step) == pytest.approx(theirs(mx.array(step)).item(), rel=1e-6)


@pytest.mark.parametrize("most", [0.1, 1.0, 100.0])
def test_gradients_are_clipped_as_mlx_clips_them_but_for_their_last_bits(most):
    generator = np.random.default_rng(0)
    gradients = {name: mx.array(generator.normal(size=(4, 3)).astype(np.float32)) for name in "ab"}
    (ours, norm), (theirs, same_norm) = clipped(gradients, most), optim.clip_grad_norm(gradients, most)
    assert norm.item() == pytest.approx(same_norm.item(), rel=1e-6)
    for name in gradients:
        np.testing.assert_allclose(np.array(ours[name]), np.array(theirs[name]), rtol=2e-6)
    assert clipped(gradients, 0)[0] is gradients


def test_a_throttled_run_rests_after_each_step_and_ends_with_the_same_bits(bench, monkeypatch):
    rests = []
    bench.run()
    expected = bench.factors()
    monkeypatch.setattr(time, "sleep", rests.append)
    trained = bench.run(throttle=0.2)
    assert rests == [0.2] * trained.progress.step
    assert same(bench.factors(), expected)
