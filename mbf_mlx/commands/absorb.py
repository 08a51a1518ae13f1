"""`mbf absorb`: merge an adapter tuned elsewhere."""

from pathlib import Path
from typing import Annotated

import typer

from mbf_mlx.commands import console
from mbf_mlx.commands.options import Json, MovedBase, StreamPath


def absorb(
    stream: StreamPath,
    adapter: Annotated[
        Path, typer.Argument(metavar="ADAPTER", help="Folder of the tuned adapter, in PEFT's or mlx-lm's layout.")
    ],
    name: Annotated[str, typer.Option("--name", metavar="NAME", help="Name of the task.")],
    task: Annotated[
        Path | None,
        typer.Option(
            "--task",
            metavar="TASK",
            help="File or folder with the task's rows: for scoring later, and for methods that measure inputs.",
        ),
    ] = None,
    model: MovedBase = None,
    again: Annotated[bool, typer.Option("--again", help="Absorb a task whose name the stream already has.")] = False,
    force: Annotated[
        bool, typer.Option("--force", help="Absorb an adapter that does not look trained from the stream's start.")
    ] = False,
    json: Json = False,
) -> None:
    """Merge an adapter that was trained elsewhere from the start that `mbf next` wrote, as the stream's next task.

    Example: mbf absorb assistant tuned --name mail
    """
    from mbf_mlx.api import Stream

    opened = Stream.open(stream, base=model)
    done = opened.absorb(adapter, name, task=task or "", force=force, again=again)
    for note in done.notes:
        console.warn(note)
    if json:
        console.print_json(opened.status())
        return
    console.out.print(
        f"absorbed {name} as task {done.record.t} (mean cosine of A's rows with the start: {done.cosine:.2f})"
    )
