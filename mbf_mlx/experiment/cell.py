"""Runs one cell: one method with one seed through one order of tasks, each learned the way `mbf learn` learns it.

A cell commits nothing. It takes trainings and scores that other cells have computed from the workbench.
"""

import time
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import date
from functools import partial

from mbf_mlx.base.chat_templates import writes_date
from mbf_mlx.config import LearnConfig
from mbf_mlx.errors import InputError
from mbf_mlx.experiment.hashes import of_cell, settings_of_cell
from mbf_mlx.experiment.plan_file import Cell
from mbf_mlx.experiment.results import CellRow, measured
from mbf_mlx.experiment.workbench import TaskScore, Workbench
from mbf_mlx.learning.after_training import after_training
from mbf_mlx.learning.events import Events
from mbf_mlx.learning.learn import Learned, TaskRows, check_finite, learn_rows, start_task
from mbf_mlx.learning.learner import Learner, precision_of, run_conditions
from mbf_mlx.methods import Method, State, empty_state, make


class Watch(Events):
    """What a caller may want to show of an experiment, besides what learning tells."""

    def cell(self, number: int, cell: Cell, task: int) -> None:
        """Training on task `task` (from 0) of cell `number` (from 0, of those that are to be run) begins."""


class RunningCell:
    """A cell that is being run.

    Args:
        bench: What it shares with other cells.
        number: Its place among the cells that are to be run, from 0.
        cell: The cell.
        watch: Told what happens.
    """

    def __init__(self, bench: Workbench, number: int, cell: Cell, watch: Watch) -> None:
        self.bench, self.number, self.cell, self.watch = bench, number, cell, watch
        self.method: Method = make(cell.method, cell.options)
        self.learner: Learner = bench.learner(cell)
        undated = cell.data.template == "chat" and not cell.data.date
        if undated and writes_date(self.learner.tokenizer.chat_template):
            raise InputError(
                "[data] date: the base's chat template writes a date; expected one that every cell sees, such as"
                f' date = "{date.today().isoformat()}"'
            )
        # A rival whose loss explodes is a result, so nothing guards against it.
        limit = bench.plan.memory_limit
        self.settings = LearnConfig(train=cell.train, data=cell.data, guard=False, memory_limit=limit)

    def run(self) -> CellRow:
        """Run the cell and return its result.

        Raises:
            InputError: rows that do not fit the model, numbers that are not finite, a batch that does not fit.
        """
        try:
            return self._run()
        except InputError as error:
            cell = self.cell
            raise InputError(f"{cell.name}, {cell.order}, seed {cell.seed}: {error}") from error

    def _run(self) -> CellRow:
        began, cell, ahead = time.perf_counter(), self.cell, self.bench.plan.file.forward_transfer
        self.learner.apply_limits(self.settings)
        before: list[TaskScore] = []
        if ahead:
            self.learner.deploy({})
            before = [self.bench.score(cell, self.learner, {}, name, self.watch) for name in cell.tasks]
        state = empty_state(self.learner.layers, cell.lora.rank, cell.seed)
        done: list[_Done] = []
        for t, name in enumerate(cell.tasks):
            if t in cell.trained:
                self.watch.cell(self.number, cell, t)
                learned = self._learn(state, name, cell.tasks[: t + 2 if ahead else t + 1])
                state = learned.state
                done.append(_Done.of(learned))
            else:
                state = self._pass_over(state, name)
                done.append(_Done(scores=[_UNSCORED] * (t + 1), kept_bytes=state.kept_bytes()))
        return self._row(done, before, time.perf_counter() - began)

    def _learn(self, state: State, name: str, scored: Sequence[str]) -> Learned[list[TaskScore]]:
        """Learn a task, and score it and the other tasks in `scored`."""
        cell, bench, learner = self.cell, self.bench, self.learner
        train, valid = bench.training_rows(cell, name), bench.valid_rows(cell, name)
        return learn_rows(
            learner,
            self.method,
            state,
            TaskRows(name=name, train=train, valid=valid, notes=bench.notes[name]),
            self.settings,
            self.watch,
            find_place=partial(bench.place, cell, self.method, state),
            score=lambda after: [bench.score(cell, learner, after.deployed, other, self.watch) for other in scored],
        )

    def _pass_over(self, state: State, name: str) -> State:
        """Return the state after a task that is not trained on; a later training will see its rows."""
        rows, engine = self.bench.training_rows(self.cell, name), self.learner.engine
        tuning = start_task(self.learner, self.method, state, self.settings)
        after = after_training(self.method, state, tuning, engine, rows, self.cell.train.batch_size)
        check_finite(after, name)
        return after

    def _row(self, done: Sequence["_Done"], before: Sequence[TaskScore], seconds: float) -> CellRow:
        cell, plan = self.cell, self.bench.plan
        values = [[score["value"] for score in each.scores] for each in done]
        base = [score["value"] for score in before]
        return {
            "hash": of_cell(self.bench.always, plan, cell),
            "label": cell.label,
            "method": cell.method,
            "options": cell.options,
            "grows": self.method.grows,
            "setting": cell.setting,
            "order": cell.order,
            "tasks": list(cell.tasks),
            "seed": cell.seed,
            **measured(values, base or None),
            "scores": values,
            "losses": [[score["loss"] for score in each.scores] for each in done],
            "before": base,
            "metrics": [score["metric"] for score in done[-1].scores[: len(cell.tasks)]],
            "kept_bytes": [each.kept_bytes for each in done],
            "train_seconds": [round(each.seconds, 3) for each in done],
            "steps": [each.steps for each in done],
            "train_tokens": [each.tokens for each in done],
            "curves": [list(each.curve) for each in done],
            "peak_memory_bytes": max(each.peak_memory_bytes for each in done),
            "trainings": [each.key for each in done],
            "seconds": round(seconds, 3),
            "settings": settings_of_cell(cell),
            "rows": {"train": plan.file.train_rows, "valid": plan.file.valid_rows, "test": plan.file.test_rows},
            "scored_on": plan.file.score_on,
            "task_hashes": [plan.tasks[name].sha256 for name in cell.tasks],
            "base": {"name": self.bench.source.name, "fingerprint": str(self.bench.always["base"])},
            "machine": run_conditions(precision=precision_of(cell.train)),
        }


_UNSCORED: TaskScore = {"metric": "", "value": None, "loss": None}


@dataclass(frozen=True, kw_only=True)
class _Done:
    """What a cell's row says of one task; the defaults are those of a task that was not trained on."""

    scores: Sequence[TaskScore]
    kept_bytes: int
    key: str = ""  # the hash of the training
    seconds: float = 0.0  # of training, measuring and merging
    steps: int = 0
    tokens: int = 0
    curve: Sequence[tuple[int, float]] = ()
    peak_memory_bytes: int = 0

    @classmethod
    def of(cls, learned: Learned[list[TaskScore]]) -> "_Done":
        training = learned.training
        return cls(
            scores=learned.scores,
            kept_bytes=learned.state.kept_bytes(),
            key=learned.place.run["key"],
            seconds=training.seconds + learned.merge_seconds,
            steps=training.steps,
            tokens=training.tokens,
            curve=training.curve,
            peak_memory_bytes=training.peak_memory_bytes,
        )
