"""Task after task: start, train, merge, score, commit. No math of its own.

A task is encoded, started from what the method says, trained, merged, scored on the test rows of every task so far with
the deployed adapter, and committed at one instant. Until then the stream stays as it was; what training has done so far
stands in `working/`.
"""

from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

from mbf_mlx.config import LearnConfig, settings_of
from mbf_mlx.data.encode import Encoded, Encoder
from mbf_mlx.data.task import Task
from mbf_mlx.data.token_rows import EncodedRows
from mbf_mlx.device import backend
from mbf_mlx.engine.lora_layers import write_factors
from mbf_mlx.errors import InputError
from mbf_mlx.learning.after_training import after_training, with_extra
from mbf_mlx.learning.evaluate import Score, metric_of
from mbf_mlx.learning.events import Events
from mbf_mlx.learning.learner import Learner, machine
from mbf_mlx.learning.progress import Progress, Trained, progress_to_json
from mbf_mlx.learning.scores import TestRows, score_all
from mbf_mlx.learning.team import Team
from mbf_mlx.learning.team_task import task_message
from mbf_mlx.learning.train import train
from mbf_mlx.learning.tuning import Tuning
from mbf_mlx.methods import Method, State, not_finite
from mbf_mlx.stream.folder import StreamFolder
from mbf_mlx.stream.records import SCORE_DIGITS, TaskRecord
from mbf_mlx.stream.saves import Working, check_same_run


def known(stream: StreamFolder, task: Task, again: bool) -> bool:
    """Return whether the stream has learned this task already and it is to be skipped.

    Raises:
        InputError: it has learned another task of this name.
    """
    same_name = [record for record in stream.history() if record.name == task.name]
    if not same_name or again:
        return False
    if any(record.sha256 == task.sha256 for record in same_name):
        return True
    raise InputError(
        f"{task.path}: {stream.path} has learned a task named {task.name!r} with other content"
        "\nhint: give this one another name with --name, or learn it over the old one with --again"
    )


def learn_task(
    stream: StreamFolder,
    learner: Learner,
    method: Method,
    task: Task,
    settings: LearnConfig,
    events: Events,
    tests: TestRows,
    team: Team | None = None,
) -> TaskRecord:
    """Learn one task into the stream, with the processes of a team where there is one. Needs the stream's writer lock.

    Raises:
        InputError: rows that do not fit, an interrupted run of something else, numbers that went wrong; the stream
            is as it was.
    """
    stream.require_space()
    generation = stream.current()
    working = Working(stream.working, stream.files)
    working.check_place()
    run = _run_of(task, generation.number, settings)
    saved = None
    if settings.restart:
        working.drop()
    elif (saved := working.load()) is not None:
        check_same_run(saved, run, stream.working)
    encoder = Encoder(learner.tokenizer, settings.data, stream.path)
    rows, valid, test_rows = _encoded(task, encoder, tests, settings)
    notes = [*encoder.warnings(), *_notes(task, rows)]
    if saved is not None:
        notes.append(f"goes on after step {saved.progress['step']}")
        notes += _differences(saved.machine, machine(team))
    state = stream.state()
    events.task(task.name, state.t + 1, len(rows), notes)

    model = learner.base.model
    everything = with_extra(method, state, rows)
    if extra := len(everything) - len(rows):
        events.note(f"{task.name}: trains on {extra} kept rows of earlier tasks, too")
    learner.bound(settings)
    backend.reset_peak_memory()
    tuning = Tuning(model, method, state)
    if team is not None:
        team.say(task_message(learner.described(), method, state, everything, settings))
    trained = train(
        tuning,
        learner.engine,
        everything,
        valid,
        settings.train,
        report=lambda step: events.step(task.name, step, backend.peak_memory()),
        save=lambda progress, tensors: working.save(
            progress.step, run, machine(team), progress_to_json(progress), tensors
        ),
        resume=(Progress(**saved.progress), saved.tensors) if saved else None,
        guard=settings.guard,
        team=team,
    )
    advance = partial(events.measuring, task.name)
    state = after_training(method, state, tuning, learner.engine, rows, settings.train.batch_size, advance)
    _check_finite(state, task.name)
    peak = backend.peak_memory()

    write_factors(model, state.deployed)
    scores = score_all(stream.history(), task, learner, settings, events, tests)
    record = _record(task, state.t, trained, rows, len(valid), test_rows, peak, settings, scores, machine(team))
    fixed = {"train": settings_of(settings.train), "data": settings_of(settings.data)}
    stream.commit(state, record, str(learner.base.path), fixed)
    working.drop()
    events.learned(record)
    return record


def _differences(saved: dict[str, Any], now: dict[str, Any]) -> list[str]:
    alone = {"processes": 1}
    saved, now = alone | saved, alone | now
    changed = [f"{key} was {saved.get(key)}, is {now[key]}" for key in now if saved.get(key) != now[key]]
    return [f"the result may differ in its last bits: {', '.join(changed)}"] if changed else []


def _run_of(task: Task, generation: int, settings: LearnConfig) -> dict[str, Any]:
    """Return all that decides the result of training a task."""
    chosen = settings_of(settings.train) | settings_of(settings.data)
    del chosen["save_every"], chosen["grad_checkpoint"]  # with or without, the numbers are the same
    return {"task": task.name, "sha256": task.sha256, "generation": generation, **chosen}


def _encoded(
    task: Task, encoder: Encoder, tests: TestRows, settings: LearnConfig
) -> tuple[EncodedRows, EncodedRows, EncodedRows]:
    """Return the tokens of training, validation and test rows.

    Raises:
        InputError: rows that do not fit, those of all three at once.
    """
    found: list[EncodedRows] = []
    problems = []
    for read in (
        partial(encoder.all, task.train, task.path),
        partial(encoder.all, task.valid, task.path),
        partial(tests.of_task, task, settings.data, settings.score_rows),
    ):
        try:
            found.append(read())
        except InputError as error:
            problems.append(str(error))
    if problems:
        raise InputError("\n".join(problems))
    return found[0], found[1], found[2]


def _notes(task: Task, rows: EncodedRows) -> list[str]:
    notes = list(task.warnings)
    if task.held_out:
        notes.append(f"no test rows were given: {task.held_out} rows are held out for scoring")
    if rows.cut_rows:
        notes.append(f"{rows.cut_rows} rows were too long: their last user message is cut on its left")
    return notes


def _check_finite(state: State, name: str) -> None:
    if bad := not_finite(state):
        raise InputError(f"{name}: the merged factors of {bad[0]} are not finite; the stream is as it was")


def _record(
    task: Task,
    t: int,
    trained: Trained,
    rows: EncodedRows,
    valid_rows: int,
    test_rows: Sequence[Encoded],
    peak: int,
    settings: LearnConfig,
    scores: Sequence[Score | None],
    where: dict[str, Any],
) -> TaskRecord:
    progress, newest = trained.progress, scores[-1]
    return TaskRecord(
        name=task.name,
        t=t,
        path=str(Path(task.path).resolve()),
        sha256=task.sha256,
        format=task.format,
        metric=newest.metric if newest else metric_of(test_rows),
        train_rows=len(rows),
        valid_rows=valid_rows,
        test_rows=len(test_rows),
        held_out=task.held_out,
        cut_rows=rows.cut_rows,
        train_tokens=progress.real_tokens,
        computed_tokens=progress.computed_tokens,
        steps=progress.step,
        best_step=progress.best_step or progress.step,
        seconds=round(progress.seconds, 3),
        tokens_per_second=round(progress.real_tokens / max(progress.seconds, 1e-9), 2),
        loss_before=_rounded(progress.loss_before),
        loss_after=_rounded(trained.loss_after),
        peak_memory_bytes=peak,
        settings=settings_of(settings.train) | settings_of(settings.data),
        labels=task.labels,
        curve=trained.curve,
        machine=where,
        scores=[_rounded(s.value) if s else None for s in scores],
        losses=[_rounded(s.loss) if s else None for s in scores],
    )


def _rounded(value: float | None) -> float | None:
    return None if value is None else round(value, SCORE_DIGITS)
