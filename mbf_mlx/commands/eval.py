"""`mbf eval`: score the deployed adapter again."""

from pathlib import Path
from typing import Annotated

import typer

from mbf_mlx.commands import console
from mbf_mlx.commands.options import Base, Json
from mbf_mlx.commands.shown import read_all, show_progress


def eval(
    stream: Annotated[Path, typer.Argument(help="The stream's folder.")],
    tasks: Annotated[list[Path] | None, typer.Argument(help="Task files or folders; none: all it has learned.")] = None,
    model: Base = None,
    score_rows: Annotated[int, typer.Option("--score-rows", help="Score N rows of each; 0: all.")] = 0,
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
