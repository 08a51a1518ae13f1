"""`mbf next`: write the start of the next task, which is then trained elsewhere."""

from pathlib import Path
from typing import Annotated

import typer

from mbf_mlx import units
from mbf_mlx.commands import console
from mbf_mlx.commands.flags import Given, takes
from mbf_mlx.commands.options import Base, Json, NewStreamPath, Quantize
from mbf_mlx.config import LoRAConfig, TrainConfig
from mbf_mlx.errors import quoted


@takes("rank", "seed", "scale", "keys", "num_layers", "template")
def next(
    stream: NewStreamPath,
    place: Annotated[Path, typer.Argument(metavar="OUT", help="Adapter folder to make.")],
    *,
    kind: Annotated[
        str, typer.Option("--format", metavar="NAME", help="Layout of the adapter: peft or mlx (mlx-lm's).")
    ] = "peft",
    model: Base = None,
    quantize: Quantize = 0,
    method: Annotated[
        str | None,
        typer.Option("--method", metavar="NAME", help="Continual method of a new stream. [default: slao]"),
    ] = None,
    given: Given,
    force: Annotated[bool, typer.Option("--force", help="Replace an earlier start.")] = False,
    json: Json = False,
) -> None:
    """Write the adapter that the next task starts from, for PEFT, Unsloth, axolotl, LLaMA-Factory or mlx-lm to train.

    Example: mbf next assistant start --format peft
    """
    from mbf_mlx.api import Stream
    from mbf_mlx.exchange import next_start, wants_rows
    from mbf_mlx.export.adapter_folder import write_files

    given.make(LoRAConfig)  # checks the values
    opened = Stream.open(
        stream,
        base=model,
        method=method,
        lora=given.fields_of(LoRAConfig),
        template=given["template"],
        seed=given.make(TrainConfig).seed,
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
    console.out.print(
        f"train it without changing its rank and scale, then: mbf absorb {quoted(stream)} TUNED --name NAME{rows}"
    )
