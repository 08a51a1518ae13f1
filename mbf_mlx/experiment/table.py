"""Results as one table: one line for each method, averaged over its cells."""

from collections.abc import Hashable, Iterable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from mbf_mlx import metrics, units
from mbf_mlx.experiment.results import MEASURES, NOTHING, CellRow, measures_of, name_of, scored_on
from mbf_mlx.metrics import Spread


@dataclass(frozen=True, kw_only=True)
class Line:
    """One line of the table: a method with a setting, on one order or over all of its orders."""

    label: str
    setting: str
    order: str  # "all" for a mean over all orders, "2 orders" for a mean over two of them
    orders: int
    seeds: int
    cells: int
    measures: dict[str, Spread]  # by the names in MEASURES; disparities only where there are several orders
    kept_bytes: int  # held between tasks, at the end
    grows: bool  # kept_bytes grow with the number of tasks
    seconds: float  # mean training time of a cell

    @property
    def name(self) -> str:
        """What a table calls the line."""
        return name_of(self.label, self.setting)


def table(rows: Iterable[CellRow]) -> list[Line]:
    """Return the table's lines: one for each order of a method, then one for the mean over several orders."""
    groups: dict[tuple[str, str, Hashable], list[CellRow]] = {}
    known: dict[Hashable, set[str]] = {}  # by the rows that were scored: all orders there
    for row in rows:
        groups.setdefault((row["label"], row["setting"], scored_on(row)), []).append(row)
        known.setdefault(scored_on(row), set()).add(row["order"])
    lines = []
    for (label, setting, on), group in groups.items():
        orders = list(dict.fromkeys(row["order"] for row in group))
        lines += [_line(label, setting, name, [row for row in group if row["order"] == name]) for name in orders]
        if len(orders) > 1:
            name = "all" if len(orders) == len(known[on]) else f"{len(orders)} orders"
            lines.append(_line(label, setting, name, group))
    return lines


def _line(label: str, setting: str, order: str, group: list[CellRow]) -> Line:
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


def _finals(row: CellRow) -> dict[str, float | None]:
    return dict(zip(row["tasks"], row["scores"][-1], strict=False))


def cells_of(line: Line) -> list[str]:
    """Return the texts of a line, one under each of `heads`: points of percent, mean ± deviation over seeds."""
    numbers = [points(line.measures.get(name)) for name in MEASURES]
    kept = units.size(line.kept_bytes) + (", grows" if line.grows else "")
    return [line.name, line.order, str(line.seeds), *numbers, kept, units.duration(line.seconds)]


def heads() -> list[str]:
    """Return the heads of all columns that a table may have."""
    return ["method", "order", "seeds", *MEASURES.values(), "kept", "training"]


def columns(lines: Sequence[Line]) -> dict[str, list[str]]:
    """Return the table's columns as texts by their heads, without columns that are empty in every line."""
    found = zip(heads(), zip(*map(cells_of, lines)))
    return {head: list(cells) for head, cells in found if set(cells) != {NOTHING}}


def points(spread: Spread | None) -> str:
    """Return a spread in points of percent: "61.2 ± 1.3", or "61.2" where there is only one seed."""
    if spread is None or spread.mean is None:
        return NOTHING
    mean = round(100 * spread.mean, 1) + 0.0  # no -0.0
    return f"{mean:.1f}" + (f" ± {100 * spread.deviation:.1f}" if spread.deviation is not None else "")


def markdown(found: dict[str, list[str]]) -> str:
    """Return columns as a table in Markdown, numbers aligned right and words left."""
    sides = ["---" if head in ("method", "order", "seeds") else "---:" for head in found]
    lines = [list(found), sides, *zip(*found.values())]
    return "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines)


def document(name: str, rows: Sequence[CellRow]) -> dict[str, Any]:
    """Return the document that `mbf experiment --json` prints: the table's lines and every cell."""
    lines = [asdict(line) for line in table(rows)]
    for line in lines:
        line["measures"] = {
            key: {"mean": s[0], "deviation": s[1], "seeds": s[2]} for key, s in line["measures"].items()
        }
    return {"name": name, "table": lines, "cells": list(rows)}
