"""An experiment's file: methods x orders x seeds x settings, checked as a whole before anything runs.

    base = "smollm2-135m-instruct"
    tasks = "tasks"                      # the folder of the tasks that orders name, seen from this file's folder
    seeds = [0, 1, 2]
    train_rows = 320                     # rows of each task, drawn once for all cells; 0 is all
    memory_limit = "6GB"                 # stop before taking more, as mbf learn --memory-limit
    [orders]
    first = ["mail", "notes", "diary"]
    [train]                              # and [lora], [data]: as the flags of mbf learn
    epochs = 1
    [[methods]]
    method = "products"
    options = {exponent = 0.7}
    [settings.slow]                      # every method with these in place of the ones above
    train = {learning_rate = 1e-4}

`preset` names a published suite (suites.py), which gives orders, files, prompts and training; what the file says wins.
A setting that would change nothing is refused.
"""

import difflib
from collections.abc import Iterable
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from mbf_mlx.config import DataConfig, LoRAConfig, TrainConfig
from mbf_mlx.data.task import Task, check_name, read_task
from mbf_mlx.errors import InputError
from mbf_mlx.experiment.results import name_of
from mbf_mlx.experiment.suites import SUITES, Suite
from mbf_mlx.files.documents import toml
from mbf_mlx.methods import make
from mbf_mlx.units import bytes_of

Settings = TypeVar("Settings", LoRAConfig, TrainConfig, DataConfig)


class _Part(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class MethodEntry(_Part):
    """One method of the comparison."""

    method: str
    label: str = ""  # what the table calls the method; by default its name and its options
    options: dict[str, Any] = Field(default_factory=dict)
    orders: list[str] | None = None  # the file's orders that it is run on; by default all
    settings: list[str] | None = None
    seeds: list[int] | None = None
    only_last: bool = False  # train and score once, after the last task: earlier trainings decide nothing there


class Variant(_Part):
    """Settings that take the place of the file's own."""

    lora: dict[str, Any] = Field(default_factory=dict)
    train: dict[str, Any] = Field(default_factory=dict)
    data: dict[str, Any] = Field(default_factory=dict)


class ExperimentFile(_Part):
    """Everything that the file may hold."""

    base: str
    preset: str | None = None
    tasks: str = "."
    paths: dict[str, str] = Field(default_factory=dict)  # a task's name -> its file or folder below `tasks`
    orders: dict[str, list[str]] = Field(default_factory=dict)
    methods: list[MethodEntry] = Field(min_length=1)
    seeds: list[int] = Field(default=[0], min_length=1)
    train_rows: int = Field(default=0, ge=0)
    valid_rows: int = Field(default=0, ge=0)  # rows to choose the best step by; 0 is none
    test_rows: int = Field(default=0, ge=0)
    score_on: Literal["test", "valid"] = "test"  # "valid" to choose settings without looking at test rows
    metric: Literal["auto", "exact_match", "rouge_l", "loss"] | None = None
    forward_transfer: bool = True  # score the base model, and each task just before it is learned
    memory_limit: str = ""  # a size, as mbf learn --memory-limit; "" is four fifths of what is available
    lora: dict[str, Any] = Field(default_factory=dict)
    train: dict[str, Any] = Field(default_factory=dict)
    data: dict[str, Any] = Field(default_factory=dict)
    settings: dict[str, Variant] = Field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class Cell:
    """One run: one method with one seed through one order."""

    label: str
    method: str
    options: dict[str, Any]
    setting: str  # "" where the file has only one
    order: str
    tasks: tuple[str, ...]
    seed: int
    lora: LoRAConfig
    train: TrainConfig
    data: DataConfig
    only_last: bool = False

    @property
    def name(self) -> str:
        """What a table calls the method with its settings."""
        return name_of(self.label, self.setting)

    @property
    def cell_key(self) -> tuple[str, str, str, int]:
        """What tells the cell from the file's other cells."""
        return self.label, self.setting, self.order, self.seed

    @property
    def trained(self) -> range:
        """The places, from 0, of the tasks that the method trains on."""
        return range(len(self.tasks) - 1 if self.only_last else 0, len(self.tasks))


@dataclass(frozen=True, kw_only=True)
class ExperimentPlan:
    """A checked experiment: every task has been read, every method made once."""

    name: str
    file: ExperimentFile
    tasks: dict[str, Task]  # empty where no tasks were to be read
    cells: tuple[Cell, ...]  # cells that can share a training stand together
    memory_limit: int  # bytes; 0 is four fifths of what is available

    @property
    def results_folder(self) -> Path:
        """Where the results go unless the user says otherwise: NAME-results for NAME.toml."""
        return Path(f"{self.name}-results")


def read_plan(path: Path, tasks: Path | None = None, *, with_tasks: bool = True) -> ExperimentPlan:
    """Return what an experiment's file asks for.

    Args:
        path: The TOML file.
        tasks: The folder of the tasks, in place of the one that the file names.
        with_tasks: Read the tasks, too; a plan without them can be shown, not run.

    Raises:
        InputError: names everything that does not fit: unknown keys, missing or wrong tasks, settings that are wrong
            or would change nothing, methods and presets that do not exist.
    """
    file, suite = _read(path)
    orders: dict[str, tuple[str, ...]] = {**suite.orders, **{n: tuple(o) for n, o in file.orders.items()}}
    wanted = {name for entry in file.methods for name in entry.orders or orders}
    problems = _name_problems(file, orders)
    settings: dict[str, tuple[LoRAConfig, TrainConfig, DataConfig]] = {}
    for setting, variant in (file.settings or {"": Variant()}).items():
        problems += [each for each in _without_effect(file, setting, variant) if each not in problems]
        try:
            settings[setting] = (
                _settings(LoRAConfig, "lora", {}, file.lora, variant.lora),
                _settings(TrainConfig, "train", suite.train, file.train, variant.train),
                _settings(DataConfig, "data", suite.data, file.data, variant.data),
            )
        except InputError as error:
            if str(error) not in problems:
                problems.append(str(error))
    memory_limit = 0
    try:
        memory_limit = bytes_of(file.memory_limit, "memory_limit") if file.memory_limit else 0
    except InputError as error:
        problems.append(str(error))
    cells: list[Cell] = []
    for number, entry in enumerate(file.methods):
        try:
            made = make(entry.method, entry.options)
        except InputError as error:
            problems.append(f"methods[{number}]: {error}")
            continue
        if entry.only_last and not made.from_scratch:
            problems.append(
                f"methods[{number}].only_last: expected a method that trains from scratch on all rows after each task"
                f" (joint, with start = 'first'), got {_label(entry)}"
            )
        for setting, (lora, train, data) in settings.items():
            if setting not in (entry.settings or settings):
                continue
            cells += [
                Cell(
                    label=entry.label or _label(entry),
                    method=made.name,
                    options=made.options,
                    setting=setting,
                    order=order,
                    tasks=orders[order],
                    seed=seed,
                    lora=lora,
                    train=replace(train, seed=seed),
                    data=data,
                    only_last=entry.only_last,
                )
                for order in entry.orders or orders
                if order in orders
                for seed in entry.seeds or file.seeds
            ]
    problems += _repeated(cells)
    root = tasks if tasks is not None else path.parent / file.tasks
    names = dict.fromkeys(name for order in orders if order in wanted and with_tasks for name in orders[order])
    read = _read_tasks(names, {**suite.paths, **file.paths}, root, problems, file)
    if problems:
        raise InputError("\n".join(f"{path}: {problem}" for problem in problems))
    file = file.model_copy(update={"metric": file.metric or suite.metric})
    cells.sort(key=lambda cell: (cell.setting, cell.order, cell.seed))
    return ExperimentPlan(name=path.stem, file=file, tasks=read, cells=tuple(cells), memory_limit=memory_limit)


def _read(path: Path) -> tuple[ExperimentFile, Suite]:
    document = toml(path, "docs/experiments.md shows what an experiment's file holds")
    try:
        file = ExperimentFile.model_validate(document)
    except ValidationError as error:
        raise InputError("\n".join(f"{path}: {_said(each)}" for each in error.errors())) from error
    if file.preset is not None and file.preset not in SUITES:
        raise InputError(f"{path}: preset: expected one of {', '.join(SUITES)}, got {file.preset!r}")
    return file, SUITES[file.preset] if file.preset else Suite(paths={}, orders={})


def _said(error: Any) -> str:
    """Return pydantic's error in our words: where, what is wrong, what was probably meant."""
    *above, last = [str(part) for part in error["loc"]] or ["file"]
    if error["type"] == "extra_forbidden":
        kind: type[_Part] = ExperimentFile
        if above:
            kind = MethodEntry if above[0] == "methods" else Variant
        return f"{'.'.join([*above, last])}: unknown setting{_near(last, kind.model_fields)}"
    return f"{'.'.join([*above, last])}: {error['msg'][0].lower()}{error['msg'][1:]}"


def _near(name: str, known: Iterable[str]) -> str:
    near = difflib.get_close_matches(name, list(known), n=1)
    return f"; did you mean {near[0]}?" if near else f"; expected one of {', '.join(known)}"


def _settings(kind: type[Settings], part: str, *layers: dict[str, Any]) -> Settings:
    """Return a settings object from dictionaries; later ones win over earlier ones."""
    values = {name: value for layer in layers for name, value in _plain(layer).items()}
    known = [each.name for each in fields(kind)]
    if part == "train" and "seed" in values:
        raise InputError("train.seed: unknown setting; seeds stand in `seeds`")
    for name in values:
        if name not in known:
            raise InputError(f"{part}.{name}: unknown setting{_near(name, known)}")
    return kind(**values)


def _plain(layer: dict[str, Any]) -> dict[str, Any]:
    """Return settings with the names of their fields: the file may write them as flags are written."""
    return {name.replace("-", "_"): value for name, value in layer.items()}


def _without_effect(file: ExperimentFile, setting: str, variant: Variant) -> list[str]:
    """Return a sentence for each of the file's training settings that would change nothing."""
    own, other = _plain(file.train), _plain(variant.train)
    problems = []
    for name in ("val_every", "patience"):
        if not file.valid_rows and (own | other).get(name):
            problems.append(f"train.{name}: has no effect without valid_rows, which choose the best step")
    if "epochs" in own and "iters" in own:
        problems.append("train.epochs: has no effect beside train.iters, which takes its place")
    elif "epochs" in other and "iters" in own | other:
        problems.append(f"settings.{setting}.train.epochs: has no effect beside train.iters, which takes its place")
    return problems


def _name_problems(file: ExperimentFile, orders: dict[str, tuple[str, ...]]) -> list[str]:
    problems = [] if orders else ["orders: expected at least one order of tasks, or a preset that has them"]
    for name, tasks in orders.items():
        if not tasks:
            problems.append(f"orders.{name}: expected at least one task")
        twice = sorted({task for task in tasks if tasks.count(task) > 1})
        problems += [f"orders.{name}: {task} stands in it twice" for task in twice]
    for number, entry in enumerate(file.methods):
        for what, names, known in (("order", entry.orders, orders), ("setting", entry.settings, file.settings)):
            for name in names or ():
                if name not in known:
                    hint = _near(name, known) if known else f"; the file has no {what}s"
                    problems.append(f"methods[{number}].{what}s: no {what} called {name}{hint}")
    return problems


def _label(entry: MethodEntry) -> str:
    return " ".join([entry.method, *(f"{name}={value}" for name, value in entry.options.items())])


def _repeated(cells: list[Cell]) -> list[str]:
    seen: set[tuple[str, str, str, int]] = set()
    twice = set()
    for cell in cells:
        if cell.cell_key in seen:
            twice.add(cell.label)
        seen.add(cell.cell_key)
    return [f"methods: two of them, or two equal seeds, are called {label!r}; give each a label" for label in twice]


def _read_tasks(
    names: Iterable[str], paths: dict[str, str], root: Path, problems: list[str], file: ExperimentFile
) -> dict[str, Task]:
    """Return the tasks by name; add to `problems` what is wrong with them."""
    found = {}
    for name in names:
        place = root / paths.get(name, name)
        if not place.exists():
            files = [place.with_name(place.name + suffix) for suffix in (".jsonl", ".csv", ".tsv", ".json")]
            place = next((each for each in files if each.exists()), place)
        try:
            found[name] = read_task(place, name=check_name(name))
            if file.score_on == "valid" and not found[name].valid:
                problems.append(f"{place}: score_on is 'valid', and this task has no valid rows")
            elif file.valid_rows and not found[name].valid:
                problems.append(f"{place}: valid_rows is {file.valid_rows}, and this task has no valid rows")
        except InputError as error:
            problems.append(str(error))
    return found
