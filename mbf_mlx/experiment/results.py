"""An experiment's results: one JSON line a cell, and the table that they make.

A line that a killed run left half written is not read, and the next one starts anew behind it. Scores are in [0, 1],
seconds are of training alone. Means over orders are taken seed by seed, then over seeds, with the sample standard
deviation between seeds.
"""

from collections.abc import Hashable, Sequence
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ValidationError

from mbf_mlx import metrics
from mbf_mlx.errors import InputError
from mbf_mlx.files.log import Log

RESULTS = "results.jsonl"
NOTHING = "-"  # in a table
Row = dict[str, Any]

MEASURES = {
    "average_accuracy": "AA",
    "backward_transfer": "BWT",
    "forgetting": "forgetting",
    "forward_transfer": "FWT",
    "learning_accuracy": "LA",
    "newest": "newest",
    "largest_disparity": "MOPD",
    "average_disparity": "AOPD",
}


def read_results(path: Path) -> list[Row]:
    """Return the rows of a results folder or file; of two that are called the same, the newer one.

    Raises:
        InputError: no results there, or a row that is none of ours.
    """
    file = path / RESULTS if path.is_dir() else path
    found = [row for row in Log(file).read() if "hash" in row and "scores" in row]
    if not found:
        raise InputError(f"{path}: expected the results of an experiment ({RESULTS}), got none")
    for row in found:
        _check(row, file)
    return list({called(row): row for row in found}.values())


class _Cell(BaseModel):
    """What a table and a page are made of; a row holds more."""

    label: str
    setting: str
    order: str
    seed: int
    method: str
    options: dict[str, Any]
    grows: bool
    tasks: list[str]
    task_hashes: list[str]
    scores: list[list[float | None]]
    before: list[float | None] = []
    kept_bytes: list[int]
    train_seconds: list[float]
    trainings: list[str]
    steps: list[int]
    curves: list[list[tuple[float, float | None]]]
    base: dict[str, Any]
    settings: dict[str, Any]
    rows: dict[str, Any]
    scored_on: str
    machine: dict[str, Any]


def _check(row: Row, file: Path) -> None:
    try:
        cell = _Cell.model_validate(row)
        tasks = len(cell.tasks)
        lists = (cell.task_hashes, cell.scores, cell.kept_bytes, cell.train_seconds, cell.trainings, cell.steps)
        whole = all(len(found) == tasks for found in (*lists, cell.curves, cell.before or cell.tasks)) and all(
            len(scores) > t for t, scores in enumerate(cell.scores)
        )
        wrong = "" if tasks and whole else f"scores: expected one row for each of {tasks} tasks, as long as its place"
    except ValidationError as error:
        first = error.errors()[0]
        wrong = f"{'.'.join(map(str, first['loc']))}: {first['msg'].lower()}"
    if wrong:
        raise InputError(
            f"{file}: the row with hash {str(row['hash'])[:40]!r} is no cell of an experiment: {wrong}"
            "\nhint: take the line out, and mbf experiment runs its cell again"
        )


def scored(row: Row) -> tuple[str, int]:
    """Return the split that a cell was scored on and how many of its rows, 0 for all: others are no match for it."""
    return row["scored_on"], row["rows"].get("test", 0)


def called(row: Row) -> tuple[Hashable, ...]:
    """Return what tells a cell from all others: label, setting, order, seed, and what it was scored on."""
    return row["label"], row["setting"], row["order"], row["seed"], scored(row)


def name_of(label: str, setting: str) -> str:
    """Return what a table calls a method with a setting."""
    return f"{label} [{setting}]" if setting else label


def named(row: Row) -> str:
    """Return what a table calls a cell's method."""
    return name_of(row["label"], row["setting"])


def measured(
    scores: Sequence[Sequence[float | None]], before: Sequence[float | None] | None
) -> dict[str, float | None]:
    """Return a cell's own measures from its matrix and the base model's scores."""
    square = [list(row[: t + 1]) for t, row in enumerate(scores)]
    learned = metrics.learning_accuracy(square)
    return {
        "average_accuracy": metrics.average_accuracy(square).value,
        "backward_transfer": metrics.backward_transfer(square).value,
        "forgetting": metrics.forgetting(square).value,
        "forward_transfer": metrics.forward_transfer(scores, before).value if before else None,
        "learning_accuracy": None if learned.missing else learned.value,  # none where a method trains but once
        "newest": metrics.newest_score(square),
    }


def measures_of(row: Row) -> dict[str, float | None]:
    """Return a cell's measures, from its scores."""
    return measured(row["scores"], row.get("before") or None)
