"""Runs an experiment's cells one after another, each through the methods' own start, training, finish and scoring.

What is computed once is kept under the hash of all that determines it:
- a training, by the factors that it starts from, its rows and settings, and what the method adds to it. So methods that
  differ only after training share one chain of tuned factors, and nobody has to say which do;
- a score, by the deployed factors and the test rows;
- a cell, as one line of results.

A killed run goes on, and several processes may run one experiment: finished cells and trainings are not run again, and
a training continues from its last save.
"""

import json
import time
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from itertools import groupby
from pathlib import Path

import numpy as np
from filelock import FileLock, Timeout

from mbf_mlx import __version__
from mbf_mlx.adapters import mlx_lm as adapter
from mbf_mlx.base import folder as outline
from mbf_mlx.base.sources import resolve_base
from mbf_mlx.config import LoRAConfig, settings_of
from mbf_mlx.data.encode import Encoded, Encoder
from mbf_mlx.device import backend
from mbf_mlx.engine.lora_layers import write_factors
from mbf_mlx.errors import InputError
from mbf_mlx.experiment import hashes as cell_hash
from mbf_mlx.experiment.plan_file import Cell, Plan
from mbf_mlx.experiment.results import RESULTS, Row, measured
from mbf_mlx.files.log import Log
from mbf_mlx.files.safetensors_file import safetensors_bytes
from mbf_mlx.files.storage import Data, Files
from mbf_mlx.learning.after_training import conclude, with_extra
from mbf_mlx.learning.evaluate import metric_of, score
from mbf_mlx.learning.events import Events
from mbf_mlx.learning.learner import Learner, load_learner, machine
from mbf_mlx.learning.progress import Progress, progress_to_json
from mbf_mlx.learning.train import train
from mbf_mlx.learning.tuning import Tuning
from mbf_mlx.methods import Factors, Method, Pair, State, empty_state, make, not_finite
from mbf_mlx.stream.saves import Working

FORMAT = 1  # of what is hashed; a change in what a cell computes has to change it
UNSCORED: Row = {"value": None, "loss": None}
POLL = 1.0  # seconds between two looks at cells that another process is at
DRAW = 0  # which rows of a task stand for it, where a number is given, is drawn from this: the same for all cells


class Watch(Events):
    """What a caller may want to show of a run, beside what learning tells."""

    def cell(self, number: int, cell: Cell, task: int) -> None:
        """Training on task `task` (from 0) of cell `number` (from 0, of those that are to be run) begins."""


class Experiment:
    """A checked plan, and the folder that holds what was computed of it."""

    def __init__(self, plan: Plan, folder: Path, watch: Watch) -> None:
        self.plan, self.folder, self.watch = plan, folder, watch
        self.files = Files()
        self.files.make_folder(folder / "cache")
        self.results = Log(folder / RESULTS)
        self._scores = Log(folder / "cache" / "scores.jsonl")
        self._known_scores = {row["key"]: row for row in self._scores.read() if "key" in row}
        self._source = resolve_base(plan.file.base)
        self._learners: dict[LoRAConfig, Learner] = {}
        self._encoded: dict[tuple[str, str, str], Sequence[Encoded]] = {}
        from mbf_mlx.base.fingerprint import fingerprint

        backend.setup()
        # The processor and its threads move last bits alone: every row notes them, and a run may go on elsewhere.
        same = {key: value for key, value in machine().items() if key not in ("processor", "threads")}
        self._always = {"format": FORMAT, "mbf_mlx": __version__, "base": fingerprint(self._source.path)} | same
        self._check()

    def _check(self) -> None:
        """Refuse, before anything runs, layers that the base does not have and methods that do not fit them.

        Raises:
            InputError: all that does not fit.
        """
        problems: list[str] = []
        different = {(cell.label, repr(cell.lora)): cell for cell in self.plan.cells}
        for cell in different.values():
            try:
                layers, _ = outline.chosen_layers(self._source.path, cell.lora.keys, cell.lora.num_layers)
                make(cell.method, cell.options).start(empty_state(layers, cell.lora.rank, cell.seed))
            except InputError as error:
                said = f"{cell.label}: {error}"
                problems += [said] if said not in problems else []
        if problems:
            raise InputError("\n".join(problems))

    def rows(self) -> list[Row]:
        """Return the results of the plan's cells that are finished, in the plan's order."""
        found = {row["hash"]: row for row in self.results.read() if "hash" in row}
        keys = [(cell, self.key(cell)) for cell in self.plan.cells]
        named = {"label": "label", "setting": "setting", "order": "order"}
        # The same cell under another name is the same cell.
        return [found[k] | {name: getattr(cell, name) for name in named} for cell, k in keys if k in found]

    def missing(self) -> list[Cell]:
        """Return the cells that are not finished."""
        return [cell for _, cell in self._unfinished(list(enumerate(self.plan.cells)))]

    def run(self) -> list[Row]:
        """Run what is missing and return the results of all cells.

        Processes with one folder share the work: each has the cells of one setting, order and seed for itself, because
        these share trainings.

        Raises:
            InputError: rows that do not fit the model, a training whose numbers go wrong; what was finished stays.
        """
        todo = list(enumerate(self.missing()))
        together = [(key, list(group)) for key, group in groupby(todo, lambda each: _sharing(each[1]))]
        for wait in (False, True):  # at last, for what others have begun: they may stop before its end
            for key, group in together:
                self._share(self.folder / "cache" / f"{key}.lock", group, wait)
        return self.rows()

    def _share(self, lock: Path, group: Sequence[tuple[int, Cell]], wait: bool) -> None:
        """Run those of some cells that nobody has finished; where another process is at them now, `wait` or do not."""
        while self._unfinished(group):
            try:
                with FileLock(lock, timeout=POLL if wait else 0):
                    while todo := self._unfinished(group):  # anew each time: a cell may stand there under two names
                        self.results.add(self._run(*todo[0]))
            except Timeout:
                if not wait:
                    return

    def _unfinished(self, cells: Sequence[tuple[int, Cell]]) -> list[tuple[int, Cell]]:
        """Return those of some numbered cells that nobody has finished."""
        done = {row.get("hash") for row in self.results.read()}
        return [(number, cell) for number, cell in cells if self.key(cell) not in done]

    def key(self, cell: Cell) -> str:
        """Return the hash of all that determines a cell's result."""
        file = self.plan.file
        return cell_hash.digest(
            self._always,
            {"method": cell.method, "options": cell.options, "seed": cell.seed},
            *([{"only_last": True}] if cell.only_last else []),
            cell_hash.settings_of_cell(cell),
            [(name, self.plan.tasks[name].sha256) for name in cell.tasks],
            [file.train_rows, file.valid_rows, file.test_rows, file.score_on, file.metric, file.forward_transfer],
        )

    def _run(self, number: int, cell: Cell) -> Row:
        begun, method, learner = time.perf_counter(), make(cell.method, cell.options), self._learner(cell.lora)
        state = empty_state(learner.layers, cell.lora.rank, cell.seed)
        ahead = self.plan.file.forward_transfer
        before = [self._score(cell, learner, {}, name) for name in cell.tasks] if ahead else []
        trainings: list[Row] = []
        scores: list[list[Row]] = []
        kept = []
        for t, name in enumerate(cell.tasks):
            skipped = t not in cell.trained
            if not skipped:
                self.watch.cell(number, cell, t)
            state, training = (self._keep if skipped else self._learn)(cell, learner, method, state, name)
            trainings.append(training)
            kept.append(state.kept_bytes())
            if skipped:
                scores.append([UNSCORED] * (t + 1))
                continue
            seen = cell.tasks[: t + 2] if ahead else cell.tasks[: t + 1]
            scores.append([self._score(cell, learner, state.deployed, other) for other in seen])
        values = [[each["value"] for each in row] for row in scores]
        base = [each["value"] for each in before]
        return {
            "hash": self.key(cell),
            "label": cell.label,
            "method": cell.method,
            "options": cell.options,
            "grows": method.grows,
            "setting": cell.setting,
            "order": cell.order,
            "tasks": list(cell.tasks),
            "seed": cell.seed,
            **measured(values, base or None),
            "scores": values,
            "losses": [[each["loss"] for each in row] for row in scores],
            "before": base,
            "metrics": [each["metric"] for each in scores[-1][: len(cell.tasks)]],
            "kept_bytes": kept,
            "train_seconds": [training["seconds"] for training in trainings],
            "steps": [training["steps"] for training in trainings],
            "train_tokens": [training["tokens"] for training in trainings],
            "curves": [training["curve"] for training in trainings],
            "peak_memory_bytes": max(training["peak_memory_bytes"] for training in trainings),
            "trainings": [training["key"] for training in trainings],
            "seconds": round(time.perf_counter() - begun, 3),
            "settings": cell_hash.settings_of_cell(cell),
            "rows": {name: getattr(self.plan.file, f"{name}_rows") for name in ("train", "valid", "test")},
            "scored_on": self.plan.file.score_on,
            "task_hashes": [self.plan.tasks[name].sha256 for name in cell.tasks],
            "base": {"name": self._source.name, "fingerprint": self._always["base"]},
            "machine": machine(),
        }

    def _learner(self, lora: LoRAConfig) -> Learner:
        lora = replace(lora, rank=LoRAConfig().rank)  # factors of any rank are written into the model
        if lora not in self._learners:
            self._learners.clear()  # one model in memory at a time
            self._learners[lora] = load_learner(self._source.path, lora)
        return self._learners[lora]

    def _learn(self, cell: Cell, learner: Learner, method: Method, state: State, name: str) -> tuple[State, Row]:
        """Return the state after one more task, and what is known of its training."""
        rows = self._rows(cell, learner, name, "train", self.plan.file.train_rows)
        valid_rows = self.plan.file.valid_rows
        valid = self._rows(cell, learner, name, "valid", valid_rows) if valid_rows else []
        everything = with_extra(method, state, rows)
        tuning = Tuning(learner.base.model, method, state)
        key = cell_hash.of_training(self._always, cell, method, state, tuning, everything, valid)
        place = self.folder / "cache" / f"{key}.safetensors"
        known = place.with_suffix(".json")
        if known.exists() and place.exists():
            tuning.update(adapter.read_tensors(place))
            training = json.loads(known.read_bytes())
        else:
            training = self._train(cell, learner, tuning, everything, valid, key, name)
            self._replace(place, safetensors_bytes({n: np.array(a) for n, a in tuning.arrays.items()}))
            self._replace(known, json.dumps(training).encode())
        advance = partial(self.watch.measuring, name)
        after = conclude(method, state, tuning, learner.engine, rows, cell.train.batch_size, advance)
        if bad := not_finite(after):
            raise InputError(f"{cell.label}, {cell.order}, {name}: the merged factors of {bad[0]} are not finite")
        return after, training

    def _keep(self, cell: Cell, learner: Learner, method: Method, state: State, name: str) -> tuple[State, Row]:
        """Return the state after a task that was not trained on, which a later training will see the rows of."""
        rows = self._rows(cell, learner, name, "train", self.plan.file.train_rows)
        tuning = Tuning(learner.base.model, method, state)
        nothing = {"key": "", "seconds": 0.0, "steps": 0, "tokens": 0, "curve": [], "peak_memory_bytes": 0}
        return conclude(method, state, tuning, learner.engine, rows, cell.train.batch_size), nothing

    def _train(
        self,
        cell: Cell,
        learner: Learner,
        tuning: Tuning,
        rows: Sequence[Encoded],
        valid: Sequence[Encoded],
        key: str,
        name: str,
    ) -> Row:
        working = Working(self.folder / "cache" / f"{key}.working", self.files)
        saved, run = working.load(), {"key": key}
        backend.reset_peak_memory()
        trained = train(
            tuning,
            learner.engine,
            rows,
            valid,
            cell.train,
            report=lambda step: self.watch.step(name, step, backend.peak_memory()),
            save=lambda progress, tensors: working.save(
                progress.step, run, machine(), progress_to_json(progress), tensors
            ),
            resume=(Progress(**saved.progress), saved.tensors) if saved else None,
            guard=False,  # a rival that explodes is a result
        )
        working.drop()
        progress = trained.progress
        return {
            "key": key,
            "seconds": round(progress.seconds, 3),
            "steps": progress.step,
            "tokens": progress.real_tokens,
            "loss_before": progress.loss_before,
            "loss_after": trained.loss_after,
            "curve": trained.curve,
            "peak_memory_bytes": backend.peak_memory(),
        }

    def _score(self, cell: Cell, learner: Learner, deployed: Factors, name: str) -> Row:
        """Return metric, value and loss of a model on a task; the base's own without factors."""
        split, limit = self.plan.file.score_on, self.plan.file.test_rows
        rows = self._rows(cell, learner, name, split, limit)
        asked = self.plan.file.metric or "auto"
        metric = metric_of(rows) if asked == "auto" else asked
        lora = {"scale": cell.lora.scale} if deployed else {}
        pairs = {layer: pair._asdict() for layer, pair in deployed.items()}
        key = cell_hash.digest(self._always, lora, cell_hash.of_rows(rows), metric, pairs)
        if key not in self._known_scores:
            write_factors(learner.base.model, deployed or _nothing(learner))
            learner.base.model.eval()
            found = score(learner.engine, rows, metric, model=learner.base.model, tokenizer=learner.tokenizer)
            self._known_scores[key] = {"key": key, "metric": metric, "value": found.value, "loss": found.loss}
            self._scores.add(self._known_scores[key])
        return self._known_scores[key]

    def _rows(self, cell: Cell, learner: Learner, name: str, split: str, limit: int) -> Sequence[Encoded]:
        """Return encoded rows of a task's split, as many as asked for, drawn once for all cells."""
        # Only answers are scored, even where training supervises prompts.
        data = replace(cell.data, mask_prompt=True) if split == self.plan.file.score_on else cell.data
        place = (name, split, json.dumps(settings_of(data)))
        if place not in self._encoded:
            task = self.plan.tasks[name]
            rows = getattr(task, split)
            if limit and limit < len(rows):
                chosen = np.random.default_rng(DRAW).permutation(len(rows))[:limit]
                rows = [rows[int(i)] for i in sorted(chosen)]
            self._encoded[place] = Encoder(learner.tokenizer, data).all(rows, task.path)
        return self._encoded[place]

    def _replace(self, path: Path, data: Data) -> None:
        building = path.with_name(f"{path.name}.new")
        self.files.remove(building)
        self.files.write(building, data)
        self.files.rename(building, path)


def _sharing(cell: Cell) -> str:
    """Return what is the same for cells that may share a training."""
    return cell_hash.digest(cell_hash.settings_of_cell(cell), list(cell.tasks), cell.seed)


def _nothing(learner: Learner) -> Factors:
    """Return factors that add nothing."""
    return {
        name: Pair(np.zeros((1, inner), np.float32), np.zeros((out, 1), np.float32))
        for name, (out, inner) in learner.layers.items()
    }
