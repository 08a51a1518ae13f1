"""`mbf absorb`: merge an adapter tuned elsewhere."""

from pathlib import Path
from typing import Annotated

import typer

from mbf_mlx.commands import console
from mbf_mlx.commands.options import Base, Json


def absorb(
    stream: Annotated[Path, typer.Argument(help="The stream's folder.")],
    adapter: Annotated[Path, typer.Argument(help="The tuned adapter's folder, in PEFT's or mlx-lm's layout.")],
    name: Annotated[str, typer.Option("--name", help="The task's name.")],
    task: Annotated[
        Path | None,
        typer.Option("--task", help="Its task file, to be scored on later; anchored measures its inputs."),
    ] = None,
    model: Base = None,
    again: Annotated[bool, typer.Option("--again", help="Absorb under a name that the stream has already.")] = False,
    force: Annotated[bool, typer.Option("--force", help="Absorb what does not look trained from our start.")] = False,
    json: Json = False,
) -> None:
    """Merge an adapter that was tuned elsewhere from `mbf next`, as the stream's next task.

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
