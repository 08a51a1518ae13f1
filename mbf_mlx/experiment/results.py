"""An experiment's results: one JSON line a cell, and the table that they make.

A line that a killed run left half written is not read, and the next one starts anew behind it. Scores are in [0, 1],
seconds are of training alone. Means over orders are taken seed by seed, then over seeds, with the sample standard
deviation between seeds.
"""

import json
import os
from collections.abc import Hashable, Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from filelock import FileLock
from pydantic import BaseModel, ValidationError

from mbf_mlx import metrics, units
from mbf_mlx.errors import InputError
from mbf_mlx.files.storage import refusal
from mbf_mlx.metrics import Spread

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


class Log:
    """A JSONL file that is only ever added to; each line is on the disk when `add` returns."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def read(self) -> list[Row]:
        """Return every whole line."""
        rows = []
        for line in self.path.read_bytes().splitlines() if self.path.exists() else []:
            try:
                rows.append(json.loads(line))
            except (ValueError, RecursionError):
                continue  # a killed run's last line
        return [row for row in rows if isinstance(row, dict)]

    def add(self, row: Row) -> None:
        """Add one line.

        Raises:
            InputError: the disk is full, or the file cannot be written.
        """
        try:
            with FileLock(self.path.with_suffix(".lock")), open(self.path, "a+b") as file:
                end = file.seek(0, os.SEEK_END)
                file.seek(max(0, end - 1))
                torn = end and file.read(1) != b"\n"
                file.write((b"\n" if torn else b"") + json.dumps(row, ensure_ascii=False).encode() + b"\n")
                file.flush()
                os.fsync(file.fileno())
        except OSError as error:
            raise refusal(error, self.path) from error


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


@dataclass(frozen=True, kw_only=True)
class Line:
    """One line of the table: a method with a setting, on one order or over all of its orders."""

    label: str
    setting: str
    order: str  # "all" over several, "2 orders" over some of those that others were run on
    orders: int
    seeds: int
    cells: int
    measures: dict[str, Spread]  # of MEASURES; disparities over orders alone
    kept_bytes: int  # between tasks, at the end
    grows: bool  # with the number of tasks
    seconds: float  # of training, mean of a cell

    @property
    def name(self) -> str:
        """What the line is called."""
        return name_of(self.label, self.setting)


def table(rows: Iterable[Row]) -> list[Line]:
    """Return the table's lines: each method's orders, and behind several their mean."""
    groups: dict[tuple[str, str, Hashable], list[Row]] = {}
    known: dict[Hashable, set[str]] = {}  # the orders that something was scored on: test rows, or valid ones
    for row in rows:
        groups.setdefault((row["label"], row["setting"], scored(row)), []).append(row)
        known.setdefault(scored(row), set()).add(row["order"])
    lines = []
    for (label, setting, on), group in groups.items():
        orders = list(dict.fromkeys(row["order"] for row in group))
        lines += [_line(label, setting, name, [row for row in group if row["order"] == name]) for name in orders]
        if len(orders) > 1:
            name = "all" if len(orders) == len(known[on]) else f"{len(orders)} orders"
            lines.append(_line(label, setting, name, group))
    return lines


def _line(label: str, setting: str, order: str, group: list[Row]) -> Line:
    seeds = sorted({row["seed"] for row in group})
    by_seed = [[row for row in group if row["seed"] == seed] for seed in seeds]
    orders = len({row["order"] for row in group})
    complete = [rows for rows in by_seed if len(rows) == orders]  # a seed that lacks an order would shift the mean
    values = [[measures_of(row) for row in rows] for rows in complete]
    spreads = {name: metrics.spread(_mean(cells, name) for cells in values) for name in measures_of(group[0])}
    for name, pick in (("largest_disparity", 0), ("average_disparity", 1)):
        ranges = [metrics.order_disparity([_finals(row) for row in rows])[pick] for rows in complete if orders > 1]
        spreads[name] = metrics.spread(value for value in ranges if isinstance(value, float))
    return Line(
        label=label,
        setting=setting,
        order=order,
        orders=orders,
        seeds=len(complete),
        cells=len(group),
        measures=spreads,
        kept_bytes=max(row["kept_bytes"][-1] for row in group),
        grows=group[0]["grows"],
        seconds=sum(sum(row["train_seconds"]) for row in group) / len(group),
    )


def _mean(cells: list[dict[str, float | None]], name: str) -> float | None:
    values = [value for cell in cells if (value := cell[name]) is not None]
    return sum(values) / len(values) if len(values) == len(cells) else None


def _finals(row: Row) -> dict[str, float | None]:
    return dict(zip(row["tasks"], row["scores"][-1], strict=False))


def cells_of(line: Line) -> list[str]:
    """Return a line as text, cell by cell, under `heads`: points of percent, mean ± deviation over seeds."""
    numbers = [points(line.measures.get(name)) for name in MEASURES]
    kept = units.size(line.kept_bytes) + (", grows" if line.grows else "")
    return [line.name, line.order, str(line.seeds), *numbers, kept, units.duration(line.seconds)]


def heads() -> list[str]:
    """Return the heads of all columns that a table can have."""
    return ["method", "order", "seeds", *MEASURES.values(), "kept", "training"]


def columns(lines: Sequence[Line]) -> dict[str, list[str]]:
    """Return the table as text, a head and what stands under it; without columns in which no line has anything."""
    found = zip(heads(), zip(*map(cells_of, lines)))
    return {head: list(cells) for head, cells in found if set(cells) != {NOTHING}}


def points(spread: Spread | None) -> str:
    """Return a spread in points of percent: "61.2 ± 1.3", without a deviation where there is one seed alone."""
    if spread is None or spread.mean is None:
        return NOTHING
    mean = round(100 * spread.mean, 1) + 0.0  # no -0.0
    return f"{mean:.1f}" + (f" ± {100 * spread.deviation:.1f}" if spread.deviation is not None else "")


def markdown(found: dict[str, list[str]]) -> str:
    """Return a table in Markdown: heads, and what stands under each. Numbers are to the right, words to the left."""
    sides = ["---" if head in ("method", "order", "seeds") else "---:" for head in found]
    lines = [list(found), sides, *zip(*found.values())]
    return "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines)


def document(name: str, rows: Sequence[Row]) -> dict[str, Any]:
    """Return what `mbf experiment --json` prints: the table's lines and every cell."""
    lines = [asdict(line) for line in table(rows)]
    for line in lines:
        line["measures"] = {
            key: {"mean": s[0], "deviation": s[1], "seeds": s[2]} for key, s in line["measures"].items()
        }
    return {"name": name, "table": lines, "cells": list(rows)}
