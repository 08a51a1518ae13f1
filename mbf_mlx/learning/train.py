"""Tunes the attached factors on one task. Does not merge and does not commit.

The loss is the cross-entropy over supervised tokens alone, plus the method's penalty if it has one. The optimizer is
AdamW, a fresh one for each task, with warmup and cosine decay. Every random choice is a function of (seed, epoch) or
(seed, step), so a run that goes on from a save ends with the same bits. Losses are per supervised token, in nats, and
leave the penalty out. tuning.py decides what trains and how the model applies it.
"""

import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

import mlx.core as mx
import mlx.optimizers as optim
import numpy as np

from mbf_mlx.base.load import not_finite_weight
from mbf_mlx.config import SAMPLE_ROWS, TrainConfig
from mbf_mlx.data.batches import Batch, lengths_of, make_batch, plan_batches
from mbf_mlx.data.encode import Encoded
from mbf_mlx.device.machine import freed_memory_kept
from mbf_mlx.engine.engine import Arrays, Engine
from mbf_mlx.errors import InputError, MemoryLimitError
from mbf_mlx.learning.events import Step
from mbf_mlx.learning.inputs_in_training import InputsInTraining
from mbf_mlx.learning.progress import Progress, SaveClock, Tensors, Trained, check_shapes
from mbf_mlx.learning.step_rules import clipped, rate_at, seed_dropout, steps_an_epoch, steps_of
from mbf_mlx.learning.team import Message, Team
from mbf_mlx.learning.tuning import Tuning

GUARD_RISE = 0.5  # nats: a run that ends with so much more loss, and GUARD_FACTOR times as much, has ruined the task
GUARD_FACTOR, GUARD_STEPS = 3.0, 50  # a loss this many times the first, for so many steps, has exploded

Save = Callable[[Progress, Tensors], None]


@freed_memory_kept()
def train(
    tuning: Tuning,
    engine: Engine,
    rows: Sequence[Encoded],
    valid: Sequence[Encoded],
    config: TrainConfig,
    *,
    report: Callable[[Step], None] = lambda step: None,
    save: Save | None = None,
    resume: tuple[Progress, Tensors] | None = None,
    guard: bool = True,
    team: Team | None = None,
    throttle: float = 0.0,
    measure: InputsInTraining | None = None,
) -> Trained:
    """Tune the attached factors on `rows`; `tuning` holds the result, and its model applies it.

    Args:
        tuning: What trains.
        engine: The engine of its model.
        rows: The rows to train on, at least one.
        valid: The rows to choose the best step by; may be empty.
        config: Epochs or steps, rates, batch sizes.
        report: Called after every optimizer step.
        save: Called with everything that continues the run, as often as `config.save_every` says, and at the end.
        resume: What `save` was called with last.
        guard: Stop a run whose loss has exploded, and refuse one that ends far worse than it began.
        team: The processes that share each step's rows; they have been told of the task.
        throttle: Seconds of rest after each step.
        measure: Sums the layers' inputs in the last steps; not with validation rows.

    Raises:
        InputError: a loss or gradient that is not finite, or a loss that exploded; the step and its rows are named.
        MemoryLimitError: a batch would not fit; what was done until then is saved.
    """
    tuning.model.train()
    if measure is not None and resume is not None:
        resume = resume[0], measure.take(*resume)
    run = _Run(tuning, engine, rows, config, team, measure)
    progress = run.restore(resume) if resume else replace(Progress(), loss_before=run.sample_loss())
    clock = SaveClock(config.save_steps, config.save_seconds, time.monotonic())
    groups = run.groups(progress.step)
    group = next(groups, None)
    while group is not None and not progress.stopped:
        number, started = progress.step + 1, time.perf_counter()
        try:
            engine.training_note = measure.note if measure is not None and number >= measure.since else None
            begun = run.begin(number, group)
        except MemoryLimitError:
            if save and progress.step:
                save(progress, run.tensors(progress.step))
            raise
        finally:
            engine.training_note = None
        group = next(groups, None)  # made while the device computes
        progress = run.finish(progress, begun, guard)
        progress = replace(progress, seconds=progress.seconds + time.perf_counter() - started)
        valid_loss = None
        if valid and (number % run.val_every == 0 or number == run.steps):
            valid_loss = run.mean_loss(valid, f"step {number}: the validation loss")
            progress = run.judge(progress, number, valid_loss)
        rate = progress.real_tokens / max(progress.seconds, 1e-9)
        report(
            Step(
                step=number,
                steps=run.steps,
                loss=progress.losses[-1],
                learning_rate=run.rate(number),
                tokens_per_second=rate,
                valid_loss=valid_loss,
            )
        )
        began = time.monotonic()
        if save and (clock.is_due(number, began) or number == run.steps or progress.stopped):
            save(progress, run.tensors(progress.step))
            clock.saved(began, time.monotonic())
        if throttle:
            time.sleep(throttle)
    run.restore_best()
    loss_after = run.sample_loss(f"step {progress.step}: the loss after training")
    if guard and progress.loss_before is not None:
        run.check_end(progress.loss_before, loss_after)
    return Trained(progress=progress, loss_after=loss_after, inputs=measure.seen() if measure else None)


class Sums:
    """The loss and its gradients, summed over the supervised tokens of some of a task's rows."""

    def __init__(self, tuning: Tuning, engine: Engine, rows: Sequence[Encoded]) -> None:
        self.tuning, self.engine, self.rows = tuning, engine, rows
        self.loss_and_grad = engine.loss_and_grad(tuning.apply)

    def __call__(self, batches: Sequence[Batch]) -> tuple[mx.array, Arrays]:
        """Return loss and gradients of batches that go through the model one after another; zeros for no batch."""
        trained = self.tuning.trained
        total, gradients = mx.array(0.0), {name: mx.zeros_like(array) for name, array in trained.items()}
        for batch in batches:
            mx.eval(total, gradients)  # two batches are never in memory at once
            loss, new = self.loss_and_grad(trained, batch)
            total = total + loss
            gradients = {name: gradient + new[name] for name, gradient in gradients.items()}
        return total, gradients

    def over(self, team: Team, batches: Sequence[Sequence[int]]) -> tuple[mx.array, Arrays]:
        """Return loss and gradients of batches, given as row indices; the team's processes share each batch."""
        total, gradients = self([make_batch(self.rows, own) for rows in batches if (own := team.share(rows))])
        sums = team.add({"": np.array(total)} | {f".{name}": np.array(g) for name, g in gradients.items()})
        return mx.array(sums[""]), {name: mx.array(sums[f".{name}"]) for name in gradients}


@dataclass(frozen=True, kw_only=True)
class _Begun:
    """A step that the device is computing."""

    number: int
    group: list[Batch]
    loss: mx.array  # the sum over the group's supervised tokens
    supervised: int  # how many these are
    norm: mx.array  # of the gradients, before they are clipped
    gradients: Arrays


class _Run:
    """The moving parts of one run."""

    def __init__(
        self,
        tuning: Tuning,
        engine: Engine,
        rows: Sequence[Encoded],
        config: TrainConfig,
        team: Team | None,
        measure: InputsInTraining | None,
    ) -> None:
        self.measure = measure
        self.tuning, self.engine, self.rows, self.config, self.team = tuning, engine, rows, config, team
        self.lengths = lengths_of(rows)
        self.steps = steps_of(config, len(rows))
        self.val_every = config.val_every or steps_an_epoch(config, len(rows))
        self.optimizer = optim.AdamW(learning_rate=self.rate(1), weight_decay=config.weight_decay, bias_correction=True)
        self.optimizer.init(tuning.trained)
        self.sums = Sums(tuning, engine, rows)
        self.penalty_and_grad = mx.value_and_grad(tuning.penalty) if tuning.has_penalty else None
        self.best: Tensors = {}

    def rate(self, step: int) -> float:
        """The learning rate of a step, from 1."""
        return rate_at(self.config, self.steps, step)

    def groups(self, skip: int) -> Iterator[list[Batch]]:
        """Yield the batches of each optimizer step after the first `skip`, for as many epochs as the steps take."""
        step, epoch, size = 0, 0, self.config.grad_accumulation_steps
        while step < self.steps:
            plan = plan_batches(self.lengths, self.config.batch_size, self.config.seed, epoch)
            for first in range(0, len(plan), size):
                step += 1
                if step > self.steps:
                    return
                if step > skip:
                    yield [make_batch(self.rows, indices) for indices in plan[first : first + size]]
            epoch += 1

    def begin(self, number: int, group: list[Batch]) -> _Begun:
        """Begin a step without waiting for the device; `tuning` then holds the factors after it."""
        seed_dropout(self.config.seed, number)
        tuning, trained = self.tuning, self.tuning.trained
        supervised = sum(len(batch.targets) for batch in group)
        if self.team is None:
            total, gradients = self.sums(group)
        else:
            indices = [list(batch.indices) for batch in group]
            self.team.say(Message("step", {"number": number, "batches": indices}, self._trained()))
            total, gradients = self.sums.over(self.team, indices)
        gradients = {name: gradient / supervised for name, gradient in gradients.items()}
        if self.penalty_and_grad is not None:
            _, new = self.penalty_and_grad(trained)
            gradients = {name: gradient + new[name] for name, gradient in gradients.items()}
        short, norm = clipped(gradients, self.config.max_grad_norm)
        self.optimizer.learning_rate = mx.array(self.rate(number))
        tuning.update(self._at_rates(trained, self.optimizer.apply_gradients(short, trained)))
        mx.async_eval(total, norm, self.optimizer.state)
        return _Begun(number=number, group=group, loss=total, supervised=supervised, norm=norm, gradients=gradients)

    def finish(self, progress: Progress, begun: _Begun, guard: bool) -> Progress:
        """Wait for a step that was begun, and check its loss."""
        number, group, value = begun.number, begun.group, float(begun.loss) / begun.supervised
        if not (math.isfinite(value) and math.isfinite(float(begun.norm))):
            raise InputError(self._not_finite(number, group, value, begun.gradients))
        first = progress.first_loss if progress.first_loss is not None else value
        high = progress.high_steps + 1 if value > GUARD_FACTOR * first else 0
        if guard and high >= GUARD_STEPS:
            raise InputError(
                f"step {number}: the loss has stood above {GUARD_FACTOR:g} x that of the first step ({first:.3f}) for"
                f" {GUARD_STEPS} steps and is {value:.3f}; the stream is as it was before this task"
                f"\nhint: a smaller --learning-rate than {self.config.learning_rate:g}, or --no-guard"
            )
        return replace(
            progress,
            step=number,
            first_loss=first,
            high_steps=high,
            losses=[*progress.losses, value],
            real_tokens=progress.real_tokens + sum(batch.real_tokens for batch in group),
            computed_tokens=progress.computed_tokens + sum(batch.computed_tokens for batch in group),
        )

    def check_end(self, before: float, after: float) -> None:
        """Refuse factors that do far worse on the task's own rows than those that training started from.

        Raises:
            InputError: the loss, in nats, has grown beyond three times what it was, and by more than GUARD_RISE.
        """
        if after > max(GUARD_FACTOR * before, before + GUARD_RISE):
            raise InputError(
                f"training has made the task worse: its loss was {before:.3f} before and is {after:.3f}; the stream is"
                " as it was before this task"
                f"\nhint: a smaller --learning-rate than {self.config.learning_rate:g} and --restart, or --no-guard"
            )

    def _at_rates(self, old: Arrays, new: Arrays) -> Arrays:
        """Return the arrays after a step, each at its own rate: AdamW's whole step is proportional to the rate."""
        rates = self.tuning.rates
        return {n: a if rates[n] == 1 else old[n] + rates[n] * (a - old[n]) for n, a in new.items()}

    def _not_finite(self, number: int, group: list[Batch], loss: float, gradients: Arrays) -> str:
        if weight := not_finite_weight(self.tuning.model):
            return (
                f"the base's weight {weight} holds NaN or infinite numbers; the stream is as it was"
                "\nhint: fetch the base again, or use another copy"
            )
        bad = [name for name, g in gradients.items() if not bool(mx.isfinite(g).all())]
        rows = [self.rows[index].row for batch in group for index in batch.indices]
        places = ", ".join(f"{row.file}:{row.line}" for row in rows[:8])
        what = f"gradient of {bad[0]}" if math.isfinite(loss) and bad else f"loss ({loss})"
        layer = f", first in {bad[0]}" if bad and not math.isfinite(loss) else ""
        return (
            f"step {number}: the {what} is not finite, on rows {places}{layer}; the stream is as it was before this"
            " task"
            f"\nhint: look at these rows, or use a smaller --learning-rate than {self.config.learning_rate:g}"
        )

    def mean_loss(self, rows: Sequence[Encoded], what: str = "") -> float:
        """Return the factors' own loss per supervised token over `rows`, without dropout.

        With `what`, a loss that is not finite is an error.
        """
        self.tuning.model.eval()
        try:
            return self._mean_loss(rows, what)
        finally:
            self.tuning.model.train()

    def _mean_loss(self, rows: Sequence[Encoded], what: str) -> float:
        total, count = 0.0, 0
        for indices in plan_batches(lengths_of(rows), self.config.batch_size, 0, 0):
            batch = make_batch(rows, indices)
            loss = float(self.engine.loss_sum(batch))
            if what and not math.isfinite(loss):
                places = ", ".join(f"{rows[i].row.file}:{rows[i].row.line}" for i in batch.indices[:8])
                raise InputError(
                    f"{what} ({loss}) is not finite, on rows {places}; the stream is as it was before this task"
                    f"\nhint: look at these rows, or use a smaller --learning-rate than {self.config.learning_rate:g}"
                )
            total += loss
            count += len(batch.targets)
        return total / count

    def sample_loss(self, what: str = "") -> float:
        """Return the loss on evenly spaced training rows, to compare before and after training."""
        picks = np.linspace(0, len(self.rows) - 1, min(SAMPLE_ROWS, len(self.rows))).astype(int)
        return self.mean_loss([self.rows[int(i)] for i in picks], what)

    def judge(self, progress: Progress, number: int, valid_loss: float) -> Progress:
        """Keep the factors if this validation is the best so far."""
        if progress.best_loss is None or valid_loss < progress.best_loss:
            self.best = self._trained()
            return replace(progress, best_loss=valid_loss, best_step=number, validations_since=0)
        since = progress.validations_since + 1
        stopped = bool(self.config.patience) and since >= self.config.patience
        return replace(progress, validations_since=since, stopped=stopped)

    def _trained(self) -> Tensors:
        return {name: np.array(array) for name, array in self.tuning.trained.items()}

    def tensors(self, step: int = 0) -> Tensors:
        """All arrays that continue the run after a step."""
        tensors = {f"factor.{name}": array for name, array in self._trained().items()}
        tensors |= {f"best.{name}": array for name, array in self.best.items()}
        for name in self.tuning.trained:
            tensors |= {f"moment.{kind}.{name}": np.array(m) for kind, m in self.optimizer.state[name].items()}
        return tensors | (self.measure.tensors() if self.measure and step >= self.measure.since else {})

    def restore(self, saved: tuple[Progress, Tensors]) -> Progress:
        progress, tensors = saved
        check_shapes(tensors, {name: array.shape for name, array in self.tensors().items()})
        factors: Tensors = {}
        for key, array in tensors.items():
            part, _, name = key.partition(".")
            if part == "moment":
                kind, _, name = name.partition(".")
                self.optimizer.state[name][kind] = mx.array(array)
            else:
                (self.best if part == "best" else factors)[name] = array
        self.tuning.update(factors)
        self.optimizer.state["step"] = mx.array(progress.step, mx.uint64)
        self.optimizer.state["learning_rate"] = mx.array(self.rate(max(1, progress.step)))
        return progress

    def restore_best(self) -> None:
        self.tuning.update(self.best)
        mx.clear_cache()
