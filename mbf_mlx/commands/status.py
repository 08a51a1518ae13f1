"""`mbf status`: a stream's tasks, scores and sizes."""

from typing import Annotated

import typer

from mbf_mlx.commands import console
from mbf_mlx.commands.options import Json, StreamPath
from mbf_mlx.commands.shown import print_status


def status(
    stream: StreamPath,
    verify: Annotated[bool, typer.Option("--verify", help="Check every byte of the stream.")] = False,
    repair: Annotated[
        bool, typer.Option("--repair", help="Go back to the newest generation that is undamaged.")
    ] = False,
    json: Json = False,
) -> None:
    """Show a stream's tasks, its matrix of scores, its sizes and where it stands.

    Example: mbf status assistant
    """
    from mbf_mlx.stream import repair as repairs
    from mbf_mlx.stream.folder import StreamFolder
    from mbf_mlx.stream.status import status_document  # not through api.py, which would load NumPy

    if repair:
        console.err.print(repairs.repair(stream))
    folder = StreamFolder.open(stream)
    if verify:
        repairs.verify_all(folder)
        console.err.print("every byte is what was committed")
    document = status_document(folder)
    if json:
        console.print_json(document)
        return
    print_status(document)
    if document["damaged"]:
        console.warn(document["damaged"])
    if document["interrupted"]:
        run = document["interrupted"]
        console.out.print(
            f"interrupted: {run['task']} after step {run['step']}; the same mbf learn continues from there"
        )
