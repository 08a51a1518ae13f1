"""The page of a stream: what is remembered, how it was trained, what is kept between tasks, settings and hashes."""

from collections.abc import Sequence
from html import escape
from pathlib import Path
from typing import Any

from mbf_mlx import units
from mbf_mlx.report import page_parts as html
from mbf_mlx.report import plots
from mbf_mlx.report.plots import Curve
from mbf_mlx.report.terminal import percent, summary

Document = dict[str, Any]


def stream_page(document: Document) -> str:
    """Return the page of a stream.

    Args:
        document: The stream's status, as `mbf status --json` prints it.
    """
    tasks, scores = document["tasks"], document["scores"]
    names, numbered = [task["name"] for task in tasks], [f"{t}. {task['name']}" for t, task in enumerate(tasks, 1)]
    parts = [html.big(_stream_numbers(document)), *(f"<p>{escape(line)}</p>" for line in _words(document))]
    if any(value is not None for row in scores for value in row):
        lower = [[value if j <= i else None for j, value in enumerate(row)] for i, row in enumerate(scores)]
        parts += [
            html.section(
                "What is remembered", "Score on each task (columns) after each task was learned (rows), in percent."
            ),
            html.scroll(plots.heat_map(numbered, names, lower, "Matrix of scores")),
            html.details(
                "As a table", html.table(["after", *names], [[n, *map(percent, r)] for n, r in zip(numbered, lower)])
            ),
            html.section("Score over time", "Each task's score, from when it was learned to the last task."),
            *html.charts(_task_curves(names, lower), "tasks learned", "score, %", "Score over time", share=True),
        ]
    curves = [_curve(task["name"], task["curve"]) for task in tasks if task["curve"]]
    if curves:
        parts += [
            html.section(
                "Training", "Loss per token that is trained on, while each task trained; and what training took."
            ),
            *html.charts(curves, "optimizer step", "loss, nats", "Training loss"),
        ]
    if tasks:
        rows = [[task[name] for name in ("name", "train_rows", "steps")] + _task_numbers(task) for task in tasks]
        columns = ["task", "rows", "steps", "loss before", "after", "time", "tokens/s"]
        peaks = [Curve("while a task trained", range(1, len(tasks) + 1), [t["peak_memory_bytes"] / 1e9 for t in tasks])]
        parts += [
            html.scroll(html.table(columns, rows)),
            html.section("Memory", "Peak memory of training, and what is kept between tasks."),
            html.scroll(plots.lines(peaks, "task", "GB", "Peak memory of training")),
            html.scroll(html.table(["kept between tasks", "bytes"], _held(document))),
            html.details(
                "Peak memory as a table",
                html.table(["task", "peak"], [[t["name"], units.size(t["peak_memory_bytes"])] for t in tasks]),
            ),
        ]
    fixed = {key: document[key] for key in ("id", "base", "method", "method_options", "settings", "generation")}
    hashes = {f"task {task['name']}": task["sha256"] for task in tasks}
    parts += [html.section("Settings and hashes"), html.settings({**fixed, "data sha256": hashes})]
    return html.page(Path(document["stream"]).resolve().name, "What one adapter knows after each task.", parts)


def _stream_numbers(document: Document) -> list[tuple[str, str]]:
    shown = [("tasks", str(len(document["tasks"])))]
    if document["average_accuracy"] is not None:
        shown.append(("average accuracy", f"{percent(document['average_accuracy'])} %"))
    for name in ("backward_transfer", "forgetting"):
        if document[name] is not None:
            shown.append((f"{name.replace('_', ' ')}, points", f"{100 * document[name]:+.1f}"))
    return [*shown, ("kept between tasks", units.size(document["kept_bytes"]))]


def _task_curves(names: Sequence[str], scores: Sequence[Sequence[float | None]]) -> list[Curve]:
    last = len(scores)
    return [Curve(name, range(j + 1, last + 1), [scores[i][j] for i in range(j, last)]) for j, name in enumerate(names)]


def _curve(name: str, points: Sequence[Sequence[float]]) -> Curve:
    return Curve(name, [point[0] for point in points], [point[1] for point in points])


def _task_numbers(task: Document) -> list[str]:
    losses = ["-" if task[key] is None else f"{task[key]:.3f}" for key in ("loss_before", "loss_after")]
    return [*losses, units.duration(task["seconds"]), f"{task['tokens_per_second']:.0f}"]


def _held(document: Document) -> list[list[str]]:
    names = {
        "adapter_bytes": "deployed adapter (file)",
        "state_bytes": "state for the next task (file)",
        "kept_bytes": "all arrays together",
    }
    return [[words, f"{document[key]:,}"] for key, words in names.items()]


def _words(document: Document) -> list[str]:
    """Return the lines under the large numbers, without those that repeat a large number."""
    return [line for line in summary(document) if not line.startswith("average accuracy")]
