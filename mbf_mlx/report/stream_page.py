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
from mbf_mlx.stream.records import ALL_SCORED

Document = dict[str, Any]
MOST = 24  # most tasks that the page shows; of more it shows so many, evenly spread


def stream_page(document: Document, course: Sequence[tuple[int, float | None]]) -> str:
    """Return the page of a stream.

    Args:
        document: The stream's status, as `mbf status --json` prints it.
        course: The average accuracy after some tasks, as `course` returns it.
    """
    places = shown_places(document["learned"], len(document["tasks"]))
    tasks = [document["tasks"][place] for place in places]
    numbers = [task["t"] for task in tasks]
    names, numbered = [task["name"] for task in tasks], [f"{t}. {task['name']}" for t, task in zip(numbers, tasks)]
    lower = [[document["scores"][i][j] if j <= i else None for j in places] for i in places]
    parts = [html.big(_stream_numbers(document)), *(f"<p>{escape(line)}</p>" for line in _words(document))]
    if len(tasks) < document["learned"]:
        parts += _averages(document, len(tasks), course)
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
    shown = [("tasks", f"{document['learned']:,}")]
    if document["average_accuracy"] is not None:
        shown.append(("average accuracy", f"{percent(document['average_accuracy'])} %"))
    for name in ("backward_transfer", "forgetting"):
        if document[name] is not None:
            shown.append((f"{name.replace('_', ' ')}, points", f"{100 * document[name]:+.1f}"))
    return [*shown, ("kept between tasks", units.size(document["kept_bytes"]))]


def shown_places(learned: int, known: int) -> list[int]:
    """Return the places of the tasks that the page shows, from 0: all, or MOST of them.

    Args:
        learned: How many tasks the stream has learned. Up to ALL_SCORED, those that are shown are evenly spread, the
            first and the last among them. Of more, they are the newest: older ones are not scored after every task.
        known: How many of them, the newest, the document has.
    """
    if learned <= MOST or learned > ALL_SCORED:
        return list(range(max(0, known - MOST), known))
    return [round(i * (learned - 1) / (MOST - 1)) for i in range(MOST)]


def _averages(document: Document, shown: int, course: Sequence[tuple[int, float | None]]) -> list[str]:
    """Return what the page says of all tasks where it shows only some: the mean score of all of them over time."""
    learned = document["learned"]
    which = "evenly spread, with the first and the last" if learned <= ALL_SCORED else "the newest"
    rest = "" if learned <= ALL_SCORED else " A task that was not scored again counts with its newest score."
    all_scores = "mbf status --json has" if learned == len(document["tasks"]) else "The lines in history/ have"
    words = (
        f"This stream has learned {learned:,} tasks. The page shows {shown} of them, {which}. The numbers above and the"
        f" averages below count every task.{rest} {all_scores} the scores of all tasks."
    )
    numbers, means = [t for t, _ in course], [mean for _, mean in course]
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
