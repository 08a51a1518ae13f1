"""The numbers that the memory formula needs: of a model, from its folder or its recipe, and of a run's settings."""

from dataclasses import replace
from pathlib import Path

from mbf_mlx.base.recipe import ModelShape, Recipe
from mbf_mlx.base.sources import read_config, unpacked_bytes, weight_files
from mbf_mlx.config import LoRAConfig
from mbf_mlx.device import machine
from mbf_mlx.errors import InputError
from mbf_mlx.files.safetensors_file import read_header
from mbf_mlx.memory.formula import Run, Shape

SHARE = 0.8  # a plan fits if it takes at most this share of the memory; with more than that it is tight


def shape_of_folder(folder: Path) -> Shape:
    """Return the shape of a model folder.

    Raises:
        InputError: its config.json lacks what the formula needs, because the architecture is not like a Llama.
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
        InputError: the recipe gives no shape.
    """
    facts: ModelShape | None = recipe.shape
    if facts is None:
        raise InputError(f"{recipe.name}: its recipe gives no shape\nhint: mbf fetch {recipe.name}, then plan with it")
    shape = Shape(
        hidden=facts.hidden,
        intermediate=facts.intermediate,
        heads=facts.heads,
        kv_heads=facts.kv_heads,
        head_dim=facts.head_dim,
        blocks=facts.blocks,
        vocabulary=facts.vocabulary,
        tied=facts.tied,
        file_bytes=0,
        packed_bytes=0,
        plain_bytes=0,
    )
    embeddings = shape.vocabulary * shape.hidden * (1 if shape.tied else 2)
    values, norms = embeddings + shape.blocks * shape.block_values, (2 * shape.blocks + 1) * shape.hidden
    return replace(
        shape,
        # Beside its codes a group has a scale and an offset: 16 bits each in the file, 32 on a CPU.
        file_bytes=round(values * (facts.bits / 8 + 4 / facts.group)) + 2 * norms,
        packed_bytes=round(values * (facts.bits / 8 + 8 / facts.group)) + 4 * norms,
        plain_bytes=4 * (values + norms),
    )


def run_of(
    shape: Shape, lora: LoRAConfig, *, by_hand: bool, packed: bool, checkpoint: bool, bfloat16: bool = False
) -> Run:
    """Return what the formula needs of the settings.

    Args:
        shape: The model's shape.
        lora: Which layers get factors.
        by_hand: Whether engine/llama_pass.py will compute the pass, as it does for a Llama on a CPU.
        packed, checkpoint, bfloat16: As `formula.Run` explains.
    """
    return Run(
        rank=lora.rank,
        keys=tuple(key.rpartition(".")[2] for key in lora.keys),
        num_layers=lora.num_layers if lora.num_layers > 0 else shape.blocks,
        by_hand=by_hand,
        packed=packed,
        checkpoint=checkpoint,
        bfloat16=bfloat16,
        cores=machine.cpu_count() if by_hand else 1,
    )
