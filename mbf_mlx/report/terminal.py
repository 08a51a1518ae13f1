"""What the terminal shows of a stream: the matrix of scores, and a few lines of averages and sizes."""

from typing import Any

from rich.table import Table
from rich.text import Text

Document = dict[str, Any]
MOST = 12  # most tasks that the matrix shows
KEEPS_ROWS = ("replay", "joint")  # methods that keep rows of the user's data


def matrix(document: Document, width: int) -> Table:
    """Return the scores R as a table in percent: a row for each learned task, a column for each task scored after it.

    Args:
        document: A stream's status, as `status_document` returns it.
        width: Characters of a line of the terminal. If they have no room for all tasks, or if there are more than
            MOST, only the newest tasks are shown; the mean of the others is the column "earlier".
    """
    tasks, scores, learned = document["tasks"], document["scores"], document["learned"]
    hidden = learned - len(tasks)  # tasks that the document leaves out
    first = _first_shown([(task["t"], task["name"]) for task in tasks], width)
    title = "score on each task after each task, in %"
    title += f", newest {len(tasks) - first} of {learned:,}" if first or hidden else ""
    title += " (--json: all)" if first and not hidden else ""
    table = Table(title=title, title_justify="left", title_style="bold")
    table.add_column("after learning", no_wrap=True)
    if first:
        table.add_column("earlier", justify="right")
    for task in tasks[first:]:
        table.add_column(task["name"], justify="right", no_wrap=True)
    table.add_column("average", justify="right")
    for at, (task, row) in enumerate(zip(tasks[first:], scores[first:], strict=True), start=first):
        cells = [Text("") if j > at else _cell(value) for j, value in enumerate(row[first:], start=first)]
        earlier = [_mean(row[:first])] if first else []
        average = _mean(row[: at + 1]) if task["average"] is None else percent(task["average"])
        table.add_row(f"{task['t']}. {task['name']}", *earlier, *cells, average)
    return table


def _first_shown(tasks: list[tuple[int, str]], width: int) -> int:
    """Return the index of the first task to show, so that it and all later ones fit into the width."""
    shown: list[str] = []
    for _, name in reversed(tasks[-MOST:]):
        more = [name, *shown]
        label = max(len("after learning"), *(len(f"{tasks[-1][0]}. {each}") for each in more))
        needed = label + 4 + sum(max(len(each), len("100.0")) + 3 for each in [*more, "average", "earlier"])
        if shown and needed > width:
            break
        shown = more
    return len(tasks) - len(shown)


def _mean(row: list[float | None]) -> str:
    known = [value for value in row if value is not None]
    return percent(sum(known) / len(known)) if known else "-"


def _cell(value: float | None) -> Text:
    if value is None:
        return Text("-", style="dim")
    style = "green" if value >= 0.8 else "yellow" if value >= 0.5 else "red"
    return Text(percent(value), style=style)


def percent(value: float | None) -> str:
    """Return a score in [0, 1] in percent with one decimal; "-" for None."""
    return "-" if value is None else f"{100 * value:.1f}"


def summary(document: Document) -> list[str]:
    """Return the lines under the matrix: averages, sizes, base and settings."""
    lines = []
    if document["average_accuracy"] is not None:
        mixed = " (exact match and ROUGE-L mixed)" if document["mixed_metrics"] else ""
        parts = [f"average accuracy {percent(document['average_accuracy'])} %{mixed}"]
        for name in ("backward_transfer", "forgetting"):
            if document[name] is not None:
                parts.append(f"{name.replace('_', ' ')} {100 * document[name]:+.1f} points")
        lines.append(", ".join(parts))
    count = document["learned"]
    lines.append(f"{count:,} task{'' if count == 1 else 's'} in one adapter of {document['adapter_bytes']:,} bytes")
    lines.append(
        f"kept for the next task: {document['state_bytes']:,} bytes; all arrays together:"
        f" {document['kept_bytes']:,} bytes"
    )
    if document["method"] in KEEPS_ROWS:
        lines.append(
            "this method keeps rows of its tasks in the stream, to train on them again; no export contains them"
        )
    if date := document["settings"].get("data", {}).get("date"):
        lines.append(f"prompts say the date {date} (mbf learn --date changes it)")
    lora = document["settings"]["lora"]
    keys = ", ".join(key.rpartition(".")[2] for key in lora["keys"])
    lines.append(
        f"base {document['base']['name']}, method {document['method']}, rank {lora['rank']}, scale {lora['scale']:g},"
        f" on {keys}"
    )
    return lines
