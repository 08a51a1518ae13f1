"""Compares methods with one of them, cell by cell: the gain of each on the same order with the same seed.

Cells with one order and seed see the same rows in the same order and draw the same first A. So their difference varies
less than the difference of two means. Differences are in units of the score; tables show points of percent.
"""

import math
from collections.abc import Hashable, Iterable, Sequence
from dataclasses import dataclass

from mbf_mlx import metrics
from mbf_mlx.errors import InputError
from mbf_mlx.experiment.results import NOTHING, CellRow, label_of, measures_of, scored_on

Pairs = list[tuple[CellRow, CellRow]]


@dataclass(frozen=True, kw_only=True)
class Difference:
    """One line: a method's score minus the reference method's, over the cells that both have."""

    name: str
    orders: dict[str, float | None]  # the same for each order; None where the two share no cell
    cells: int
    mean: float  # mean difference in average accuracy, over the cells
    error: float | None  # standard error of that mean; None for one cell
    least: float
    most: float
    newest: float | None  # mean difference on the newest task; None where it has no score


def reference_name(names: Iterable[str], asked: str) -> str:
    """Return the one method that the user asks for, by its name or by its name without the setting in brackets.

    Args:
        names: The names of all methods, as the table has them: "products [2e-3]".
        asked: What the user wrote.

    Raises:
        InputError: no method has this name, or several settings of it do.
    """
    known = list(dict.fromkeys(names))
    found = [name for name in known if asked in (name, name.rsplit(" [", 1)[0])]
    if len(found) != 1:
        raise InputError(f"--against: expected one of {', '.join(map(repr, found or known))}, got {asked!r}")
    return found[0]


def differences(rows: Iterable[CellRow], against: str) -> list[Difference]:
    """Return a line for every method except the one named `against`, the best first."""
    methods: dict[str, dict[tuple[str, int, Hashable], CellRow]] = {}
    for row in rows:
        methods.setdefault(label_of(row), {})[row["order"], row["seed"], scored_on(row)] = row
    reference = methods.pop(against, {})
    orders = list(dict.fromkeys(order for order, _, _ in reference))
    lines = []
    for name, cells in methods.items():
        pairs = [(row, reference[place]) for place, row in cells.items() if place in reference]
        found = _gains(pairs, "average_accuracy")
        if found:
            by_order = {order: metrics.spread(_gains(_only(pairs, order), "average_accuracy")).mean for order in orders}
            spread, newest = metrics.spread(found), metrics.spread(_gains(pairs, "newest"))
            lines.append(
                Difference(
                    name=name,
                    orders=by_order,
                    cells=len(found),
                    mean=math.fsum(found) / len(found),
                    error=None if spread.deviation is None else spread.deviation / math.sqrt(len(found)),
                    least=min(found),
                    most=max(found),
                    newest=newest.mean,
                )
            )
    return sorted(lines, key=lambda line: -line.mean)


def _only(pairs: Pairs, order: str) -> Pairs:
    return [pair for pair in pairs if pair[0]["order"] == order]


def _gains(pairs: Pairs, measure: str) -> list[float]:
    both = [(measures_of(row)[measure], measures_of(other)[measure]) for row, other in pairs]
    return [one - other for one, other in both if one is not None and other is not None]


def columns(lines: Sequence[Difference]) -> dict[str, list[str]]:
    """Return the lines' columns as texts by their heads, in points of percent."""
    found: dict[str, list[str]] = {"method": [line.name for line in lines]}
    orders = list(dict.fromkeys(order for line in lines for order in line.orders))
    for order in orders if len(orders) > 1 else []:
        found[f"on {order}"] = [_points(line.orders[order]) for line in lines]
    found["cells"] = [str(line.cells) for line in lines]
    found["mean"] = [_points(line.mean) for line in lines]
    found["standard error"] = [NOTHING if line.error is None else f"{100 * line.error:.1f}" for line in lines]
    found["least, most"] = [f"{_points(line.least)}, {_points(line.most)}" for line in lines]
    found["newest"] = [_points(line.newest) for line in lines]
    return found


def _points(value: float | None) -> str:
    return NOTHING if value is None else f"{round(100 * value, 1) + 0.0:+.1f}"  # no -0.0
