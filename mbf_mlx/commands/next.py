"""`mbf next`: the start of the next task, to be trained elsewhere."""

from pathlib import Path
from typing import Annotated

import typer

from mbf_mlx import units
from mbf_mlx.commands import console
from mbf_mlx.commands.options import Base, Json, Quantize


def next(
    stream: Annotated[Path, typer.Argument(help="The stream's folder; made with --model where it is not there.")],
    place: Annotated[Path, typer.Argument(metavar="OUT", help="The adapter folder to make.")],
    kind: Annotated[str, typer.Option("--format", help="Whose layout: peft or mlx.")] = "peft",
    model: Base = None,
    quantize: Quantize = 0,
    method: Annotated[
        str | None, typer.Option("--method", help="A new stream's continual method [default: slao].")
    ] = None,
    rank: Annotated[int | None, typer.Option("--rank", help="A new stream's rank.")] = None,
    scale: Annotated[float | None, typer.Option("--scale", help="A new stream's scale: delta = scale * B @ A.")] = None,
    keys: Annotated[str | None, typer.Option("--keys", help="A new stream's layers, by comma.")] = None,
    num_layers: Annotated[int | None, typer.Option("--num-layers", help="A new stream's blocks from the last.")] = None,
    template: Annotated[str | None, typer.Option("--template", help="A new stream's template: chat or none.")] = None,
    seed: Annotated[int, typer.Option("--seed", help="Of a new stream's first A.")] = 0,
    force: Annotated[bool, typer.Option("--force", help="Replace an earlier start.")] = False,
    json: Json = False,
) -> None:
    """Write the adapter that the next task starts from, for PEFT, Unsloth, axolotl, LLaMA-Factory or mlx-lm to train.

    Example: mbf next assistant start --format peft
    """
    from mbf_mlx.api import Stream
    from mbf_mlx.commands.options import lora_of
    from mbf_mlx.exchange import next_start, wants_rows
    from mbf_mlx.export.adapter_folder import write_files

    opened = Stream.open(
        stream,
        base=model,
        method=method,
        lora=lora_of(rank=rank, scale=scale, keys=keys, num_layers=num_layers),
        template=template,
        seed=seed,
        quantize=quantize,
        load=False,
        report=console.err.print,
    )
    with opened.folder.kept_if_used():
        files = next_start(opened.folder, kind)
        written = write_files(files, place, force=force, forbidden=(stream,))
    t = opened.folder.current().manifest.t + 1
    if json:
        console.print_json({"out": str(place), "format": kind, "task": t, "bytes": written})
        return
    console.out.print(f"{place}: the start of task {t}, {units.size(written)}, as {kind} reads it")
    rows = " --task ROWS" if wants_rows(opened.folder) else ""
    console.out.print(f"train it with rank and scale as they are, then: mbf absorb {stream} TUNED --name NAME{rows}")
