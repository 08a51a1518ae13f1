"""`mbf plan`: the memory, time and disk that learning would take; trains nothing."""

from pathlib import Path
from typing import Annotated, Any

import typer

from mbf_mlx import units
from mbf_mlx.commands import console
from mbf_mlx.commands.flags import Given, takes
from mbf_mlx.commands.options import Config, Json, KeepQuantized, words_of
from mbf_mlx.config import DataConfig, LoRAConfig, TrainConfig
from mbf_mlx.errors import InputError

_FLAGS = (
    *("epochs", "batch_size", "max_seq_length", "rank", "keys", "num_layers"),
    *("iters", "grad_accumulation_steps", "mask_prompt", "grad_checkpoint", "precision"),
)


@takes(*_FLAGS)
def plan(
    stream: Annotated[
        Path | None, typer.Argument(metavar="STREAM", help="Folder of the stream, which need not be there yet.")
    ] = None,
    tasks: Annotated[
        list[Path] | None, typer.Argument(metavar="TASK...", help="Task files or folders that it would learn.")
    ] = None,
    *,
    model: Annotated[
        str | None,
        typer.Option(
            "--model",
            metavar="BASE",
            help="Base model of a new stream. Without a stream: one or more models, comma-separated.",
        ),
    ] = None,
    memory: Annotated[
        str | None,
        typer.Option(
            "--memory",
            metavar="SIZE",
            help="Memory of the machine, such as 16GB. Without a stream: one or more sizes, comma-separated."
            " [default: this machine's]",
        ),
    ] = None,
    device: Annotated[
        str | None,
        typer.Option(
            "--device", metavar="KIND", help="Device to plan for: cpu, metal or cuda. [default: this machine's]"
        ),
    ] = None,
    answer_tokens: Annotated[
        int | None,
        typer.Option(
            "--answer-tokens",
            metavar="N",
            help="Without tasks: tokens of a row that are trained on. [default: the whole row]",
        ),
    ] = None,
    time: Annotated[
        bool,
        typer.Option(
            "--time/--no-time", help="Try a few steps to estimate the time. [default: on]", show_default=False
        ),
    ] = True,
    given: Given,
    keep_quantized: KeepQuantized = False,
    config: Config = None,
    json: Json = False,
) -> None:
    """Say how much memory, time and disk learning would take: fits, tight or no. Trains nothing, fetches nothing.

    Without a stream, plan for models: mbf plan --model BASE --memory SIZE

    Example: mbf plan assistant mail.jsonl --model smollm2-135m-instruct
    """
    from mbf_mlx.planning.forecast import Forecaster

    given.make(LoRAConfig)  # checks the values
    forecaster = Forecaster(
        lora=given.fields_of(LoRAConfig),
        train=given.make(TrainConfig),
        data=given.make(DataConfig),
        keep_quantized=keep_quantized,
        device=device,
        answer_tokens=answer_tokens,
        time=time,
        report=console.err.print,
    )
    sizes = [units.bytes_of(size, "--memory") for size in memory.split(",")] if memory else [None]
    if stream is not None:
        document = forecaster.for_tasks(stream, tasks or [], model, sizes[0])
    elif model:
        document = {"plans": [forecaster.for_model(name, size) for name in words_of(model) for size in sizes]}
    else:
        raise InputError("expected a stream and tasks, or --model\nhint: mbf plan --help has an example")
    if json:
        console.print_json(document)
    elif stream is None:
        _print_table(document["plans"])
    else:
        _print(document)


def _print_table(plans: list[dict[str, Any]]) -> None:
    """Print which models fit into which machines."""
    from rich.table import Table

    sizes = list(dict.fromkeys(each["memory_bytes"] for each in plans))
    table = Table()
    table.add_column("model")
    table.add_column("needs", justify="right")
    for size in sizes:
        table.add_column(units.size(size), justify="right")
    for name in dict.fromkeys(each["model"] for each in plans):
        row = {each["memory_bytes"]: each for each in plans if each["model"] == name}
        needed = units.size(max(each["peak_bytes"] for each in row.values()))
        table.add_row(name, needed, *(row[size]["verdict"] for size in sizes))
    console.out.print(table)
    batch = plans[0]["batch"]
    console.out.print(
        f"for batches of {batch['rows']} rows and {batch['tokens']} tokens, {batch['supervised']} of them trained on,"
        f" on {plans[0]['device']}"
    )
    console.out.print("fits: takes at most 80 % of what the device may take; tight: takes more, up to all of it")
    for each in plans:
        if each["would_fit"]:
            ways = "; or ".join(each["would_fit"])
            console.out.print(f"{each['model']} on {units.size(each['memory_bytes'])} would fit with {ways}")


def _print(document: dict[str, Any]) -> None:
    """Print what learning tasks into a stream would take."""
    size = units.size
    for task in document.get("tasks", ()):
        console.out.print(
            f"{task['name']}: {task['rows']} rows to train on, the longest has {task['longest']} tokens;"
            f" {task['steps']} steps"
        )
    if "note" in document:
        console.out.print(f"planned for the largest batch that the settings allow: {document['note']}")
    parts = ", ".join(f"{name} {size(count)}" for name, count in document["parts"].items())
    batch = document["batch"]
    console.out.print(f"memory: {size(document['peak_bytes'])} at the peak: {parts}")
    console.out.print(
        f"        the largest batch has {batch['rows']} rows and {batch['tokens']} tokens,"
        f" {batch['supervised']} of them trained on"
    )
    if "seconds" in document:
        console.out.print(
            f"time:   {units.duration(document['seconds'])} ({document['seconds_a_step']:.2f} s a step), estimated from"
            " a short trial; scoring earlier tasks is not included"
        )
    if "disk_bytes" in document:
        console.out.print(f"disk:   {size(document['disk_bytes'])}; {size(document['disk_free_bytes'])} are free")
    console.out.print(f"{document['verdict']}: {size(document['available_bytes'])} are available on this device")
    for way in document["would_fit"]:
        console.out.print(f"would fit with {way}")
