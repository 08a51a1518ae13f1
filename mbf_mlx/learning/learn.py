"""The one way to learn a task: start, train, measure and merge, score. For a stream, also the commit.

`learn_rows` is that way. A stream (`learn_task`), a cell of an experiment (experiment/cell.py) and the other processes
of a team (worker.py, its start alone) all go it, with the same settings. They differ in where a training is saved
(`TrainingPlace`) and in what is scored. No math stands here.

A stream stays as it was until the commit. What training has done so far is saved in the stream's `working/`.
"""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from time import perf_counter
from typing import Any, Generic, TypeVar

from mbf_mlx.config import LearnConfig, settings_of
from mbf_mlx.data.encode import Encoded, Encoder
from mbf_mlx.data.task import Task
from mbf_mlx.data.token_rows import EncodedRows
from mbf_mlx.device import backend
from mbf_mlx.errors import InputError
from mbf_mlx.learning.after_training import after_training, with_extra
from mbf_mlx.learning.events import Events
from mbf_mlx.learning.inputs_in_training import InputsInTraining, inputs_in_training
from mbf_mlx.learning.learner import Learner, precision_of, run_conditions
from mbf_mlx.learning.precision import chosen
from mbf_mlx.learning.progress import Progress, Tensors, Training, progress_of, progress_to_json
from mbf_mlx.learning.prompt_date import with_date
from mbf_mlx.learning.record import differences, notes_on, run_of, task_record, what_fell
from mbf_mlx.learning.scores import TestRows, score_all
from mbf_mlx.learning.team import Team
from mbf_mlx.learning.team_task import task_message
from mbf_mlx.learning.train import train
from mbf_mlx.learning.tuning import Tuning
from mbf_mlx.methods import Inputs, Method, State, make, not_finite
from mbf_mlx.stream.folder import StreamFolder
from mbf_mlx.stream.records import TaskRecord, spans_to_score, without_task
from mbf_mlx.stream.saves import Saved, Working, check_same_run
from mbf_mlx.stream.task_scores import digest

Scores = TypeVar("Scores")


class TrainingPlace:
    """Where a training is saved while it runs. A subclass may also know trainings that are finished.

    Args:
        working: The folder of the saves.
        run: All that decides the training's result, as plain JSON values.
        saved: The save to go on from.
    """

    def __init__(self, working: Working, run: dict[str, Any], saved: Saved | None = None) -> None:
        self.working, self.run, self.saved = working, run, saved

    def resume(self) -> tuple[Progress, Tensors] | None:
        """Return where the saved run stands, and its arrays; None where none is saved.

        Raises:
            InputError: the save does not hold what a run needs to go on.
        """
        if self.saved is None:
            return None
        return progress_of(self.saved.progress, self.working.folder), self.saved.tensors

    def finished(self) -> tuple[Training, Tensors, Inputs | None] | None:
        """Return a training that has been done before, or None.

        Returns:
            Its figures, the arrays that it left, and the layers' inputs if it has measured them.
        """
        return None

    def keep(self, training: Training, tuning: Tuning, inputs: Inputs | None) -> None:
        """Called when a training has just ended; `tuning` holds its result, `inputs` what it has measured."""


# From what trains, the training rows, the validation rows, and what is measured in training.
FindPlace = Callable[[Tuning, Sequence[Encoded], Sequence[Encoded], InputsInTraining | None], TrainingPlace]


@dataclass(frozen=True, kw_only=True)
class TaskRows:
    """The token rows that a task is learned from."""

    name: str  # what messages call the task
    train: Sequence[Encoded]
    valid: Sequence[Encoded]  # to choose the best step by; may be empty
    notes: Sequence[str] = ()  # what the user should know about them


@dataclass(frozen=True, kw_only=True)
class Learned(Generic[Scores]):
    """A task that has been learned, and not committed."""

    state: State
    training: Training
    place: TrainingPlace  # where the training was saved, or found
    merge_seconds: float  # seconds of measuring and merging, after the training
    scores: Scores


def start_task(learner: Learner, method: Method, state: State, settings: LearnConfig) -> Tuning:
    """Return what trains on the next task; from now on the engine keeps to the settings' memory."""
    learner.apply_limits(settings)
    return Tuning(learner.base.model, method, state)


def learn_rows(
    learner: Learner,
    method: Method,
    state: State,
    rows: TaskRows,
    settings: LearnConfig,
    events: Events,
    find_place: FindPlace,
    score: Callable[[State], Scores],
    team: Team | None = None,
) -> Learned[Scores]:
    """Learn one task: start, train, measure and merge, score.

    Args:
        learner: The base model with factors attached.
        method, state: The method, and the state after the task before.
        rows: The task's rows.
        settings: How it is learned: training, memory limit, guard.
        events: Told what happens.
        find_place: Returns where this training is saved, or where it was finished before.
        score: Scores the model, which then applies the merged factors of the state that it is given.
        team: The processes that share each step's rows.

    Raises:
        InputError: numbers that are not finite, a loss that exploded.
        MemoryLimitError: a batch would not fit; what was done until then is saved.
    """
    events.task(rows.name, state.t + 1, len(rows.train), rows.notes)
    everything = with_extra(method, state, rows.train)
    if extra := len(everything) - len(rows.train):
        events.note(f"{rows.name}: trains on {extra} kept rows of earlier tasks, too")
    backend.reset_peak_memory()
    tuning = start_task(learner, method, state, settings)
    measure = None
    if len(everything) == len(rows.train) and not len(rows.valid):  # or another step's factors may be kept
        config, start = settings.train, tuning.named()
        measure = inputs_in_training(method, state, start, learner.engine, config, len(everything), team)
    place = find_place(tuning, everything, rows.valid, measure)
    if (finished := place.finished()) is not None:
        training, arrays, inputs = finished
        tuning.update(arrays)
    else:
        if team is not None:
            team.say(task_message(learner.described(), method, state, everything, settings))
        training, inputs = _train(learner, tuning, everything, rows, settings, events, place, team, measure)
        place.keep(training, tuning, inputs)
    began = perf_counter()
    advance = partial(events.measuring, rows.name)
    after = after_training(
        method, state, tuning, learner.engine, rows.train, settings.train.batch_size, advance, inputs
    )
    merge_seconds = perf_counter() - began
    check_finite(after, rows.name)
    training = replace(training, peak_memory_bytes=max(training.peak_memory_bytes, backend.peak_memory()))
    events.merged(rows.name, after)
    learner.deploy(after.deployed)
    return Learned(state=after, training=training, place=place, merge_seconds=merge_seconds, scores=score(after))


def _train(
    learner: Learner,
    tuning: Tuning,
    everything: Sequence[Encoded],
    rows: TaskRows,
    settings: LearnConfig,
    events: Events,
    place: TrainingPlace,
    team: Team | None,
    measure: InputsInTraining | None,
) -> tuple[Training, Inputs | None]:
    """Train, saving as the settings say; go on from the place's save where there is one.

    Returns:
        The figures, and the layers' inputs if they were measured.
    """

    def save(progress: Progress, tensors: Tensors) -> None:
        conditions = run_conditions(team, precision_of(settings.train))
        place.working.save(progress.step, place.run, conditions, progress_to_json(progress), tensors)

    trained = train(
        tuning,
        learner.engine,
        everything,
        rows.valid,
        settings.train,
        report=lambda step: events.step(rows.name, step, backend.peak_memory()),
        save=save,
        resume=place.resume(),
        guard=settings.guard,
        team=team,
        throttle=settings.throttle,
        measure=measure,
    )
    return Training.of(trained, backend.peak_memory()), trained.inputs


def check_finite(state: State, name: str) -> None:
    """Raise InputError where a merged factor is not finite; `name` says of which task."""
    if bad := not_finite(state):
        raise InputError(
            f"{name}: the merged factors of {bad[0]} are not finite; what was learned before is as it was"
            "\nhint: try a smaller learning rate"
        )


# ---- into a stream


def learn_all(
    stream: StreamFolder,
    load: Callable[[], Learner],
    tasks: Sequence[Task],
    settings: LearnConfig,
    events: Events,
    team: Team | None = None,
) -> list[TaskRecord]:
    """Learn tasks in order into a stream; each is committed before the next one starts.

    Args:
        stream: The stream.
        load: Returns its base model with factors attached; called only if there is a task to learn.
        tasks: Tasks that have been read.
        settings: How they are learned; the template is the stream's.
        events: Told what happens.
        team: The processes that share each step's rows.

    Returns:
        The records of the tasks that were learned now; a task that the stream has already is skipped.

    Raises:
        InputError: something of the user's does not fit; the stream keeps what was committed before.
    """
    todo = [task for task in tasks if not _skip(stream, task, settings, events)]
    if not todo:
        stream.tidy()  # a run killed just after its last commit is over with this
        return []
    records = []
    with stream.writer():
        learner = load()
        method = make(stream.identity.method, stream.identity.method_options)
        settings = with_date(stream, learner.tokenizer, settings, events.note)
        tests = TestRows(learner.tokenizer, settings.data.template, stream.path, stream.path, date=settings.data.date)
        for number, task in enumerate(todo):
            if _skip(stream, task, settings, events):
                continue  # another process has learned it meanwhile, or it is named twice
            chosen = replace(settings, restart=settings.restart and number == 0)
            records.append(learn_task(stream, learner, method, task, chosen, events, tests, team))
    return records


def _skip(stream: StreamFolder, task: Task, settings: LearnConfig, events: Events) -> bool:
    if settings.again or not already_learned(stream, task):
        return False
    events.note(f"{task.name}: learned already, skipped (--again learns it once more)")
    return True


def already_learned(stream: StreamFolder, task: Task) -> bool:
    """Return whether the stream has learned this task.

    Raises:
        InputError: it has learned another task with this name.
    """
    contents = stream.task_scores().contents_of(task.name)
    if not contents:
        return False
    if digest(task.sha256) in contents:
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
    """Learn one task into the stream and commit it. The caller holds the stream's writer lock.

    Raises:
        InputError: rows that do not fit, an interrupted run of something else, numbers that went wrong; the stream
            is as it was.
    """
    began = time.monotonic()
    stream.require_space()
    generation = stream.current()
    (working := stream.saves).check_place()
    restarted = settings.restart and working.drop()
    saved = working.load()
    begun = saved.run.get("precision", "float32") if saved else None  # float32 is not written down
    precision = chosen(settings.train, learner, team, begun)
    settings = replace(settings, train=replace(settings.train, precision=precision))
    run, conditions = run_of(task, generation.number, settings), run_conditions(team, precision)
    if saved is not None:
        check_same_run(saved, run, stream.working)
    encoder = Encoder(learner.tokenizer, settings.data, stream.path)
    rows, valid, test = _encoded(task, encoder, tests, settings)
    notes = [*encoder.warnings(task), *notes_on(task, rows, settings, learner.context)]
    if settings.restart and not restarted:
        notes.append("--restart without effect: no run was interrupted")
    if saved is not None:
        notes += [f"goes on after step {saved.progress['step']}", *differences(saved.machine, conditions)]
    elif working.problems():
        notes.append("the save of an interrupted run is damaged: the task starts over")
    state = stream.state()
    spans = spans_to_score(state.t + 1, settings.score_tasks)
    earlier, before = stream.tasks(without_task(spans, state.t + 1)), stream.task_scores()
    learned = learn_rows(
        learner,
        method,
        state,
        TaskRows(name=task.name, train=rows, valid=valid, notes=notes),
        settings,
        events,
        find_place=lambda *_: TrainingPlace(working, run, saved),
        score=lambda _: score_all(earlier, task, learner, settings, events, tests),
        team=team,
    )
    record = task_record(
        task,
        learned.state.t,
        learned.training,
        rows,
        valid,
        test,
        settings,
        spans,
        learned.scores,
        conditions,
    )
    fell = what_fell([(record.name, before.newest(record.t)) for record in earlier], learned.scores, stream.path)
    fixed = {"train": settings_of(settings.train), "data": settings_of(settings.data)}
    stream.commit(generation, learned.state, record, str(learner.base.path), fixed)
    working.drop()
    events.learned(record, time.monotonic() - began)
    if fell:
        events.note(fell)
    return record


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
