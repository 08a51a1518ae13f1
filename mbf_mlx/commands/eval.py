"""`mbf eval`: score the deployed adapter again."""

from pathlib import Path
from typing import Annotated

import typer

from mbf_mlx.commands import console
from mbf_mlx.commands.options import Json, MovedBase, StreamPath
from mbf_mlx.commands.shown import read_all, show_progress


def eval(
    stream: StreamPath,
    tasks: Annotated[
        list[Path] | None,
        typer.Argument(
            metavar="[TASK...]", help="Task files or folders; none: every task that the stream has learned."
        ),
    ] = None,
    model: MovedBase = None,
    score_rows: Annotated[
        int, typer.Option("--score-rows", metavar="N", help="Score each task on its first N test rows; 0: all rows.")
    ] = 0,
    json: Json = False,
) -> None:
    """Score the deployed adapter again, on what was learned or on other tasks.

    Example: mbf eval assistant mail.jsonl
    """
    from mbf_mlx.api import Stream

    read = read_all(tasks or [])
    opened = Stream.open(stream, base=model)
    with show_progress() as events:
        result = opened.evaluate(*read, events=events, score_rows=score_rows)
    if json:
        console.print_json(result)
        return
    from rich.table import Table

    from mbf_mlx.report.terminal import percent

    table = Table("task", "metric", "score, %", "loss", "rows")
    for task in result["tasks"]:
        loss = "-" if task["loss"] is None else f"{task['loss']:.4f}"
        table.add_row(task["name"], task["metric"], percent(task["score"]), loss, str(task["rows"]))
    console.out.print(table)
    if result["average_accuracy"] is not None:
        console.out.print(f"average accuracy {percent(result['average_accuracy'])} %")
