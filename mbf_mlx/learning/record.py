"""What a stream writes down about a task: what decides its training, notes for the user, the record in the history."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from mbf_mlx.config import LearnConfig, settings_of
from mbf_mlx.data.encode import Encoded
from mbf_mlx.data.task import Task
from mbf_mlx.data.token_rows import EncodedRows
from mbf_mlx.learning.evaluate import Score, metric_of
from mbf_mlx.learning.progress import Training
from mbf_mlx.stream.records import SCORE_DIGITS, TaskRecord


def run_of(task: Task, generation: int, settings: LearnConfig) -> dict[str, Any]:
    """Return all that decides the result of training a task, as plain JSON values."""
    chosen = settings_of(settings.train) | settings_of(settings.data)
    del chosen["save_every"], chosen["grad_checkpoint"]  # with or without, the numbers are the same
    return {"task": task.name, "sha256": task.sha256, "generation": generation, **chosen}


def differences(saved: dict[str, Any], now: dict[str, Any]) -> list[str]:
    """Return a note if a saved run goes on under other conditions (both as `run_conditions` returns them)."""
    alone = {"processes": 1}
    saved, now = alone | saved, alone | now
    changed = [f"{key} was {saved.get(key)}, is {now[key]}" for key in now if saved.get(key) != now[key]]
    return [f"the result may differ in its last bits: {', '.join(changed)}"] if changed else []


def notes_on(task: Task, rows: EncodedRows) -> list[str]:
    """Return what the user should know about a task's rows: warnings, rows held out, rows cut."""
    notes = list(task.warnings)
    if task.held_out:
        notes.append(f"no test rows were given: {task.held_out} rows are held out for scoring")
    if rows.cut_rows:
        notes.append(f"{rows.cut_rows} rows were too long: their last user message is cut on its left")
    return notes


def task_record(
    task: Task,
    t: int,
    training: Training,
    rows: EncodedRows,
    valid: Sequence[Encoded],
    test: Sequence[Encoded],
    settings: LearnConfig,
    scores: Sequence[Score | None],
    conditions: dict[str, Any],
) -> TaskRecord:
    """Return the line that the stream's history gets.

    Args:
        task, t: The task, and its place in the stream, from 1.
        training: How its training went.
        rows, valid, test: Its token rows.
        settings: The settings that it was learned with.
        scores: The scores of every task so far, this one last; None where there is none.
        conditions: As `run_conditions` returns them.
    """
    newest = scores[-1]
    return TaskRecord(
        name=task.name,
        t=t,
        path=str(Path(task.path).resolve()),
        sha256=task.sha256,
        format=task.format,
        metric=newest.metric if newest else metric_of(test),
        train_rows=len(rows),
        valid_rows=len(valid),
        test_rows=len(test),
        held_out=task.held_out,
        cut_rows=rows.cut_rows,
        train_tokens=training.tokens,
        computed_tokens=training.computed_tokens,
        steps=training.steps,
        best_step=training.best_step or training.steps,
        seconds=round(training.seconds, 3),
        tokens_per_second=round(training.tokens / max(training.seconds, 1e-9), 2),
        loss_before=_rounded(training.loss_before),
        loss_after=_rounded(training.loss_after),
        peak_memory_bytes=training.peak_memory_bytes,
        settings=settings_of(settings.train) | settings_of(settings.data),
        labels=task.labels,
        curve=list(training.curve),
        machine=conditions,
        scores=[_rounded(score.value) if score else None for score in scores],
        losses=[_rounded(score.loss) if score else None for score in scores],
    )


def _rounded(value: float | None) -> float | None:
    return None if value is None else round(value, SCORE_DIGITS)
