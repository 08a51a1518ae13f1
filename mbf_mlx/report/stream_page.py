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
MOST = 24  # most tasks that the page shows; of more it shows so many, evenly spread


def stream_page(document: Document) -> str:
    """Return the page of a stream.

    Args:
        document: The stream's status, as `mbf status --json` prints it.
    """
    places = shown_places(len(document["tasks"]))
    tasks = [document["tasks"][place] for place in places]
    numbers = [place + 1 for place in places]
    names, numbered = [task["name"] for task in tasks], [f"{t}. {task['name']}" for t, task in zip(numbers, tasks)]
    lower = [[document["scores"][i][j] if j <= i else None for j in places] for i in places]
    parts = [html.big(_stream_numbers(document)), *(f"<p>{escape(line)}</p>" for line in _words(document))]
    if len(tasks) < len(document["tasks"]):
        parts += _averages(document, numbers)
    if any(value is not None for row in lower for value in row):
        parts += [
            html.section(
                "What is remembered", "Score on each task (columns) after each task was learned (rows), in percent."
            ),
            html.scroll(plots.heat_map(numbered, names, lower, "Matrix of scores")),
            html.details(
                "As a table", html.table(["after", *names], [[n, *map(percent, r)] for n, r in zip(numbered, lower)])
            ),
            html.section("Score over time", "Each task's score, from when it was learned to the last task."),
            *html.charts(
                _task_curves(numbers, names, lower), "tasks learned", "score, %", "Score over time", share=True
            ),
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
        peaks = [Curve("while a task trained", numbers, [t["peak_memory_bytes"] / 1e9 for t in tasks])]
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


def shown_places(count: int) -> list[int]:
    """Return which of `count` tasks the page shows, from 0: all, or MOST of them, the first and the last among them."""
    return list(range(count)) if count <= MOST else [round(i * (count - 1) / (MOST - 1)) for i in range(MOST)]


def _averages(document: Document, numbers: Sequence[int]) -> list[str]:
    """Return what the page says of all tasks where it shows only some: the mean score after those that are shown."""
    means = []
    for t in numbers:
        known = [value for value in document["scores"][t - 1][:t] if value is not None]
        means.append(sum(known) / len(known) if known else None)
    words = (
        f"This stream has learned {len(document['tasks']):,} tasks. The page shows {len(numbers)} of them, evenly"
        " spread, with the first and the last. The numbers above and the averages below count every task."
        " mbf status --json has the scores of all tasks."
    )
    parts = [html.section("All tasks", words)]
    if any(mean is not None for mean in means):
        curve = Curve("all tasks learned so far", numbers, means)
        parts += html.charts([curve], "tasks learned", "mean score, %", "Mean score over time", share=True)
    return parts


def _task_curves(numbers: Sequence[int], names: Sequence[str], scores: Sequence[Sequence[float | None]]) -> list[Curve]:
    """Return the score of each shown task from when it was learned on; `numbers` are the shown tasks' places from 1."""
    columns = enumerate(names)
    return [Curve(name, numbers[j:], [row[j] for row in scores[j:]]) for j, name in columns]


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
