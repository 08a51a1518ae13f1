"""What the cells of one experiment share: the loaded model, encoded rows, finished trainings, scores.

Each is computed once and kept under a hash of all that decides it (hashes.py):

- a training, by the factors that it starts from, its rows and settings, and what the method adds to its loss. So
  methods that differ only after training share one chain of tuned factors, and nobody has to say which do;
- a score, by the deployed factors and the test rows.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, fields, replace
from pathlib import Path
from typing import Any, TypedDict

import numpy as np

from mbf_mlx import __version__
from mbf_mlx.adapters import mlx_lm as adapter
from mbf_mlx.base.decisive_files import check_decisive_files, decisive_files
from mbf_mlx.base.fingerprint import fingerprint
from mbf_mlx.base.sources import resolve_base
from mbf_mlx.config import LoRAConfig, settings_of
from mbf_mlx.data.encode import Encoded, Encoder
from mbf_mlx.device import backend
from mbf_mlx.experiment.hashes import digest, of_rows, of_training
from mbf_mlx.experiment.plan_file import Cell, ExperimentPlan
from mbf_mlx.files.documents import read_object
from mbf_mlx.files.log import Log
from mbf_mlx.files.safetensors_file import safetensors_bytes
from mbf_mlx.files.storage import Data, Files, read_large, sha256
from mbf_mlx.learning.evaluate import LOSS, metric_of
from mbf_mlx.learning.events import Events
from mbf_mlx.learning.inputs_in_training import InputsInTraining
from mbf_mlx.learning.learn import TrainingPlace
from mbf_mlx.learning.learner import Learner, LoadLearner, run_conditions
from mbf_mlx.learning.progress import Tensors, Training
from mbf_mlx.learning.scores import answers_alone, score_rows
from mbf_mlx.learning.tuning import Tuning
from mbf_mlx.methods import Factors, Inputs, Method, Seen, State
from mbf_mlx.stream.saves import Working

FORMAT = 1  # of what is hashed; a change in what a cell computes has to change it
_MEASURED = "measured."  # ahead of a layer's name: what training has measured of its inputs
DRAW = 0  # the seed that draws a task's rows where the file limits their number: the same rows for all cells


class TaskScore(TypedDict):
    """A score of one task; None where a task has no rows, or where the metric is the loss."""

    metric: str
    value: float | None
    loss: float | None


class Workbench:
    """What the cells of one experiment share.

    Args:
        plan: The experiment.
        folder: The folder of its results; `cache/` in it keeps trainings and scores.
        load: Loads a base model with factors attached.
    """

    def __init__(self, plan: ExperimentPlan, folder: Path, load: LoadLearner) -> None:
        backend.setup()
        self.plan, self.cache, self._load = plan, folder / "cache", load
        self.files = Files()
        self.files.make_folder(self.cache)
        self.source = resolve_base(plan.file.base)
        # The processor and its threads move last bits alone: every row notes them, and a run may go on elsewhere.
        same = {key: value for key, value in run_conditions().items() if key not in ("processor", "threads")}
        self.always = {"format": FORMAT, "mbf_mlx": __version__, "base": fingerprint(self.source.path)} | same
        self._check_base(folder)
        self._log = Log(self.cache / "scores.jsonl")
        self._scores: dict[str, TaskScore] = {row["key"]: _score_of(row) for row in self._log.read() if _is_whole(row)}
        self._learners: dict[LoRAConfig, Learner] = {}
        self._encoded: dict[tuple[str, str, int, str], Sequence[Encoded]] = {}
        self.notes: dict[str, list[str]] = {}  # task -> what the model's template makes of its training rows

    def _check_base(self, folder: Path) -> None:
        """Write down the base's settings and tokenizer; refuse results that were computed with others.

        A cell's hash holds the fingerprint of the weights alone, so that cells which were run before stay known.
        """
        place, found = self.cache / "base.json", decisive_files(self.source.path)
        try:
            check_decisive_files(self.source.path, read_object(place), folder)
        except FileNotFoundError:
            self.files.replace(place, (json.dumps(found, indent=2) + "\n").encode())

    def learner(self, cell: Cell) -> Learner:
        """Return the model with the cell's layers attached."""
        shared = replace(cell.lora, rank=LoRAConfig.rank)  # factors of any rank are written into the model
        if shared not in self._learners:
            self._learners.clear()  # one model in memory at a time
            self._learners[shared] = self._load(self.source.path, shared, False)
        return replace(self._learners[shared], lora=cell.lora)

    def training_rows(self, cell: Cell, name: str) -> Sequence[Encoded]:
        """Return the token rows of a task that a cell trains on."""
        return self._rows(cell, name, "train", self.plan.file.train_rows)

    def valid_rows(self, cell: Cell, name: str) -> Sequence[Encoded]:
        """Return the token rows that choose the best step; none unless the file asks for some."""
        count = self.plan.file.valid_rows
        return self._rows(cell, name, "valid", count) if count else []

    def test_rows(self, cell: Cell, name: str) -> Sequence[Encoded]:
        """Return the token rows that a task is scored on."""
        file = self.plan.file
        return self._rows(replace(cell, data=answers_alone(cell.data)), name, file.score_on, file.test_rows)

    def _rows(self, cell: Cell, name: str, split: str, limit: int) -> Sequence[Encoded]:
        place = (name, split, limit, json.dumps(settings_of(cell.data)))
        if place not in self._encoded:
            task = self.plan.tasks[name]
            rows = {"train": task.train, "valid": task.valid, "test": task.test}[split]
            if limit and limit < len(rows):
                chosen = np.random.default_rng(DRAW).permutation(len(rows))[:limit]
                rows = [rows[int(i)] for i in sorted(chosen)]
            encoder = Encoder(self.learner(cell).tokenizer, cell.data)
            self._encoded[place] = encoder.all(rows, task.path)
            if split == "train":
                self.notes[name] = encoder.warnings(task)
        return self._encoded[place]

    def score(self, cell: Cell, learner: Learner, deployed: Factors, name: str, events: Events) -> TaskScore:
        """Return the score on a task of the model, which applies `deployed` (nothing: the base model's own score)."""
        rows = self.test_rows(cell, name)
        asked = self.plan.file.metric or "auto"
        metric = metric_of(rows) if asked == "auto" else asked
        if not len(rows):  # reading the task has said that it has none
            return {"metric": LOSS, "value": None, "loss": None}
        lora = {"scale": cell.lora.scale} if deployed else {}
        pairs = {layer: pair._asdict() for layer, pair in deployed.items()}
        key = digest(self.always, lora, of_rows(rows), metric, pairs)
        if key not in self._scores:
            found = score_rows(learner, name, rows, metric, events)
            self._scores[key] = {"metric": metric, "value": found.value, "loss": found.loss}
            row = {"key": key, **self._scores[key]}
            self._log.add(row | {"checksum": digest(row)})
        return self._scores[key]

    def place(
        self,
        cell: Cell,
        method: Method,
        state: State,
        tuning: Tuning,
        rows: Sequence[Encoded],
        valid: Sequence[Encoded],
        measure: InputsInTraining | None,
    ) -> "SharedTraining":
        """Return where a training of a cell is saved, and kept for the other cells."""
        directions = measure.directions if measure else {}
        key = of_training(self.always, cell, method, state, tuning, rows, valid, directions)
        return SharedTraining(key, self.cache, self.files, directions)


def _is_whole(row: dict[str, Any]) -> bool:
    """Return whether a row of the cache is as it was written; those of before have no checksum."""
    rest = {name: value for name, value in row.items() if name != "checksum"}
    return "key" in row and row.get("checksum", digest(rest)) == digest(rest)


def _score_of(row: dict[str, Any]) -> TaskScore:
    return {"metric": row["metric"], "value": row["value"], "loss": row["loss"]}


class SharedTraining(TrainingPlace):
    """A training that is kept under its hash: what it left, its figures, and its saves while it runs.

    Args:
        key: The hash.
        cache: The folder.
        files: The operations to write with.
        directions: P (k, in) for each layer whose inputs are measured in training.
    """

    def __init__(self, key: str, cache: Path, files: Files, directions: Mapping[str, np.ndarray]) -> None:
        self._directions = directions
        working = Working(cache / f"{key}.working", files)
        super().__init__(working, {"key": key}, working.load())
        self.key, self._files = key, files
        self._arrays, self._figures = cache / f"{key}.safetensors", cache / f"{key}.json"

    def finished(self) -> tuple[Training, Tensors, Inputs | None] | None:
        if not (self._figures.exists() and self._arrays.exists()):
            return None
        known: dict[str, Any] = {"best_step": 0, "computed_tokens": 0}  # what was not kept in the beginning
        known |= json.loads(self._figures.read_bytes())
        expected, data = known.get("arrays_sha256"), read_large(self._arrays)
        if expected is not None and (sha256(data) != expected or known.pop("checksum") != digest(known)):
            return None  # a bit has changed on the disk: train again
        training = Training(**{each.name: known[each.name] for each in fields(Training)})
        arrays = adapter.decode_tensors(data, self._arrays)
        moments = {name: arrays.pop(_MEASURED + name) for name in self._directions if _MEASURED + name in arrays}
        inputs = {name: Seen(self._directions[name], array) for name, array in moments.items()}
        return training, arrays, inputs or None

    def keep(self, training: Training, tuning: Tuning, inputs: Inputs | None) -> None:
        arrays = {name: np.array(array) for name, array in tuning.arrays.items()}
        moments = {_MEASURED + name: np.asarray(seen.moments) for name, seen in (inputs or {}).items()}
        data = safetensors_bytes(arrays | moments)
        figures = {"key": self.key, "arrays_sha256": sha256(data), **asdict(training)}
        self._replace(self._arrays, data)
        self._replace(self._figures, json.dumps(figures | {"checksum": digest(figures)}).encode())
        self.working.drop()

    def _replace(self, path: Path, data: Data) -> None:
        building = path.with_name(f"{path.name}.new")
        self._files.remove(building)
        self._files.write(building, data)
        self._files.rename(building, path)
