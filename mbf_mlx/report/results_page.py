"""The page of an experiment: methods compared, scores over time, matrices, training, memory, settings and hashes."""

from collections.abc import Collection, Sequence
from html import escape
from operator import itemgetter
from typing import Any

from mbf_mlx.experiment.results import MEASURES, CellRow, label_of, scored_on
from mbf_mlx.experiment.table import Line, columns, table
from mbf_mlx.report import page_parts as html
from mbf_mlx.report import plots
from mbf_mlx.report.plots import Bar, Curve
from mbf_mlx.report.terminal import percent

Document = dict[str, Any]
COMPARED = {"average_accuracy": "average accuracy, %", "backward_transfer": "backward transfer, points"}


def results_page(name: str, rows: Sequence[CellRow]) -> str:
    """Return the page of an experiment.

    Args:
        name: The experiment's name.
        rows: The rows of its finished cells, as `read_results` returns them.
    """
    methods, run_on, seeds = ({pick(r) for r in rows} for pick in (label_of, itemgetter("order"), itemgetter("seed")))
    others = ", ".join([_count(methods, "method"), _count(run_on, "order"), _count(seeds, "seed")])
    subtitle = f"{_count(rows, 'cell')}: {others}."
    rows = _apart(rows)
    orders = list(dict.fromkeys(row["order"] for row in rows))
    hashes = [[label_of(r), r["order"], str(r["seed"]), r["hash"]] for r in rows]
    parts = [
        *_comparison(rows, orders),
        *_over_time(rows, orders),
        *_matrices(rows, orders),
        *_training(rows, orders),
        *_memory(rows, orders),
        html.section("Settings and hashes"),
        html.settings(_shared(rows)),
        html.details("Every cell", html.table(["method", "order", "seed", "hash"], hashes)),
    ]
    return html.page(name, subtitle, parts)


def _comparison(rows: Sequence[CellRow], orders: Sequence[str]) -> list[str]:
    """Return the section that compares methods: plots for all orders and for each, and one table."""
    lines = table(rows)
    parts = [html.section("Comparison", "Points of percent: mean over seeds; whiskers are one sample deviation.")]
    for order in ["all", *orders]:
        chosen = [line for line in lines if line.order == order and line.measures["average_accuracy"].mean is not None]
        title = "all orders" if order == "all" else order
        if chosen:
            parts += [f"<h3>{escape(title)}</h3>", html.row(_comparisons(chosen, title))]
    texts = columns(lines)
    return [*parts, html.scroll(html.table(list(texts), zip(*texts.values()), "compared"))]


def _over_time(rows: Sequence[CellRow], orders: Sequence[str]) -> list[str]:
    """Return the section with each method's mean score after each task."""
    parts = [html.section("Score over time", "Mean score on the tasks learned so far, mean over seeds.")]
    for order in orders:
        found = _groups(rows, order)
        sequence = next(iter(found.values()))[0]["tasks"]
        curves = [Curve(label, range(1, len(sequence) + 1), _averages(group)) for label, group in found.items()]
        parts += [f"<h3>{escape(order)}: {escape(' → '.join(sequence))}</h3>"]
        parts += html.charts(curves, "tasks learned", "mean score, %", f"Mean score, {order}", share=True)
    return parts


def _matrices(rows: Sequence[CellRow], orders: Sequence[str]) -> list[str]:
    """Return the section with the matrix of scores of every method and order."""
    words = "Score on each task (columns) after each task was learned (rows), in percent, mean over seeds."
    parts = [html.section("Matrices", words)]
    for order in orders:
        for label, group in _groups(rows, order).items():
            tasks, mean = group[0]["tasks"], _mean_matrix(group)
            numbered = [f"{t}. {task}" for t, task in enumerate(tasks, 1)]
            inside = html.scroll(plots.heat_map(numbered, tasks, mean, f"Matrix of {label}, {order}"))
            cells = [[name, *map(percent, line)] for name, line in zip(numbered, mean)]
            inside += html.scroll(html.table(["after", *tasks], cells))
            parts.append(html.details(f"{label}, {order}", inside, wrap=False))
    return parts


def _training(rows: Sequence[CellRow], orders: Sequence[str]) -> list[str]:
    """Return the section with the training losses."""
    words = "Loss per token that is trained on, first seed; methods that share a training share a line."
    parts = [html.section("Training", words)]
    for order in orders:
        parts.append(f"<h3>{escape(order)}</h3>")
        parts += html.charts(_chains(rows, order), "optimizer step", "loss, nats", f"Training loss, {order}")
    return parts


def _memory(rows: Sequence[CellRow], orders: Sequence[str]) -> list[str]:
    """Return the section with what each method keeps after each task, in the first order."""
    kept = {label: group[0]["kept_bytes"] for label, group in _groups(rows, orders[0]).items()}
    curves = [Curve(label, range(1, len(b) + 1), [x / 1e6 for x in b]) for label, b in kept.items()]
    return [
        html.section("Memory between tasks", "Bytes of all arrays that a method keeps after each task."),
        *html.charts(curves, "tasks learned", "MB", "Memory between tasks", digits=2),
    ]


def _count(things: Collection[object], noun: str) -> str:
    return f"{len(things)} {noun}" + "s" * (len(things) != 1)


def _apart(rows: Sequence[CellRow]) -> list[CellRow]:
    """Return the rows; where they were scored on different rows, that becomes part of their order."""
    if len({scored_on(row) for row in rows}) == 1:
        return list(rows)
    apart: list[CellRow] = []
    for row in rows:
        split, count = scored_on(row)
        apart.append({**row, "order": f"{row['order']}, {count or 'all'} {split} rows"})
    return apart


def _groups(rows: Sequence[CellRow], order: str) -> dict[str, list[CellRow]]:
    """Return the cells of an order by method; a method's seeds stand together."""
    found: dict[str, list[CellRow]] = {}
    for row in rows:
        if row["order"] == order:
            found.setdefault(label_of(row), []).append(row)
    return found


def _comparisons(lines: Sequence[Line], title: str) -> list[str]:
    """Return one plot for each measure, the best average accuracy on top; lines without the measure are left out."""
    ordered = sorted(lines, key=lambda line: -(line.measures["average_accuracy"].mean or 0.0))
    drawn = []
    for color, (measure, words) in enumerate(COMPARED.items()):
        spreads = [(line.name, line.measures[measure]) for line in ordered]
        if bars := [Bar(name, s.mean, s.deviation) for name, s in spreads if s.mean is not None]:
            drawn.append(plots.comparison(bars, words, f"{words}, {title}", color))
    return drawn


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
    """Return the training curves of an order, its tasks one after another; cells with the same trainings share one."""
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
    """Return the settings that all cells share, and each method's options."""
    found = {key: [dict(row)[key] for row in rows] for key in ("base", "settings", "rows", "scored_on", "machine")}
    common = {key: values[0] for key, values in found.items() if _same(values)}
    hashes = {task: digest for row in rows for task, digest in zip(row["tasks"], row["task_hashes"])}
    options = {label_of(row): {row["method"]: row["options"]} for row in rows}
    return {**common, "methods": options, "data sha256": hashes, "measures": dict(MEASURES)}


def _same(values: Sequence[Any]) -> bool:
    """Return whether all values are equal, apart from seeds."""

    def bare(value: Any) -> Any:
        if not isinstance(value, dict):
            return value
        # settings.train holds the seed, in which cells differ by design
        return {k: bare(v) for k, v in value.items() if k != "seed"}

    return all(bare(value) == bare(values[0]) for value in values)
