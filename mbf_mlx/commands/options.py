"""Arguments and options that several commands share, and what reads their text."""

import difflib
import json
from pathlib import Path
from typing import Annotated, Any

import typer

from mbf_mlx.commands.help import MEMORY, OTHER
from mbf_mlx.errors import InputError
from mbf_mlx.files.documents import toml


def read_config(ctx: typer.Context, path: Path | None) -> Path | None:
    """Make the values of a TOML file the defaults of this command; flags on the command line win.

    Raises:
        InputError: the file is missing or not TOML, or names a flag that the command does not have.
    """
    if path is None:
        return None

    values = toml(path, "--config takes a TOML file with the names of the flags")
    known = {p.name for p in ctx.command.params if p.param_type_name == "option" and p.name not in (None, "config")}
    defaults: dict[str, Any] = {}
    for key, value in values.items():
        name = key.replace("-", "_")
        if name not in known:
            near = difflib.get_close_matches(name, [str(k) for k in known], n=1)
            hint = f"; did you mean {near[0]}?" if near else ""
            raise InputError(f"{path}: unknown setting {key!r}{hint}\nhint: mbf {ctx.info_name} --help names them all")
        defaults[name] = ",".join(map(str, value)) if isinstance(value, list) else value
    ctx.default_map = {**(ctx.default_map or {}), **defaults}
    return path


def options_of(text: str | None) -> dict[str, Any] | None:
    """Return a method's options from "key=value,key=value"; a value that is not JSON is a word.

    Raises:
        InputError: a part without a key or a value.
    """
    if text is None:
        return None
    found: dict[str, Any] = {}
    for part in text.split(","):
        key, equals, value = (piece.strip() for piece in part.partition("="))
        if not key or not equals or not value:
            raise InputError(f"--method-options: expected KEY=VALUE,KEY=VALUE, got {part.strip()!r}")
        try:
            found[key.replace("-", "_")] = json.loads(value)
        except ValueError:
            found[key.replace("-", "_")] = value
    return found


def words_of(text: str) -> tuple[str, ...]:
    """Return the parts of a comma-separated flag, without spaces around them and without empty ones."""
    return tuple(word.strip() for word in text.split(",") if word.strip())


StreamPath = Annotated[Path, typer.Argument(metavar="STREAM", help="Folder of the stream.")]
NewStreamPath = Annotated[
    Path, typer.Argument(metavar="STREAM", help="Folder of the stream; --model makes it where there is none.")
]
Base = Annotated[
    str | None,
    typer.Option(
        "--model",
        metavar="BASE",
        help="Base model: a recipe's name, an MLX or Hugging Face folder, a GGUF file or a hub id.",
    ),
]
MovedBase = Annotated[
    str | None,
    typer.Option(
        "--model", metavar="BASE", help="Base model of the stream, if it has moved: a name, folder, file or hub id."
    ),
]
Quantize = Annotated[
    int,
    typer.Option(
        "--quantize",
        metavar="BITS",
        help="Bits for the tensors of a GGUF file whose type MLX lacks; 0: refuse such a file.",
        rich_help_panel=OTHER,
    ),
]
KeepQuantized = Annotated[
    bool,
    typer.Option(
        "--keep-quantized",
        help="On a CPU, keep the weights quantized: less memory, much slower.",
        rich_help_panel=MEMORY,
    ),
]
Config = Annotated[
    Path | None,
    typer.Option(
        "--config",
        metavar="FILE",
        help="TOML file that sets flags by their names; flags on the command line win.",
        rich_help_panel=OTHER,
        callback=read_config,
        is_eager=True,
    ),
]
Json = Annotated[bool, typer.Option("--json", help="Print the result as one JSON document.")]
System = Annotated[
    str | None, typer.Option("--system-prompt", metavar="TEXT", help="System text before the conversation.")
]
MaxTokens = Annotated[int, typer.Option("--max-tokens", "-m", metavar="N", help="Longest answer in tokens.")]
Temperature = Annotated[
    float, typer.Option("--temp", metavar="X", help="Sampling temperature; 0: always the likeliest token.")
]
TopP = Annotated[
    float,
    typer.Option(
        "--top-p",
        metavar="X",
        help="Sample from the likeliest tokens that together have this probability; 0: from all.",
    ),
]
