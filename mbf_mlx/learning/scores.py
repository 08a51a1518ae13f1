"""Scores of a stream's tasks, each on its own test rows, and the table that `mbf eval` shows."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from mbf_mlx.base.load import load_tokenizer
from mbf_mlx.config import DataConfig, LearnConfig
from mbf_mlx.data.encode import Encoded, Encoder
from mbf_mlx.data.task import Task, find_again
from mbf_mlx.data.token_rows import EncodedRows
from mbf_mlx.errors import InputError
from mbf_mlx.learning.evaluate import Score, metric_of, score
from mbf_mlx.learning.events import Events
from mbf_mlx.learning.learner import Learner
from mbf_mlx.stream.folder import StreamFolder
from mbf_mlx.stream.records import ALL_SCORED, TaskRecord

MOST_NAMED = 3  # tasks that could not be scored and are named one by one
MOST_KEPT = 2 * ALL_SCORED  # tasks whose encoded test rows stay in memory


def answers_alone(data: DataConfig) -> DataConfig:
    """Return the settings that test rows are encoded with: prompts are not scored, even where they are trained on."""
    return replace(data, mask_prompt=True)


class TestRows:
    """The encoded test rows of a stream's tasks, read again only when they are asked for.

    A task is always scored on the rows and at the length that it was learned with, whatever settings a later task has.

    Args:
        tokenizer: The base's tokenizer.
        template: The stream's template, "chat" or "none".
        spill: A folder for tokens that do not fit in memory; None is the system's own.
        near: The stream's folder, around which a task is looked for that is not where it was.
        limit: Score a learned task on at most this many rows; 0 is all that it was scored on.
        date: The day that the chat template writes for tasks whose record names none.
    """

    __test__ = False  # no test class of pytest's

    def __init__(
        self,
        tokenizer: Any,
        template: str,
        spill: Path | None = None,
        near: Path | None = None,
        limit: int = 0,
        date: str = "",
    ) -> None:
        self._tokenizer, self._template, self._spill, self._near = tokenizer, template, spill, near
        self._limit, self._date = limit, date
        self._rows: dict[tuple[str, int, int, str], EncodedRows] = {}

    def of_task(self, task: Task, data: DataConfig, limit: int = 0) -> EncodedRows:
        """Return the encoded test rows of a task that has been read.

        Args:
            task: The task.
            data: The settings that it is learned with.
            limit: The number of its test rows to take; 0 is all.

        Raises:
            InputError: names every row that does not fit.
        """
        place = (task.sha256, data.max_seq_length, min(limit or len(task.test), len(task.test)), data.date)
        if place not in self._rows:
            encoder = Encoder(self._tokenizer, answers_alone(replace(data, template=self._template)), self._spill)
            self._rows[place] = encoder.all(task.test[: place[2]], task.path)
            if len(self._rows) > MOST_KEPT:
                self._rows.pop(next(iter(self._rows)))
        return self._rows[place]

    def of_record(self, record: TaskRecord) -> EncodedRows | str:
        """Return the encoded test rows that a learned task was scored on, or a sentence on why they are gone."""
        data = replace(record.data, date=record.data.date or self._date)
        count = min(self._limit or record.test_rows, record.test_rows)
        if (place := (record.sha256, data.max_seq_length, count, data.date)) in self._rows:
            return self._rows[place]
        found = find_again(record.name, Path(record.path), record.sha256, self._near)
        if isinstance(found, str):
            return found
        try:
            return self.of_task(found, data, count)
        except InputError as error:  # the base's tokenizer or template is another one now
            return str(error)


def score_all(
    records: Sequence[TaskRecord],
    newest: Task | None,
    learner: Learner,
    settings: LearnConfig,
    events: Events,
    tests: TestRows,
) -> list[Score | None]:
    """Score the model as it stands on tasks.

    Args:
        records: Tasks that the stream has learned.
        newest: A task that the stream has no record of yet; scored last.
        learner: The model; it applies the factors that are to be scored.
        settings: How `newest` is encoded.
        events: Told how far scoring is, and which rows are gone.
        tests: The test rows.

    Returns:
        One score for each task, in order; None where its rows are gone.
    """
    sources: list[tuple[str, Callable[[], EncodedRows | str], str | None]] = [
        (record.name, partial(tests.of_record, record), record.metric) for record in records
    ]
    if newest is not None:
        read_newest = partial(tests.of_task, newest, settings.data, settings.score_rows)
        sources.append((newest.name, read_newest, None))
    scores: list[Score | None] = []
    gone: list[str] = []
    for name, read, metric in sources:
        rows = read()
        if isinstance(rows, str):
            gone.append(rows)
        if isinstance(rows, str) or not len(rows):  # reading the task has said that it has none
            scores.append(None)
            continue
        scores.append(score_rows(learner, name, rows, metric or metric_of(rows), events))
    for reason in gone[:MOST_NAMED]:
        events.note(f"not scored: {reason}")
    if len(gone) > MOST_NAMED:
        events.note(f"not scored: {len(gone) - MOST_NAMED} more tasks, for reasons like these")
    return scores


def score_rows(learner: Learner, name: str, rows: Sequence[Encoded], metric: str, events: Events) -> Score:
    """Score the model as it stands on one task.

    Args:
        learner: The model; it applies the factors that are to be scored.
        name: What messages call the task.
        rows: Its test rows, at least one.
        metric: "exact_match", "rouge_l" or "loss".
        events: Told how far scoring is, and of answers that rounding may decide.
    """
    done = 0

    def advance(count: int) -> None:
        nonlocal done
        done += count
        events.scoring(name, done, len(rows))

    result = score(
        learner.engine,
        rows,
        metric,
        tokenizer=learner.tokenizer,
        advance=advance,
    )
    if result.close_calls:
        places = ", ".join(f"{rows[i].row.file}:{rows[i].row.line}" for i in result.close_calls[:5])
        events.note(f"{name}: {len(result.close_calls)} answers are close calls that rounding may decide: {places}")
    return result


def evaluate_stream(
    stream: StreamFolder,
    load: Callable[[], Learner],
    given: Sequence[Task],
    settings: LearnConfig,
    events: Events,
) -> dict[str, Any]:
    """Score the stream's deployed adapter.

    Args:
        stream: The stream; it is not changed.
        load: Returns its base model with factors attached.
        given: The tasks to score on; none is all that were learned.
        settings: How tasks that were not learned are encoded, and how many rows of each task are scored.
        events: Told how far scoring is, and which rows are gone.

    Returns:
        {"tasks": [{"name", "metric", "score", "loss", "rows"}], "average_accuracy"}. Scores are in [0, 1], losses in
        nats; both are None where the rows are gone. A task that was learned is scored as it was learned.

    Raises:
        InputError: there is nothing to score, or rows do not fit.
    """
    history, state = stream.history(), stream.state()
    if not given and not history:
        raise InputError(f"{stream.path}: nothing to score: it has learned no task")
    learner = load()
    learner.deploy(state.deployed)
    tests = TestRows(
        learner.tokenizer, settings.data.template, near=stream.path, limit=settings.score_rows, date=settings.data.date
    )
    learned = {record.sha256: record for record in history}
    rows: list[dict[str, Any]] = []
    for each in given or history:
        record = learned.get(each.sha256) if isinstance(each, Task) else each
        if record is not None:
            (score,) = score_all([record], None, learner, settings, events, tests)
            metric = record.metric
        elif isinstance(each, Task):
            if each.held_out:
                events.note(f"{each.name}: no test rows were given: {each.held_out} rows of it are scored")
            (score,) = score_all([], each, learner, settings, events, tests)
            metric = metric_of(tests.of_task(each, settings.data, settings.score_rows))
        rows.append(
            {
                "name": each.name,
                "metric": score.metric if score else metric,
                "score": score.value if score else None,
                "loss": score.loss if score else None,
                "rows": score.rows if score else 0,
            }
        )
    values = [row["score"] for row in rows if row["score"] is not None]
    return {"tasks": rows, "average_accuracy": sum(values) / len(values) if values else None}


def metric_of_task(task: Task, base: Path, template: str) -> str:
    """Return the metric that fits a task's test rows, from a base's tokenizer alone.

    Raises:
        InputError: the tokenizer cannot be read, or rows do not fit.
    """
    tokenizer = load_tokenizer(base)
    return metric_of(TestRows(tokenizer, template).of_task(task, DataConfig()))
