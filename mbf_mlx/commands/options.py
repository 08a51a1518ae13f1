"""Options that several commands share: `--config`, and reading its TOML file."""

import difflib
import json
from pathlib import Path
from typing import Annotated, Any

import typer

from mbf_mlx.errors import InputError
from mbf_mlx.files.documents import toml
from mbf_mlx.units import bytes_of as bytes_of


def read_config(ctx: typer.Context, path: Path | None) -> Path | None:
    """Take a TOML file's values as this command's defaults; flags win.

    Raises:
        InputError: no such file, no TOML, or a name that is not one of the command's flags.
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


def lora_of(keys: str | None, **given: Any) -> dict[str, Any]:
    """Return the LoRA settings that flags ask for.

    Raises:
        InputError: a value that cannot be one.
    """
    from mbf_mlx.config import LoRAConfig

    chosen = {name: value for name, value in given.items() if value is not None}
    if keys is not None:
        chosen["keys"] = tuple(key.strip() for key in keys.split(",") if key.strip())
    LoRAConfig(**chosen)  # checks them
    return chosen


def options_of(text: str | None) -> dict[str, Any] | None:
    """Return a method's options from "key=value,key=value"; values are JSON where they can be read so, else words.

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


Config = Annotated[
    Path | None,
    typer.Option(
        "--config", help="TOML file with the names of the flags; flags win.", callback=read_config, is_eager=True
    ),
]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON document on stdout.")]
Base = Annotated[
    str | None,
    typer.Option("--model", help="Base model: a recipe's name, an MLX or Hugging Face folder, a GGUF file, a hub id."),
]
Quantize = Annotated[
    int, typer.Option("--quantize", help="Bits for tensors of a GGUF file whose type MLX lacks; 0 refuses the file.")
]
