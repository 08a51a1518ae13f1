"""`mbf export`: what a stream has learned, as what other programs read."""

from pathlib import Path
from typing import Annotated, Any

import typer

from mbf_mlx import units
from mbf_mlx.commands.console import err, out, print_json, progress, warn
from mbf_mlx.export import TARGETS

_TARGETS = "; ".join(f"{name}: {what}" for name, what in TARGETS.items())


def export(
    stream: Annotated[Path, typer.Argument(help="The stream's folder.")],
    target: Annotated[str, typer.Argument(help=f"{_TARGETS}.")],
    place: Annotated[Path, typer.Argument(metavar="OUT", help="The folder (for gguf: file) to make.")],
    model: Annotated[str | None, typer.Option("--model", help="The base, where it has moved.")] = None,
    bits: Annotated[
        int | None,
        typer.Option(
            "--bits", help="Of the layers that learned: 4, 5, 6 (8 where it has to be), 8 (the default), 16 or 32."
        ),
    ] = None,
    kind: Annotated[
        str | None, typer.Option("--type", help="A GGUF type, in place of --bits; mlx for LM Studio's MLX engine.")
    ] = None,
    force: Annotated[bool, typer.Option("--force", help="Replace an earlier export.")] = False,
    allow_loss: Annotated[
        bool, typer.Option("--allow-loss", help="Write an export that lost much of the update, too.")
    ] = False,
    calibration: Annotated[
        Path | None, typer.Option("--calibration", help="Rows or text to measure on, in place of the stream's tasks.")
    ] = None,
    json: Annotated[bool, typer.Option("--json", help="Print one JSON document.")] = False,
) -> None:
    """Write what a stream has learned as TARGET, open it again and say how much of it survived.

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
