"""What a stream writes down about a task: what decides its training, notes for the user, the record in the history."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from mbf_mlx.config import LearnConfig, settings_of
from mbf_mlx.data.encode import Encoded
from mbf_mlx.data.task import Task
from mbf_mlx.data.token_rows import EncodedRows
from mbf_mlx.errors import quoted
from mbf_mlx.learning.evaluate import Score, metric_of
from mbf_mlx.learning.progress import Training
from mbf_mlx.stream.records import ALL_SCORED, SCORE_DIGITS, TaskRecord, score_columns

MUCH_WORSE = 0.2  # of a score in [0, 1]: an old task that loses more by a new one is named


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


def notes_on(task: Task, rows: EncodedRows, settings: LearnConfig, context: int | None) -> list[str]:
    """Return what the user should know about a task's rows: warnings, rows held out or cut, settings without effect.

    Args:
        task: The task as it was read.
        rows: Its training rows.
        settings: How it is learned.
        context: The most tokens that the base can read; None where its config.json does not say.
    """
    notes = list(task.warnings)
    if task.held_out:
        notes.append(f"no test rows were given: {task.held_out} rows are held out for scoring")
    if rows.cut_rows:
        text = rows[0].row.kind == "text"
        what = "what comes after is not learned" if text else "their last user message is cut on its left"
        notes.append(f"{rows.cut_rows} rows have more than {settings.data.max_seq_length:,} tokens: {what}")
    if context and (beyond := int((rows.lengths > context).sum())):
        notes.append(
            f"{beyond} rows have more than the {context:,} tokens that the base can read: what it learns of them is not"
            f" reliable; --max-seq-length {context} cuts them"
        )
    if not len(task.valid):
        unused = [f"--{name.replace('_', '-')}" for name in ("val_every", "patience") if getattr(settings.train, name)]
        if unused:
            notes.append(
                f"{' and '.join(unused)} without effect: the task has no valid rows (valid.jsonl beside train)"
            )
    if settings.throttle:
        notes.append(f"rests {settings.throttle:g} s after each step")
    return notes


def what_fell(before: Sequence[tuple[str, float | None]], scores: Sequence[Score | None], stream: Path) -> str:
    """Return one line on the old tasks that a new one has made much worse, with the way back; nothing where none is.

    Args:
        before: Name and score before of the old tasks that were scored again.
        scores: Their scores now, and the new task's last.
        stream: The stream's folder.
    """
    fell = [
        f"{name} from {100 * old:.0f} % to {100 * new.value:.0f} %"
        for (name, old), new in zip(before, scores)
        if old is not None and new is not None and new.value is not None and old - new.value > MUCH_WORSE
    ]
    way_back = f"mbf undo {quoted(stream)} goes back"
    return f"this task made others worse: {', '.join(fell)}; {way_back}" if fell else ""


def task_record(
    task: Task,
    t: int,
    training: Training,
    rows: EncodedRows,
    valid: Sequence[Encoded],
    test: Sequence[Encoded],
    settings: LearnConfig,
    spans: tuple[tuple[int, int], ...],
    scores: Sequence[Score | None],
    conditions: dict[str, Any],
) -> TaskRecord:
    """Return the line that the stream's history gets.

    Args:
        task, t: The task, and its place in the stream, from 1.
        training: How its training went.
        rows, valid, test: Its token rows.
        settings: The settings that it was learned with.
        spans: Which tasks were scored, as `spans_to_score` returns it; this one is the last of them.
        scores: Their scores, in order; None where there is none.
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
        scores=score_columns(t, spans, [_rounded(score.value) if score else None for score in scores]),
        losses=score_columns(t, spans, [_rounded(score.loss) if score else None for score in scores]),
        scored=spans if t > ALL_SCORED else None,
    )


def _rounded(value: float | None) -> float | None:
    return None if value is None else round(value, SCORE_DIGITS)
