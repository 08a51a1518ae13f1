"""`mbf learn`: learn tasks, in order, into a stream."""

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from mbf_mlx.commands import console
from mbf_mlx.commands.flags import Given, takes
from mbf_mlx.commands.help import MEMORY, NEW
from mbf_mlx.commands.options import Base, Config, Json, KeepQuantized, NewStreamPath, Quantize, options_of
from mbf_mlx.commands.shown import print_status, read_all, show_progress
from mbf_mlx.config import DataConfig, LearnConfig, LoRAConfig, TrainConfig
from mbf_mlx.errors import InputError

if TYPE_CHECKING:
    from mbf_mlx.api import Stream
    from mbf_mlx.learning.team import Team

# In the order of the help: what most people set, then group by group.
_FLAGS = (
    *("epochs", "learning_rate", "batch_size", "max_seq_length", "rank", "seed"),
    *("scale", "keys", "num_layers", "dropout", "template"),
    *("iters", "grad_accumulation_steps", "warmup", "weight_decay", "max_grad_norm", "mask_prompt"),
    *("val_every", "patience", "guard", "grad_checkpoint", "precision", "memory_limit", "throttle"),
    *("save_every", "score_tasks", "score_rows", "again", "restart", "date"),
)


@takes(*_FLAGS)
def learn(
    stream: NewStreamPath,
    tasks: Annotated[
        list[Path], typer.Argument(metavar="TASK...", help="Task files or folders, learned in this order.")
    ],
    *,
    model: Base = None,
    name: Annotated[
        str | None,
        typer.Option("--name", metavar="NAME", help="Name of the task, instead of its file's name (one task only)."),
    ] = None,
    method: Annotated[
        str | None,
        typer.Option(
            "--method",
            metavar="NAME",
            help="Continual method of a new stream: anchored, slao (the paper's), replay and more. [default: anchored]",
        ),
    ] = None,
    method_options: Annotated[
        str | None,
        typer.Option(
            "--method-options",
            metavar="NAME=VALUE,...",
            hidden=True,
            help="Options of the method itself, for experiments: start_a=keep,weight=0.5.",
            rich_help_panel=NEW,
        ),
    ] = None,
    given: Given,
    keep_quantized: KeepQuantized = False,
    keep_awake: Annotated[
        bool | None,
        typer.Option(
            "--keep-awake/--no-keep-awake",
            help="On a Mac, prevent idle sleep while it learns. [default: on]",
            show_default=False,
            rich_help_panel=MEMORY,
        ),
    ] = None,
    quantize: Quantize = 0,
    config: Config = None,
    json: Json = False,
) -> None:
    """Learn tasks, in order, into a stream; each is merged, scored and committed before the next one starts.

    Example: mbf learn assistant mail.jsonl notes/ --model smollm2-135m-instruct
    """
    from mbf_mlx.api import Stream
    from mbf_mlx.device.awake import kept_awake
    from mbf_mlx.learning.team import joined

    if given["epochs"] is not None and given["iters"] is not None:
        raise InputError("--epochs and --iters: expected one of them, got both; --iters counts optimizer steps")
    if quantize and model is None:
        raise InputError("--quantize: expected --model with a GGUF file beside it, got none")
    settings = given.make(LearnConfig, train=given.make(TrainConfig), data=given.make(DataConfig))
    given.make(LoRAConfig)  # checks them before anything is read
    with joined() as team:
        if team is not None and team.rank:
            _work(team, model, quantize)
            return
        read = read_all(tasks, name)
        opened = Stream.open(
            stream,
            base=model,
            method=method,
            method_options=options_of(method_options),
            lora=given.fields_of(LoRAConfig),
            template=given["template"],
            seed=settings.train.seed,
            keep_quantized=keep_quantized,
            quantize=quantize,
            report=console.err.print,
        )
        for flag, why in _without_effect(opened, keep_quantized, keep_awake):
            console.warn(f"{flag} without effect: {why}")
        rate = given["learning_rate"] or opened.learning_rate
        with opened.folder.kept_if_used(), kept_awake(keep_awake is not False), show_progress() as events:
            opened.learn(*read, config=settings, events=events, team=team, learning_rate=rate)
    if json:
        console.print_json(opened.status())
    else:
        print_status(opened.status())


def _without_effect(stream: "Stream", keep_quantized: bool, keep_awake: bool | None) -> Iterator[tuple[str, str]]:
    """Yield the flags that do nothing with this stream or on this machine, each with the reason."""
    if keep_quantized and stream.folder.identity.base.quantization == "none":
        yield "--keep-quantized", "the base's weights are not quantized"
    if keep_awake and sys.platform != "darwin":
        yield "--keep-awake", "it works on a Mac only"


def _work(team: "Team", base: str | None, quantize: int) -> None:
    """Be one of the processes that mlx.launch has started beside the first."""
    from functools import partial

    from mbf_mlx.base.sources import resolve_base
    from mbf_mlx.learning.worker import work

    work(team, partial(resolve_base, quantize=quantize), base)
