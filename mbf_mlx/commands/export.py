"""`mbf export`: write what a stream has learned in the formats of other programs."""

from pathlib import Path
from typing import Annotated, Any

import typer

from mbf_mlx import units
from mbf_mlx.commands.console import err, out, print_json, progress, warn
from mbf_mlx.commands.options import Json, MovedBase, StreamPath
from mbf_mlx.export import TARGETS

_TARGETS = "; ".join(f"{name}: {what}" for name, what in TARGETS.items())


def export(
    stream: StreamPath,
    target: Annotated[str, typer.Argument(metavar="TARGET", help=f"{_TARGETS}.")],
    place: Annotated[Path, typer.Argument(metavar="OUT", help="Folder to make (for gguf: file).")],
    model: MovedBase = None,
    bits: Annotated[
        int | None,
        typer.Option(
            "--bits",
            metavar="N",
            help="Bits of the layers that learned: 4, 5, 6 (8 where 6 loses the update), 8, 16 or 32. [default: 8]",
        ),
    ] = None,
    kind: Annotated[
        str | None,
        typer.Option(
            "--type", metavar="TYPE", help="A GGUF type, instead of --bits; or mlx, for LM Studio's MLX engine."
        ),
    ] = None,
    force: Annotated[bool, typer.Option("--force", help="Replace an earlier export.")] = False,
    allow_loss: Annotated[
        bool, typer.Option("--allow-loss", help="Write the export even if it loses much of what was learned.")
    ] = False,
    calibration: Annotated[
        Path | None,
        typer.Option(
            "--calibration", metavar="FILE", help="Rows or text to measure on, instead of the stream's tasks."
        ),
    ] = None,
    json: Json = False,
) -> None:
    """Write what a stream has learned for another program, open the result again, and say how much of it survived.

    Example: mbf export assistant mlx assistant-fused
    """
    from mbf_mlx.api import Stream
    from mbf_mlx.export.outcome import survived

    document = Stream.open(stream, base=model).export(
        target,
        place,
        bits=bits,
        kind=kind,
        force=force,
        allow_loss=allow_loss,
        calibration=calibration,
        show=progress,
    )
    for note in document.get("notes", []):
        warn(note)
    if json:
        print_json(document)
        return
    _print(document, survived(document))


def _print(document: dict[str, Any], sentences: list[str]) -> None:
    out.print(f"{document['out']}: {document['target']}, {units.size(document['bytes'])}")
    for sentence in sentences:
        out.print(f"  {sentence}")
    for lost in document.get("lost", []):
        warn(lost)
    for command in document["next"]:
        err.print(f"next: {command}")
