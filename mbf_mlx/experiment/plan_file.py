"""An experiment's file: methods x orders x seeds x settings, checked whole before anything runs.

    base = "smollm2-135m-instruct"
    tasks = "tasks"                      # the folder that the names in an order stand in; from this file's folder
    seeds = [0, 1, 2]
    train_rows = 320                     # of each task, drawn once for all cells; 0 is all
    [orders]
    first = ["mail", "notes", "diary"]
    [train]                              # and [lora], [data]: as the flags of mbf learn
    epochs = 1
    [[methods]]
    method = "products"
    options = {exponent = 0.7}
    [settings.slow]                      # every method also with these in place of the ones above
    train = {learning_rate = 1e-4}

`preset` names a published suite (suites.py), which gives orders, files, prompts and training; what the file says wins.
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

Settings = TypeVar("Settings", LoRAConfig, TrainConfig, DataConfig)


class _Part(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class MethodEntry(_Part):
    """One line of the comparison."""

    method: str
    label: str = ""  # what the table calls it; by default the method and its options
    options: dict[str, Any] = Field(default_factory=dict)
    orders: list[str] | None = None  # those it is run on, of the file's; all by default
    settings: list[str] | None = None
    seeds: list[int] | None = None
    only_last: bool = False  # train and score after the last task alone, where the trainings before it decide nothing


class Variant(_Part):
    """Settings in place of the file's own."""

    lora: dict[str, Any] = Field(default_factory=dict)
    train: dict[str, Any] = Field(default_factory=dict)
    data: dict[str, Any] = Field(default_factory=dict)


class ExperimentFile(_Part):
    """What stands in the file."""

    base: str
    preset: str | None = None
    tasks: str = "."
    paths: dict[str, str] = Field(default_factory=dict)  # a task's name -> its file or folder below `tasks`
    orders: dict[str, list[str]] = Field(default_factory=dict)
    methods: list[MethodEntry] = Field(min_length=1)
    seeds: list[int] = Field(default=[0], min_length=1)
    train_rows: int = Field(default=0, ge=0)
    valid_rows: int = Field(default=0, ge=0)  # to choose the best step by; 0 is none
    test_rows: int = Field(default=0, ge=0)
    score_on: Literal["test", "valid"] = "test"  # "valid" to choose settings without looking at test rows
    metric: Literal["auto", "exact_match", "rouge_l", "loss"] | None = None
    forward_transfer: bool = True  # score the base model, and each task just before it is learned
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
    setting: str  # "" where the file has one setting alone
    order: str
    tasks: tuple[str, ...]
    seed: int
    lora: LoRAConfig
    train: TrainConfig
    data: DataConfig
    only_last: bool = False

    @property
    def name(self) -> str:
        """What a table calls the method with its setting."""
        return name_of(self.label, self.setting)

    @property
    def called(self) -> tuple[str, str, str, int]:
        """What tells it from the file's other cells."""
        return self.label, self.setting, self.order, self.seed

    @property
    def trained(self) -> range:
        """The tasks, from 0, after whose rows the method trains."""
        return range(len(self.tasks) - 1 if self.only_last else 0, len(self.tasks))


@dataclass(frozen=True, kw_only=True)
class Plan:
    """A checked experiment: every task read, every method made."""

    name: str
    file: ExperimentFile
    tasks: dict[str, Task]  # empty where they were not to be read
    cells: tuple[Cell, ...]  # those that can share a training stand together


def read_plan(path: Path, tasks: Path | None = None, *, with_tasks: bool = True) -> Plan:
    """Return what an experiment's file asks for.

    Args:
        path: The TOML file.
        tasks: The folder of the tasks, in place of the file's own.
        with_tasks: Read them, too; without them a plan can be shown, not run.

    Raises:
        InputError: with everything that does not fit: unknown keys, tasks that are missing or wrong, settings that
            cannot be, methods and presets that do not exist.
    """
    file, suite = _read(path)
    orders: dict[str, tuple[str, ...]] = {**suite.orders, **{n: tuple(o) for n, o in file.orders.items()}}
    wanted = {name for entry in file.methods for name in entry.orders or orders}
    problems = _name_problems(file, orders)
    settings: dict[str, tuple[LoRAConfig, TrainConfig, DataConfig]] = {}
    for setting, variant in (file.settings or {"": Variant()}).items():
        try:
            settings[setting] = (
                _settings(LoRAConfig, "lora", {}, file.lora, variant.lora),
                _settings(TrainConfig, "train", suite.train, file.train, variant.train),
                _settings(DataConfig, "data", suite.data, file.data, variant.data),
            )
        except InputError as error:
            if str(error) not in problems:
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
    read = _read_tasks(names, {**suite.paths, **file.paths}, root, problems, file.score_on)
    if problems:
        raise InputError("\n".join(f"{path}: {problem}" for problem in problems))
    file = file.model_copy(update={"metric": file.metric or suite.metric})
    cells.sort(key=lambda cell: (cell.setting, cell.order, cell.seed))
    return Plan(name=path.stem, file=file, tasks=read, cells=tuple(cells))


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
    """Return a settings object from dictionaries, later ones first in rank."""
    values: dict[str, Any] = {name.replace("-", "_"): value for layer in layers for name, value in layer.items()}
    known = [each.name for each in fields(kind)]
    if part == "train" and "seed" in values:
        raise InputError("train.seed: unknown setting; seeds stand in `seeds`")
    for name in values:
        if name not in known:
            raise InputError(f"{part}.{name}: unknown setting{_near(name, known)}")
    return kind(**values)


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
        if cell.called in seen:
            twice.add(cell.label)
        seen.add(cell.called)
    return [f"methods: two of them, or two equal seeds, are called {label!r}; give each a label" for label in twice]


def _read_tasks(
    names: Iterable[str], paths: dict[str, str], root: Path, problems: list[str], score_on: str
) -> dict[str, Task]:
    found = {}
    for name in names:
        place = root / paths.get(name, name)
        if not place.exists():
            files = [place.with_name(place.name + suffix) for suffix in (".jsonl", ".csv", ".tsv", ".json")]
            place = next((file for file in files if file.exists()), place)
        try:
            found[name] = read_task(place, name=check_name(name))
            if score_on == "valid" and not found[name].valid:
                problems.append(f"{place}: score_on is 'valid', and this task has no valid rows")
        except InputError as error:
            problems.append(str(error))
    return found
