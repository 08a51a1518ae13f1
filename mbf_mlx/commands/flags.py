"""The flags that set a field of a settings class (config.py): what each is called, says and means, written once.

A flag has its field's name (`batch_size` is --batch-size), its field's type and its field's default. `@takes("rank",
"epochs")` gives a command those flags in the place of its parameter `given`, which then holds what the user gave.
"""

import inspect
from collections.abc import Callable
from dataclasses import dataclass, fields
from functools import partial
from typing import Annotated, Any, TypeVar, get_type_hints

import typer

from mbf_mlx.commands.help import AGAIN, LOAD, MEMORY, NEW, OTHER, SAMPLING, SAVING, TRAINING
from mbf_mlx.commands.options import words_of
from mbf_mlx.config import DataConfig, LearnConfig, LoRAConfig, ServeConfig, TrainConfig
from mbf_mlx.units import bytes_of

_FIELDS = {
    field.name: (config, field)
    for config in (LoRAConfig, DataConfig, TrainConfig, LearnConfig, ServeConfig)
    for field in fields(config)
}
C = TypeVar("C")


@dataclass(frozen=True)
class Flag:
    """What the command line says of one field of a settings class."""

    help: str
    value: str = "N"  # what stands behind the flag in the help; nothing does behind a switch
    group: str | None = None  # the heading in the help; None is the first one
    recipe: bool = False  # whether a base's recipe may have its own default
    default: str | None = None  # the default in words, where the field's own says too little
    read: Callable[[str], Any] | None = None  # makes the field's value of the text
    short: str | None = None


FLAGS = {
    # A stream's factors
    "rank": Flag("Rank of the LoRA factors; fixed when a stream is made.", recipe=True),
    "scale": Flag("Scale of the update: delta = scale * B @ A.", "X", NEW, recipe=True),
    "keys": Flag("Layers that get LoRA factors, comma-separated.", "NAME,...", NEW, recipe=True, read=words_of),
    "num_layers": Flag("Blocks that get LoRA factors, counted from the last; -1: all.", group=NEW),
    "dropout": Flag("Dropout on the LoRA inputs.", "X", NEW),
    "template": Flag("How a row becomes text: chat (the model's own template) or none (raw text).", "NAME", NEW),
    "date": Flag(
        "Day that the chat template writes into prompts, if it writes any; it stays with the stream.",
        "DAY",
        OTHER,
        default="the stream's, or today",
    ),
    # A task's training
    "epochs": Flag("Passes over the training rows."),
    "learning_rate": Flag("Peak learning rate.", "X", recipe=True),
    "batch_size": Flag("Rows in one forward and backward pass."),
    "max_seq_length": Flag("Most tokens of a row; the prompt of a longer row is cut."),
    "seed": Flag("Seed of the first A factors and of the order of the rows."),
    "iters": Flag("Optimizer steps, instead of --epochs.", group=TRAINING),
    "grad_accumulation_steps": Flag("Forward and backward passes in one optimizer step.", group=TRAINING),
    "warmup": Flag("Share of the steps in which the learning rate rises to its peak.", "X", TRAINING),
    "weight_decay": Flag("Weight decay of AdamW.", "X", TRAINING),
    "max_grad_norm": Flag("Clip gradients to this norm; 0: never.", "X", TRAINING),
    "mask_prompt": Flag("Train on the answers only, not on the prompts.", group=TRAINING),
    "val_every": Flag("Optimizer steps between two validations; 0: one an epoch.", group=TRAINING),
    "patience": Flag("Stop training after N validations without a better loss; 0: never.", group=TRAINING),
    "throttle": Flag("Seconds of rest after each optimizer step, for a machine that gets hot.", "X", MEMORY),
    "guard": Flag("Stop a run whose loss explodes.", group=TRAINING),
    "grad_checkpoint": Flag("Compute activations twice: less memory, more time.", group=MEMORY),
    "precision": Flag(
        "Products with the base's weights on a CPU: float32 or bfloat16.",
        "NAME",
        MEMORY,
        default="auto: what is faster here",
    ),
    "memory_limit": Flag(
        "Most memory that the run may take, such as 6GB; it stops before it takes more.",
        "SIZE",
        MEMORY,
        default="80 % of what is available",
        read=partial(bytes_of, where="--memory-limit"),
    ),
    "save_every": Flag(
        "How often to save, so that a killed run resumes exactly: 200 (steps), 60s (seconds) or 0 (never).",
        "EVERY",
        SAVING,
    ),
    "score_tasks": Flag(
        "After each task, score only the newest N tasks; 0: all, of more than 100 the newest 50 and others in turns.",
        group=SAVING,
    ),
    "score_rows": Flag("Score these tasks on their first N test rows, now and later; 0: all rows.", group=SAVING),
    "again": Flag("Learn a task again that the stream has learned already.", group=AGAIN),
    "restart": Flag("Start an interrupted task over; what it has saved is dropped.", group=AGAIN),
    # A server
    "host": Flag("Address to listen on; other addresses than the default let other machines in.", "ADDRESS"),
    "port": Flag("Port to listen on; 0: any free port."),
    "allowed_origins": Flag(
        "Web pages that may call the server, comma-separated; *: all.",
        "ORIGIN,...",
        default="none",
        read=words_of,
        short="--cors",
    ),
    "allow_host": Flag(
        "Other names that the server answers to, comma-separated.", "NAME,...", default="none", read=words_of
    ),
    "api_key": Flag("Key that a request must bring as a bearer token.", "KEY", default="$MBF_API_KEY, or none"),
    "no_key": Flag("Let everybody in without a key, also where --host lets other machines in."),
    "max_seconds": Flag("Longest time of an answer in seconds; then it ends where it is.", group=LOAD),
    "max_connections": Flag("Open connections; more are turned away.", group=LOAD),
    "max_tokens": Flag("Longest answer in tokens.", group=SAMPLING, short="-m"),
    "temp": Flag("Sampling temperature; 0: always the likeliest token.", "X", SAMPLING),
    "top_p": Flag("Sample from the likeliest tokens that together have this probability.", "X", SAMPLING),
    "top_k": Flag("Sample from the N likeliest tokens; 0: from all.", group=SAMPLING),
    "min_p": Flag("Leave out tokens less likely than this share of the likeliest one.", "X", SAMPLING),
    "max_request_bytes": Flag("Largest request in bytes; larger ones are refused.", group=LOAD),
    "decode_concurrency": Flag("Answers written at the same time.", group=LOAD),
    "prompt_concurrency": Flag("Prompts read at the same time.", group=LOAD),
    "prefill_step_size": Flag("Tokens of a prompt read in one step.", group=LOAD),
    "prompt_cache_size": Flag("Conversations whose prompts stay in memory.", group=LOAD),
    "prompt_cache_bytes": Flag("Most bytes that remembered prompts may take.", group=LOAD, default="no limit"),
}


class Given:
    """What the user gave of a command's flags, by field; None where a flag was not given."""

    def __init__(self, values: dict[str, Any]) -> None:
        self._values = values

    def __getitem__(self, field: str) -> Any:
        return self._values[field]

    def fields_of(self, config: type[Any]) -> dict[str, Any]:
        """Return the fields of a settings class that the user gave."""
        names = {field.name for field in fields(config)}
        return {name: value for name, value in self._values.items() if name in names and value is not None}

    def make(self, config: type[C], **others: Any) -> C:
        """Return the settings: what the user gave, `others`, and the class's defaults.

        Raises:
            InputError: a value that does not fit.
        """
        return config(**self.fields_of(config), **others)


class _WithFlags:
    """A command that typer calls with every flag, and that passes those of `names` on as one `given`."""

    def __init__(self, command: Callable[..., None], names: tuple[str, ...]) -> None:
        self._command, self._names = command, names
        self.__name__, self.__doc__, self.__module__ = command.__name__, command.__doc__, command.__module__
        shown: list[inspect.Parameter] = []
        for parameter in inspect.signature(command).parameters.values():
            shown += [_parameter(name) for name in names] if parameter.name == "given" else [parameter]
        keywords = [parameter.replace(kind=inspect.Parameter.KEYWORD_ONLY) for parameter in shown]
        self.__signature__ = inspect.Signature(keywords)
        self.__annotations__ = {parameter.name: parameter.annotation for parameter in keywords}

    def __call__(self, **values: Any) -> None:
        texts = {name: values.pop(name) for name in self._names}
        self._command(**values, given=Given({name: _read(name, text) for name, text in texts.items()}))


def takes(*names: str) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Give a command the named flags, in this order, where its signature has `given: Given`."""
    return lambda command: _WithFlags(command, names)


def _parameter(name: str) -> inspect.Parameter:
    """Return a flag as typer reads it from a signature. Its default is None, so that "not given" can be told."""
    flag, (config, field) = FLAGS[name], _FIELDS[name]
    hint = str if flag.read else get_type_hints(config)[name]
    switch = hint is bool
    default = ("on" if field.default else None) if switch else flag.default or _said(field.default)
    if default and flag.recipe:
        default = f"the recipe's, or {default}"
    option = typer.Option(
        *_declared(name, flag.short, both=switch and field.default is True),
        help=flag.help + (f" [default: {default}]" if default else ""),
        metavar=None if switch else flag.value,
        rich_help_panel=flag.group,
        show_default=False,
    )
    return inspect.Parameter(
        name, inspect.Parameter.KEYWORD_ONLY, default=None, annotation=Annotated[hint | None, option]
    )


def _declared(name: str, short: str | None, *, both: bool) -> list[str]:
    bare = name.replace("_", "-")
    return [f"--{bare}/--no-{bare}" if both else f"--{bare}", *([short] if short else [])]


def _said(default: Any) -> str:
    if isinstance(default, tuple):
        return ",".join(default)
    return f"{default:g}" if isinstance(default, float) else "" if default is None else str(default)


def _read(name: str, text: Any) -> Any:
    read = FLAGS[name].read
    return text if read is None or text is None else read(text)
