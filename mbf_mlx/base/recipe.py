"""Recipes: the base models that we recommend, one TOML file each, and where their weights come from."""

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from mbf_mlx.config import LoRAConfig
from mbf_mlx.errors import InputError
from mbf_mlx.files.documents import toml

_PACKAGE = Path(__file__).resolve().parents[1]
RECIPE_FOLDERS = (_PACKAGE / "recipes", _PACKAGE.parent / "models")  # the wheel's; a checkout's


class _Table(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class PackageSource(_Table):
    """A GGUF file inside a wheel on PyPI."""

    package: str
    version: str
    file: str  # its path inside the wheel
    sha256: str = Field(pattern="^[0-9a-f]{64}$")  # of the file


class HubSource(_Table):
    """A repository of the Hugging Face hub that holds an MLX model folder."""

    hub: str = Field(pattern="^[A-Za-z0-9_.-]+/[A-Za-z0-9_.-]+$")
    revision: str | None = None  # None is the newest


class TriedLoRA(_Table):
    """Settings with which we have trained this model."""

    rank: int
    scale: float
    keys: list[str]
    num_layers: int = -1
    learning_rate: float


class ModelShape(_Table):
    """The sizes that decide a model's memory, so that `mbf plan` can work before the model is fetched."""

    hidden: int
    intermediate: int
    heads: int
    kv_heads: int
    head_dim: int
    blocks: int
    vocabulary: int
    tied: bool  # the embedding is also the head
    bits: int
    group: int


class Recipe(_Table):
    """One base model."""

    name: str = Field(pattern="^[a-z0-9][a-z0-9.-]*$")
    summary: str
    family: str
    licence: str  # the hub's short name for it
    original: str  # the unquantized model on the hub
    quantization: str
    download_bytes: int  # approximate
    run_by_us: bool  # False: we expect it to work and have not run it
    source: PackageSource | HubSource
    shape: ModelShape | None = None
    lora: TriedLoRA | None = None


def recipes() -> dict[str, Recipe]:
    """Return all recipes by name; those that we have run come first."""
    folder = next((folder for folder in RECIPE_FOLDERS if any(folder.glob("*.toml"))), None)
    found = [read_recipe(path) for path in sorted(folder.glob("*.toml"))] if folder else []
    return {recipe.name: recipe for recipe in sorted(found, key=lambda recipe: not recipe.run_by_us)}


def read_recipe(path: Path) -> Recipe:
    """Read one recipe.

    Raises:
        InputError: not TOML, or not the fields of a recipe.
    """
    try:
        recipe = Recipe.model_validate(toml(path, "mbf fetch lists the recipes"))
    except ValidationError as error:
        problems = [f"  {'.'.join(map(str, one['loc'])) or 'recipe'}: {one['msg']}" for one in error.errors()]
        raise InputError(f"{path}: not a recipe:\n" + "\n".join(dict.fromkeys(problems))) from error
    if recipe.name != path.stem:
        raise InputError(f"{path}: name: expected {path.stem!r}, as the file is called, got {recipe.name!r}")
    return recipe


def lora_config(known: TriedLoRA | None, given: Mapping[str, Any]) -> LoRAConfig:
    """Return a new stream's settings: the given ones, then those tried with its base, then the defaults."""
    tried = known.model_dump(exclude={"learning_rate"}) if known else {}
    return LoRAConfig(**{**tried, **given})


def models_folder() -> Path:
    """Return the folder for fetched and converted models: $MBF_MODELS, or else `models` in the working folder."""
    return Path(os.environ.get("MBF_MODELS") or "models")
