"""Scores of every task that a stream has learned, each on its own rows."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from mbf_mlx.config import DataConfig, LearnConfig
from mbf_mlx.data.encode import Encoded, Encoder
from mbf_mlx.data.task import Task, find_again
from mbf_mlx.data.token_rows import EncodedRows
from mbf_mlx.errors import InputError
from mbf_mlx.learning.evaluate import Score, metric_of, score
from mbf_mlx.learning.events import Events
from mbf_mlx.learning.learner import Learner
from mbf_mlx.stream.records import TaskRecord


class TestRows:
    """The encoded test rows of a stream's tasks, read again only when they are asked for.

    A task is scored on the rows, and at the length, that it was learned with, whatever a later task is learned with.
    Only its answers are scored: the tokens of a prompt are given, even where training supervised them too.

    Args:
        tokenizer: The base's.
        template: The stream's, "chat" or "none".
        spill: A folder for tokens that are too many for memory; None is the system's own.
        limit: At most so many rows of a learned task; 0 is all that it was scored on.
    """

    __test__ = False  # no test class of pytest's

    def __init__(self, tokenizer: Any, template: str, spill: Path | None = None, limit: int = 0) -> None:
        self._tokenizer, self._template, self._spill, self._limit = tokenizer, template, spill, limit
        self._rows: dict[tuple[str, int, int], EncodedRows] = {}

    def of_task(self, task: Task, data: DataConfig, limit: int = 0) -> EncodedRows:
        """Return the encoded test rows of a task at hand.

        Args:
            task: As it was read.
            data: The settings that it is learned with.
            limit: How many of its test rows; 0 is all.

        Raises:
            InputError: with every row that does not fit.
        """
        place = (task.sha256, data.max_seq_length, min(limit or len(task.test), len(task.test)))
        if place not in self._rows:
            scored = replace(data, template=self._template, mask_prompt=True)
            encoder = Encoder(self._tokenizer, scored, self._spill)
            self._rows[place] = encoder.all(task.test[: place[2]], task.path)
        return self._rows[place]

    def of_record(self, record: TaskRecord) -> EncodedRows | str:
        """Return the encoded test rows that a learned task was scored on, or why they are not there any more."""
        data = record.data
        count = min(self._limit or record.test_rows, record.test_rows)
        if (place := (record.sha256, data.max_seq_length, count)) in self._rows:
            return self._rows[place]
        found = find_again(record.name, Path(record.path), record.sha256)
        if isinstance(found, str):
            return found
        try:
            return self.of_task(found, data, count)
        except InputError as error:  # the base's tokenizer or template is another one now
            return str(error)


def score_all(
    history: Sequence[TaskRecord],
    newest: Task | None,
    learner: Learner,
    settings: LearnConfig,
    events: Events,
    tests: TestRows,
) -> list[Score | None]:
    """Score the model as it stands on the test rows of every task, `newest` last; None where rows are gone."""
    sources: list[tuple[str, Callable[[], EncodedRows | str], str | None]] = [
        (record.name, partial(tests.of_record, record), record.metric) for record in history
    ]
    if newest is not None:
        read_newest = partial(tests.of_task, newest, settings.data, settings.score_rows)
        sources.append((newest.name, read_newest, None))
    skipped = max(0, len(sources) - settings.score_tasks) if settings.score_tasks else 0
    scores: list[Score | None] = [None] * skipped
    for name, read, metric in sources[skipped:]:
        rows = read()
        if isinstance(rows, str):
            events.note(f"not scored: {rows}")
        if isinstance(rows, str) or not len(rows):  # reading the task has said that it has none
            scores.append(None)
            continue
        scores.append(_score_one(name, rows, metric or metric_of(rows), learner, settings, events))
    return scores


def _score_one(
    name: str, rows: Sequence[Encoded], metric: str, learner: Learner, settings: LearnConfig, events: Events
) -> Score:
    done = 0

    def advance(count: int) -> None:
        nonlocal done
        done += count
        events.scoring(name, done, len(rows))

    result = score(
        learner.engine,
        rows,
        metric,
        model=learner.base.model,
        tokenizer=learner.tokenizer,
        advance=advance,
    )
    if result.close_calls:
        places = ", ".join(f"{rows[i].row.file}:{rows[i].row.line}" for i in result.close_calls[:5])
        events.note(f"{name}: {len(result.close_calls)} answers are close calls that rounding may decide: {places}")
    return result
