"""`mbf learn`: learn tasks, in order, into a stream."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from mbf_mlx.commands import console
from mbf_mlx.commands.options import Base, Config, Json, Quantize, bytes_of, lora_of, options_of
from mbf_mlx.commands.shown import read_all, show_progress
from mbf_mlx.config import DataConfig, LearnConfig, LoRAConfig, TrainConfig

if TYPE_CHECKING:
    pass

_LORA, _TRAIN, _DATA = LoRAConfig(), TrainConfig(), DataConfig()
_NEW, _TASK, _SCORE = "A new stream's", "Training", "Scoring and saving"


def _option(flag: str, text: str, panel: str, default: Any = None) -> Any:
    shown = f" [default: {default}]" if default is not None else ""
    return typer.Option(flag, help=text + shown, rich_help_panel=panel, show_default=default is None)


def _tried(default: Any) -> str:
    return f"the recipe's, or {default}"


def learn(
    stream: Annotated[Path, typer.Argument(help="The stream's folder; made with --model where it is not there.")],
    tasks: Annotated[list[Path], typer.Argument(help="Task files or folders, learned in this order.")],
    model: Base = None,
    quantize: Quantize = 0,
    name: Annotated[str | None, typer.Option(help="The task's name, in place of its file's (one task only).")] = None,
    method: Annotated[
        str | None,
        _option(
            "--method",
            "Continual method: slao is the paper's; products, sequential, replay and more.",
            _NEW,
            "anchored",
        ),
    ] = None,
    method_options: Annotated[
        str | None,
        typer.Option(
            "--method-options", hidden=True, help="The method's own, for experiments: start_a=keep,weight=0.5."
        ),
    ] = None,
    rank: Annotated[int | None, _option("--rank", "Rank of the factors.", _NEW, _tried(_LORA.rank))] = None,
    scale: Annotated[float | None, _option("--scale", "delta = scale * B @ A.", _NEW, _tried(_LORA.scale))] = None,
    keys: Annotated[
        str | None, _option("--keys", "Layers that get factors, by comma.", _NEW, _tried(",".join(_LORA.keys)))
    ] = None,
    num_layers: Annotated[int | None, _option("--num-layers", "Blocks from the last; -1 is all.", _NEW, -1)] = None,
    dropout: Annotated[float | None, _option("--dropout", "Of the factors' inputs.", _NEW, _LORA.dropout)] = None,
    template: Annotated[
        str | None, _option("--template", "chat: the model's own; none: raw text.", _NEW, _DATA.template)
    ] = None,
    epochs: Annotated[int, _option("--epochs", "Passes over the rows.", _TASK)] = _TRAIN.epochs,
    iters: Annotated[int | None, _option("--iters", "Optimizer steps, in place of epochs.", _TASK)] = None,
    batch_size: Annotated[int, _option("--batch-size", "Rows of a pass.", _TASK)] = _TRAIN.batch_size,
    grad_accumulation_steps: Annotated[
        int, _option("--grad-accumulation-steps", "Passes of an optimizer step.", _TASK)
    ] = _TRAIN.grad_accumulation_steps,
    learning_rate: Annotated[
        float | None, _option("--learning-rate", "Its peak.", _TASK, _tried(f"{_TRAIN.learning_rate:g}"))
    ] = None,
    warmup: Annotated[float, _option("--warmup", "Share of the steps that warm up.", _TASK)] = _TRAIN.warmup,
    weight_decay: Annotated[float, _option("--weight-decay", "AdamW's.", _TASK)] = _TRAIN.weight_decay,
    max_grad_norm: Annotated[
        float, _option("--max-grad-norm", "Longer gradients are shortened; 0 never.", _TASK)
    ] = _TRAIN.max_grad_norm,
    grad_checkpoint: Annotated[
        bool, _option("--grad-checkpoint", "Less memory, more time.", _TASK)
    ] = _TRAIN.grad_checkpoint,
    max_seq_length: Annotated[
        int, _option("--max-seq-length", "Tokens of a row at most.", _TASK)
    ] = _DATA.max_seq_length,
    mask_prompt: Annotated[
        bool, typer.Option("--mask-prompt/--no-mask-prompt", help="Supervise answers alone.", rich_help_panel=_TASK)
    ] = _DATA.mask_prompt,
    val_every: Annotated[
        int, _option("--val-every", "Steps between validations; 0: an epoch.", _TASK)
    ] = _TRAIN.val_every,
    patience: Annotated[
        int, _option("--patience", "Validations without a better one that end training; 0 never.", _TASK)
    ] = _TRAIN.patience,
    seed: Annotated[int, _option("--seed", "Of the first A and of the rows' order.", _TASK)] = _TRAIN.seed,
    guard: Annotated[
        bool, typer.Option("--guard/--no-guard", help="Stop when the loss explodes.", rich_help_panel=_TASK)
    ] = True,
    save_every: Annotated[
        str, _option("--save-every", "Save for an exact resume: 200 (steps) or 60s; 0 never.", _SCORE)
    ] = _TRAIN.save_every,
    score_tasks: Annotated[int, _option("--score-tasks", "Score the newest N tasks; 0 all.", _SCORE)] = 0,
    score_rows: Annotated[
        int, _option("--score-rows", "Score these tasks on N test rows, now and later; 0 all.", _SCORE)
    ] = 0,
    memory_limit: Annotated[
        str | None,
        _option("--memory-limit", "Stop before taking more, as 6GB; else 80 % of what is available.", _SCORE),
    ] = None,
    again: Annotated[bool, typer.Option("--again", help="Learn a task once more that the stream has.")] = False,
    restart: Annotated[bool, typer.Option("--restart", help="Drop what an interrupted run has done.")] = False,
    keep_quantized: Annotated[
        bool, typer.Option("--keep-quantized", help="On a CPU: keep quantized weights; less memory, much slower.")
    ] = False,
    keep_awake: Annotated[
        bool, typer.Option("--keep-awake/--no-keep-awake", help="On a Mac: no idle sleep while it learns.")
    ] = True,
    config: Config = None,
    json: Json = False,
) -> None:
    """Learn tasks, in order, into a stream; each is merged, scored and committed before the next one starts.

    Example: mbf learn assistant mail.jsonl notes/ --model smollm2-135m-instruct
    """
    from mbf_mlx.api import Stream
    from mbf_mlx.device.awake import kept_awake
    from mbf_mlx.learning.team import joined

    train = TrainConfig(
        epochs=epochs,
        iters=iters,
        batch_size=batch_size,
        grad_accumulation_steps=grad_accumulation_steps,
        learning_rate=_TRAIN.learning_rate if learning_rate is None else learning_rate,
        warmup=warmup,
        weight_decay=weight_decay,
        max_grad_norm=max_grad_norm,
        grad_checkpoint=grad_checkpoint,
        val_every=val_every,
        patience=patience,
        seed=seed,
        save_every=save_every,
    )
    settings = LearnConfig(
        train=train,
        data=DataConfig(max_seq_length=max_seq_length, mask_prompt=mask_prompt),
        score_tasks=score_tasks,
        score_rows=score_rows,
        again=again,
        restart=restart,
        guard=guard,
        memory_limit=bytes_of(memory_limit, "--memory-limit") if memory_limit else 0,
    )
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
            lora=lora_of(rank=rank, scale=scale, keys=keys, num_layers=num_layers, dropout=dropout),
            template=template,
            seed=seed,
            keep_quantized=keep_quantized,
            quantize=quantize,
            report=console.err.print,
        )
        overrides: dict[str, Any] = {"learning_rate": opened.learning_rate} if learning_rate is None else {}
        with opened.folder.kept_if_used(), kept_awake(keep_awake), show_progress() as events:
            opened.learn(*read, config=settings, events=events, team=team, **overrides)
    document = opened.status()
    if json:
        console.print_json(document)
        return
    from mbf_mlx.report.terminal import matrix, summary

    console.out.print(matrix(document, console.out.width))
    for line in summary(document):
        console.out.print(line)


def _work(team: Any, base: str | None, quantize: int) -> None:
    """Be one of the processes that mlx.launch has started beside the first."""
    from functools import partial

    from mbf_mlx.base.sources import resolve_base
    from mbf_mlx.learning.worker import work

    work(team, partial(resolve_base, quantize=quantize), base)
