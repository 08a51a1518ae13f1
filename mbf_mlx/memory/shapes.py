"""A model's and a run's shape in numbers, from a folder or a recipe."""

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from mbf_mlx.base.recipe import ModelShape, Recipe
from mbf_mlx.base.sources import read_config, unpacked_bytes, weight_files
from mbf_mlx.config import LoRAConfig
from mbf_mlx.device import machine
from mbf_mlx.errors import InputError
from mbf_mlx.files.safetensors_file import read_header
from mbf_mlx.memory.formula import Run, Shape

if TYPE_CHECKING:
    pass


SHARE = 0.8  # of what is there, up to which a plan fits; past it and up to all of it, it is tight


def shape_of_folder(folder: Path) -> Shape:
    """Return the shape of a model folder.

    Raises:
        InputError: its config.json lacks what the formula needs: an architecture that is not like a Llama.
    """
    config = read_config(folder)
    config = config.get("text_config") or config
    try:
        heads, hidden = int(config["num_attention_heads"]), int(config["hidden_size"])
        entries = [entry for path in weight_files(folder) for entry in read_header(path)[0].values()]
        grown = sum(entry.nbytes for entry in entries if entry.dtype in ("F16", "BF16"))
        return Shape(
            hidden=hidden,
            intermediate=int(config["intermediate_size"]),
            heads=heads,
            kv_heads=int(config.get("num_key_value_heads") or heads),
            head_dim=int(config.get("head_dim") or hidden // heads),
            blocks=int(config["num_hidden_layers"]),
            vocabulary=int(config["vocab_size"]),
            tied=bool(config.get("tie_word_embeddings", True)),
            file_bytes=sum(entry.nbytes for entry in entries),
            packed_bytes=sum(entry.nbytes for entry in entries) + grown,
            plain_bytes=unpacked_bytes(folder),
        )
    except (KeyError, TypeError, ValueError) as error:
        raise InputError(f"{folder}/config.json: cannot plan for this architecture: {error!r} is missing") from error


def shape_of_recipe(recipe: Recipe) -> Shape:
    """Return the shape that a recipe describes.

    Raises:
        InputError: it describes none.
    """
    facts: ModelShape | None = recipe.shape
    if facts is None:
        raise InputError(f"{recipe.name}: its recipe gives no shape\nhint: mbf fetch {recipe.name}, then plan with it")
    names = ("hidden", "intermediate", "heads", "kv_heads", "head_dim", "blocks", "vocabulary", "tied")
    shape = Shape(**{name: getattr(facts, name) for name in names}, file_bytes=0, packed_bytes=0, plain_bytes=0)
    embeddings = shape.vocabulary * shape.hidden * (1 if shape.tied else 2)
    values, norms = embeddings + shape.blocks * shape.block_values, (2 * shape.blocks + 1) * shape.hidden
    return replace(
        shape,
        # Beside its codes a group has a scale and an offset of 16 bits; a CPU holds them in 32.
        file_bytes=round(values * (facts.bits / 8 + 4 / facts.group)) + 2 * norms,
        packed_bytes=round(values * (facts.bits / 8 + 8 / facts.group)) + 4 * norms,
        plain_bytes=4 * (values + norms),
    )


def run_of(shape: Shape, lora: LoRAConfig, *, by_hand: bool, packed: bool, checkpoint: bool) -> Run:
    """Return what the formula needs of the settings.

    Args:
        shape: The model's.
        lora: Which layers get factors.
        by_hand: Whether engine/llama_pass.py will compute the pass: a Llama on a CPU.
        packed, checkpoint: As `memory.Run` has them.
    """
    return Run(
        rank=lora.rank,
        keys=tuple(key.rpartition(".")[2] for key in lora.keys),
        num_layers=lora.num_layers if lora.num_layers > 0 else shape.blocks,
        by_hand=by_hand,
        packed=packed,
        checkpoint=checkpoint,
        cores=machine.cpu_count() if by_hand else 1,
    )
