"""`mbf fetch`: put a base model from a recipe into models/, or list the recipes."""

from typing import Annotated, Any

import typer

from mbf_mlx import units
from mbf_mlx.commands.console import err, out, print_json
from mbf_mlx.commands.options import Json


def fetch(
    name: Annotated[
        str | None, typer.Argument(metavar="[NAME]", help="Name of a recipe; without one the recipes are listed.")
    ] = None,
    offline: Annotated[
        bool, typer.Option("--offline", help="Download nothing; use only what this machine has.")
    ] = False,
    json: Json = False,
) -> None:
    """Put a base model from a recipe into models/ (or $MBF_MODELS). Without a name, list the recipes.

    Example: mbf fetch smollm2-135m-instruct
    """
    from mbf_mlx.base import sources
    from mbf_mlx.base.recipe import recipes
    from mbf_mlx.errors import InputError

    known = recipes()
    if name is None:
        _list(known, json)
        return
    if name not in known:
        raise InputError(
            f"{name}: no such recipe: expected one of {', '.join(known)}\nhint: mbf learn --model takes hub ids, too"
        )
    folder = sources.fetch(known[name], offline=offline, report=err.print)
    if json:
        print_json({"name": name, "path": str(folder), "licence": known[name].licence})
    else:
        out.print(f"{name} is in {folder}")


def _list(known: dict[str, Any], json: bool) -> None:
    from mbf_mlx.base.recipe import models_folder

    rows: list[dict[str, Any]] = [
        {
            "name": recipe.name,
            "summary": recipe.summary,
            "quantization": recipe.quantization,
            "licence": recipe.licence,
            "download_bytes": recipe.download_bytes,
            "run_by_us": recipe.run_by_us,
            "fetched": (models_folder() / recipe.name / "config.json").is_file(),
        }
        for recipe in known.values()
    ]
    if json:
        print_json({"recipes": rows})
        return
    for row in rows:
        state = "here" if row["fetched"] else units.size(row["download_bytes"])
        tried = "" if row["run_by_us"] else ", not run by us"
        out.print(f"{row['name']:24} {state:>8}  {row['summary']} ({row['licence']}{tried})")
