"""The matrix of scores and the sizes, in the terminal."""

from typing import Any

from rich.table import Table
from rich.text import Text

Document = dict[str, Any]
MOST = 12  # tasks that the matrix shows: it takes as long for task 1000 as for task 13
KEEPS_ROWS = ("replay", "joint")  # the methods that keep the user's data


def matrix(document: Document, width: int) -> Table:
    """Return R as a table: one row for each learned task, one column for each task it was scored on, in percent.

    Args:
        document: A stream's status.
        width: Of the terminal, in characters. Where more tasks were learned than it has room for, or than MOST, the
            newest alone are shown, and the others' mean as "earlier".
    """
    tasks, scores = document["tasks"], document["scores"]
    first = _first_shown([task["name"] for task in tasks], width)
    title = "score on each task after each task, in %"
    title += f", newest {len(tasks) - first} of {len(tasks)} (mbf report: all)" if first else ""
    table = Table(title=title, title_justify="left", title_style="bold")
    table.add_column("after learning", no_wrap=True)
    if first:
        table.add_column("earlier", justify="right")
    for task in tasks[first:]:
        table.add_column(task["name"], justify="right", no_wrap=True)
    table.add_column("average", justify="right")
    for t, (task, row) in enumerate(zip(tasks[first:], scores[first:], strict=True), start=first + 1):
        cells = [Text("") if j >= t else _cell(value) for j, value in enumerate(row[first:], start=first)]
        earlier = [_mean(row[:first])] if first else []
        table.add_row(f"{t}. {task['name']}", *earlier, *cells, _mean(row[:t]))
    return table


def _first_shown(names: list[str], width: int) -> int:
    """Return the place of the first task from which on a table has room for all."""
    shown: list[str] = []
    for name in reversed(names[-MOST:]):
        more = [name, *shown]
        label = max(len("after learning"), *(len(f"{len(names)}. {each}") for each in more))
        needed = label + 4 + sum(max(len(each), len("100.0")) + 3 for each in [*more, "average", "earlier"])
        if shown and needed > width:
            break
        shown = more
    return len(names) - len(shown)


def _mean(row: list[float | None]) -> str:
    known = [value for value in row if value is not None]
    return percent(sum(known) / len(known)) if known else "-"


def _cell(value: float | None) -> Text:
    if value is None:
        return Text("-", style="dim")
    style = "green" if value >= 0.8 else "yellow" if value >= 0.5 else "red"
    return Text(percent(value), style=style)


def percent(value: float | None) -> str:
    """Return a score in [0, 1] as percent with one decimal, "-" where there is none."""
    return "-" if value is None else f"{100 * value:.1f}"


def summary(document: Document) -> list[str]:
    """Return the lines under the matrix: averages, what is kept between tasks, the base."""
    lines = []
    if document["average_accuracy"] is not None:
        mixed = " (exact match and ROUGE-L mixed)" if document["mixed_metrics"] else ""
        parts = [f"average accuracy {percent(document['average_accuracy'])} %{mixed}"]
        for name in ("backward_transfer", "forgetting"):
            if document[name] is not None:
                parts.append(f"{name.replace('_', ' ')} {100 * document[name]:+.1f} points")
        lines.append(", ".join(parts))
    count = len(document["tasks"])
    lines.append(f"{count} task{'' if count == 1 else 's'} in one adapter of {document['adapter_bytes']:,} bytes")
    lines.append(
        f"beside it for the next task {document['state_bytes']:,} bytes; arrays held between tasks"
        f" {document['kept_bytes']:,} bytes"
    )
    if document["method"] in KEEPS_ROWS:
        lines.append("rows of its tasks are kept in the stream's state, to be trained on again; no export holds them")
    lora = document["settings"]["lora"]
    keys = ", ".join(key.rpartition(".")[2] for key in lora["keys"])
    lines.append(
        f"base {document['base']['name']}, method {document['method']}, rank {lora['rank']}, scale {lora['scale']:g},"
        f" on {keys}"
    )
    return lines
