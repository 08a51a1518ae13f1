"""The page of an experiment: methods compared, scores over time, matrices, training, memory, settings and hashes."""

from collections.abc import Collection, Sequence
from html import escape
from operator import itemgetter
from typing import Any

from mbf_mlx.experiment.results import MEASURES, CellRow, label_of, scored_on
from mbf_mlx.experiment.table import Line, columns, table
from mbf_mlx.report import page_parts as html
from mbf_mlx.report import plots as report_plots
from mbf_mlx.report.plots import Bar, Curve
from mbf_mlx.report.terminal import percent

Document = dict[str, Any]
COMPARED = {"average_accuracy": "average accuracy, %", "backward_transfer": "backward transfer, points"}


def results_page(name: str, rows: Sequence[CellRow]) -> str:
    """Return the page of an experiment's results.

    Args:
        name: Of the experiment.
        rows: Its cells.
    """
    methods, run_on, seeds = ({pick(r) for r in rows} for pick in (label_of, itemgetter("order"), itemgetter("seed")))
    others = ", ".join([_count(methods, "method"), _count(run_on, "order"), _count(seeds, "seed")])
    said = f"{_count(rows, 'cell')}: {others}."
    rows = _apart(rows)
    orders = list(dict.fromkeys(row["order"] for row in rows))
    lines = table(rows)
    parts = [html.section("Comparison", "Points of percent: mean over seeds, whiskers one sample standard deviation.")]
    for order in ["all", *orders]:
        chosen = [line for line in lines if line.order == order and line.measures["average_accuracy"].mean is not None]
        title = "all orders" if order == "all" else order
        if chosen:
            parts += [f"<h3>{escape(title)}</h3>", html.row(_comparisons(chosen, title))]
    texts = columns(lines)
    parts.append(html.scroll(html.table(list(texts), zip(*texts.values()), "compared")))
    parts.append(html.section("Score over time", "Mean score on the tasks learned so far, mean over seeds."))
    for order in orders:
        found = _groups(rows, order)
        sequence = next(iter(found.values()))[0]["tasks"]
        curves = [Curve(label, range(1, len(sequence) + 1), _averages(group)) for label, group in found.items()]
        parts += [f"<h3>{escape(order)}: {escape(' → '.join(sequence))}</h3>"]
        parts += html.charts(curves, "tasks learned", "mean score, %", f"Mean score, {order}", share=True)
    parts.append(
        html.section("Matrices", "Score on each task (columns) after each task (rows), in percent, mean over seeds.")
    )
    for order in orders:
        for label, group in _groups(rows, order).items():
            tasks, mean = group[0]["tasks"], _mean_matrix(group)
            numbered = [f"{t}. {task}" for t, task in enumerate(tasks, 1)]
            inside = html.scroll(report_plots.heat_map(numbered, tasks, mean, f"Matrix of {label}, {order}"))
            inside += html.scroll(
                html.table(["after", *tasks], [[n, *map(percent, r)] for n, r in zip(numbered, mean)])
            )
            parts.append(html.details(f"{label}, {order}", inside, wrap=False))
    parts.append(
        html.section("Training", "Loss per supervised token, first seed; methods that share a training share a line.")
    )
    for order in orders:
        parts.append(f"<h3>{escape(order)}</h3>")
        parts += html.charts(_chains(rows, order), "optimizer step", "loss, nats", f"Training loss, {order}")
    parts.append(html.section("Memory between tasks", "Bytes of all arrays that a method holds after each task."))
    kept = {label: group[0]["kept_bytes"] for label, group in _groups(rows, orders[0]).items()}
    curves = [Curve(label, range(1, len(b) + 1), [x / 1e6 for x in b]) for label, b in kept.items()]
    parts += html.charts(curves, "tasks learned", "MB", "Memory between tasks", digits=2)
    parts += [html.section("Settings and hashes"), html.settings(_shared(rows))]
    hashes = [[label_of(r), r["order"], str(r["seed"]), r["hash"]] for r in rows]
    parts.append(html.details("Every cell", html.table(["method", "order", "seed", "hash"], hashes)))
    return html.page(name, said, parts)


def _count(things: Collection[object], noun: str) -> str:
    return f"{len(things)} {noun}" + "s" * (len(things) != 1)


def _apart(rows: Sequence[CellRow]) -> list[CellRow]:
    """Return the rows with orders of their own for what was scored on valid rows, or on more rows than others were."""
    if len({scored_on(row) for row in rows}) == 1:
        return list(rows)
    apart: list[CellRow] = []
    for row in rows:
        split, count = scored_on(row)
        apart.append({**row, "order": f"{row['order']}, {count or 'all'} {split} rows"})
    return apart


def _groups(rows: Sequence[CellRow], order: str) -> dict[str, list[CellRow]]:
    """Return the cells of an order by their method, seeds together."""
    found: dict[str, list[CellRow]] = {}
    for row in rows:
        if row["order"] == order:
            found.setdefault(label_of(row), []).append(row)
    return found


def _comparisons(lines: Sequence[Line], title: str) -> list[str]:
    """Return a plot of each measure, of the lines that have it, the best average accuracy on top."""
    ordered = sorted(lines, key=lambda line: -(line.measures["average_accuracy"].mean or 0.0))
    plots = []
    for color, (measure, said) in enumerate(COMPARED.items()):
        spreads = [(line.name, line.measures[measure]) for line in ordered]
        if bars := [Bar(name, s.mean, s.deviation) for name, s in spreads if s.mean is not None]:
            plots.append(report_plots.comparison(bars, said, f"{said}, {title}", color))
    return plots


def _average(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return sum(known) / len(known) if known and len(known) == len(values) else None


def _averages(group: Sequence[CellRow]) -> list[float | None]:
    count = len(group[0]["scores"])
    return [_average([_average(row["scores"][t][: t + 1]) for row in group]) for t in range(count)]


def _mean_matrix(group: Sequence[CellRow]) -> list[list[float | None]]:
    count = len(group[0]["scores"])
    return [
        [_average([row["scores"][i][j] for row in group]) if j <= i else None for j in range(count)]
        for i in range(count)
    ]


def _chains(rows: Sequence[CellRow], order: str) -> list[Curve]:
    """Return the training curves of an order, tasks behind each other, one for every chain of trainings."""
    chains: dict[tuple[str, ...], list[CellRow]] = {}
    for group in _groups(rows, order).values():
        chains.setdefault(tuple(group[0]["trainings"]), []).append(group[0])
    curves = []
    for sharing in chains.values():
        x: list[float] = []
        y: list[float | None] = []
        done = 0
        for points, steps in zip(sharing[0]["curves"], sharing[0]["steps"]):
            x += [done + step for step, _ in points]
            y += [loss for _, loss in points]
            done += steps
        others = f" and {len(sharing) - 1} more" if len(sharing) > 1 else ""
        curves.append(Curve(label_of(sharing[0]) + others, x, y))
    return curves


def _shared(rows: Sequence[CellRow]) -> Document:
    """Return what all cells have in common, and each method's options."""
    found = {key: [dict(row)[key] for row in rows] for key in ("base", "settings", "rows", "scored_on", "machine")}
    common = {key: values[0] for key, values in found.items() if _same(values)}
    hashes = {task: digest for row in rows for task, digest in zip(row["tasks"], row["task_hashes"])}
    options = {label_of(row): {row["method"]: row["options"]} for row in rows}
    return {**common, "methods": options, "data sha256": hashes, "measures": dict(MEASURES)}


def _same(values: Sequence[Any]) -> bool:
    def bare(value: Any) -> Any:
        if not isinstance(value, dict):
            return value
        return {k: bare(v) for k, v in value.items() if k != "seed"}  # in settings.train; seeds differ by design

    return all(bare(value) == bare(values[0]) for value in values)
