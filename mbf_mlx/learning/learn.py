"""Task after task: start, train, merge, score, commit. No math of its own.

A task is encoded, started from what the method says, trained, merged, scored on the test rows of every task so far with
the deployed adapter, and committed at one instant. Until then the stream stays as it was; what training has done so far
stands in `working/`.
"""

import importlib.metadata
import platform
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from mbf_mlx.base.load import Base, attach, load_base, write_factors
from mbf_mlx.base.sources import unpacked_bytes
from mbf_mlx.config import DataConfig, LearnConfig, LoRAConfig, settings_of
from mbf_mlx.data.encode import Encoded, Encoder
from mbf_mlx.data.task import Task, find_again
from mbf_mlx.data.token_rows import EncodedRows
from mbf_mlx.device import backend
from mbf_mlx.engine.engine import Engine, prepare
from mbf_mlx.errors import InputError
from mbf_mlx.learning.after_training import conclude, with_extra
from mbf_mlx.learning.evaluate import Score, metric_of, score
from mbf_mlx.learning.events import Events
from mbf_mlx.learning.team import Team
from mbf_mlx.learning.team_task import task_message
from mbf_mlx.learning.train import Progress, Trained, progress_to_json, train
from mbf_mlx.learning.tuning import Tuning
from mbf_mlx.memory.limit import limit_of
from mbf_mlx.methods import Layers, Method, State, not_finite
from mbf_mlx.stream.folder import StreamFolder
from mbf_mlx.stream.records import SCORE_DIGITS, TaskRecord
from mbf_mlx.stream.saves import Working, check_same_run


@dataclass(frozen=True)
class Learner:
    """A base model with factors attached, ready to learn into a stream and to be scored."""

    base: Base
    layers: Layers
    engine: Engine
    lora: LoRAConfig
    packed: bool  # quantized weights stay packed

    @property
    def tokenizer(self) -> Any:
        """The base's, as mlx-lm wraps it."""
        return self.base.tokenizer

    def described(self) -> dict[str, Any]:
        """Return what another process needs to hold the same."""
        base = {"path": str(self.base.path), "fingerprint": self.base.fingerprint}
        return base | {"lora": asdict(self.lora), "packed": self.packed}

    def bound(self, settings: LearnConfig) -> None:
        """Let the engine keep to the settings' memory: what it computes again, and where it stops."""
        checkpoint, by_hand = settings.train.grad_checkpoint, self.engine.by_hand
        limit = limit_of(self.base.path, self.lora, by_hand, self.packed, checkpoint, settings.memory_limit)
        self.engine.checkpoint = checkpoint
        self.engine.before = limit or (lambda batch, training: None)


def load_learner(folder: Path, lora: LoRAConfig, keep_quantized: bool = False) -> Learner:
    """Load a base model in the form that trains fastest on this device, with factors attached.

    Args:
        folder: The base's, as `sources.resolve_base` gives it.
        lora: Which layers get factors.
        keep_quantized: Keep quantized weights packed on a CPU, too.
    """
    device = backend.setup()
    packed = keep_quantized or backend.keep_quantized(unpacked_bytes(folder))
    base = load_base(folder, dequantize=not packed, dtype=device.dtype)
    layers = attach(base.model, lora)
    return Learner(base, layers, prepare(base.model), lora, packed)


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
        found = find_again(record)
        if isinstance(found, str):
            return found
        try:
            return self.of_task(found, data, count)
        except InputError as error:  # the base's tokenizer or template is another one now
            return str(error)


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
    state = conclude(method, state, tuning, learner.engine, rows, settings.train.batch_size, advance)
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


def machine(team: Team | None = None) -> dict[str, Any]:
    """Return what a bit-identical continuation depends on beside the run: device, threads, processes, versions."""
    device = backend.setup()
    processes = {"processes": team.size} if team else {}
    return processes | {
        "device": device.kind,
        "processor": platform.machine(),
        "threads": device.threads,
        "dtype": device.dtype or "the model's",
        "mlx": importlib.metadata.version("mlx"),
        "mlx_lm": importlib.metadata.version("mlx-lm"),
    }


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
