"""An experiment's results: one JSON line for each cell, in `results.jsonl`.

A half-written line of a killed run is not read; the next line starts behind it. Scores are in [0, 1]. Seconds of a task
are those of training, measuring and merging. Means over orders are taken seed by seed, then over seeds, with the sample
standard deviation between seeds.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NotRequired, TypedDict, cast, get_type_hints

from pydantic import ValidationError, create_model

from mbf_mlx import metrics
from mbf_mlx.errors import InputError
from mbf_mlx.files.log import Log

RESULTS = "results.jsonl"
NOTHING = "-"  # in a table

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


class CellRow(TypedDict):
    """The result of one cell: one method with one seed through one order of T tasks.

    Lists of T items follow the order of `tasks`. Scores are in [0, 1], losses in nats.
    """

    hash: str  # of all that determines the result
    label: str  # what tables call the method
    setting: str  # the name of its settings; "" where the file has one alone
    order: str
    seed: int
    method: str
    options: dict[str, Any]
    grows: bool  # what the method keeps grows with the number of tasks
    tasks: list[str]
    task_hashes: list[str]
    scores: list[list[float | None]]  # row t: after task t, on all tasks up to it (and on the next one, if asked for)
    before: NotRequired[list[float | None]]  # the base model's scores; empty if not asked for
    kept_bytes: list[int]  # of all arrays held after each task
    train_seconds: list[float]
    trainings: list[str]  # the hash of each training
    steps: list[int]
    curves: list[list[tuple[float, float | None]]]  # (step, mean training loss)
    base: dict[str, str]  # name, fingerprint
    settings: dict[str, dict[str, Any]]  # lora, train, data
    rows: dict[str, int]  # train, valid, test: how many rows of each task; 0 is all
    scored_on: str  # "test" or "valid"
    machine: dict[str, Any]
    # What tables do not need, and measures that are computed again from the scores.
    losses: NotRequired[list[list[float | None]]]
    metrics: NotRequired[list[str]]
    train_tokens: NotRequired[list[int]]
    peak_memory_bytes: NotRequired[int]
    seconds: NotRequired[float]
    average_accuracy: NotRequired[float | None]
    backward_transfer: NotRequired[float | None]
    forgetting: NotRequired[float | None]
    forward_transfer: NotRequired[float | None]
    learning_accuracy: NotRequired[float | None]
    newest: NotRequired[float | None]


CellKey = tuple[str, str, str, int, tuple[str, int]]

# What is checked of a row that comes from a file.
_CHECKS: dict[str, Any] = {
    name: (kind, ... if name in CellRow.__required_keys__ else None) for name, kind in get_type_hints(CellRow).items()
}
_Cell = create_model("_Cell", **_CHECKS)


def read_results(path: str | Path) -> list[CellRow]:
    """Return the rows of a results folder or file. Of two rows with one `cell_key`, the newer one counts.

    Raises:
        InputError: there are no results, or a row is no cell of an experiment.
    """
    path = Path(path)
    file = path / RESULTS if path.is_dir() else path
    found = [row for row in Log(file).read() if "hash" in row and "scores" in row]
    if not found:
        raise InputError(f"{path}: expected the results of an experiment ({RESULTS}), got none")
    return list({cell_key(row): row for row in (_checked(row, file) for row in found)}.values())


def _checked(row: dict[str, Any], file: Path) -> CellRow:
    try:
        _Cell.model_validate(row)
        wrong = _wrong_lengths(cast(CellRow, row))
    except ValidationError as error:
        first = error.errors()[0]
        wrong = f"{'.'.join(map(str, first['loc']))}: {first['msg'].lower()}"
    if wrong:
        raise InputError(
            f"{file}: the row with hash {str(row['hash'])[:40]!r} is no cell of an experiment: {wrong}"
            "\nhint: take the line out, and mbf experiment runs its cell again"
        )
    return cast(CellRow, row)


def _wrong_lengths(row: CellRow) -> str:
    tasks = len(row["tasks"])
    lengths = {len(row["task_hashes"]), len(row["scores"]), len(row["kept_bytes"]), len(row["train_seconds"])}
    lengths |= {len(row["trainings"]), len(row["steps"]), len(row["curves"]), len(row.get("before") or row["tasks"])}
    if tasks and lengths == {tasks} and all(len(scores) > t for t, scores in enumerate(row["scores"])):
        return ""
    return f"scores: expected one row for each of {tasks} tasks, as long as its place"


def scored_on(row: CellRow) -> tuple[str, int]:
    """Return the split that a cell was scored on, and how many of its rows (0: all).

    Cells that were scored on other rows cannot be compared.
    """
    return row["scored_on"], row["rows"].get("test", 0)


def cell_key(row: CellRow) -> CellKey:
    """Return what tells a cell from all others: label, setting, order, seed, and what it was scored on."""
    return row["label"], row["setting"], row["order"], row["seed"], scored_on(row)


def name_of(label: str, setting: str) -> str:
    """Return what a table calls a method with a setting."""
    return f"{label} [{setting}]" if setting else label


def label_of(row: CellRow) -> str:
    """Return what a table calls a cell's method."""
    return name_of(row["label"], row["setting"])


class Measures(TypedDict):
    """What one cell's scores come to; None where there is no such number."""

    average_accuracy: float | None
    backward_transfer: float | None
    forgetting: float | None
    forward_transfer: float | None
    learning_accuracy: float | None
    newest: float | None


def measured(scores: Sequence[Sequence[float | None]], before: Sequence[float | None] | None) -> Measures:
    """Return a cell's measures from its matrix and the base model's scores."""
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


def measures_of(row: CellRow) -> dict[str, float | None]:
    """Return a cell's measures by name, computed from its scores."""
    found = measured(row["scores"], row.get("before") or None)
    return {name: value for name, value in found.items() if value is None or isinstance(value, float)}
