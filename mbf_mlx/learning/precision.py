"""Decides the precision of a training's products with frozen weights: float32, or bfloat16 where a CPU is faster so."""

from pathlib import Path

from mbf_mlx.base.sources import read_config, unpacked_bytes
from mbf_mlx.config import LoRAConfig, Precision, TrainConfig
from mbf_mlx.device import backend, bfloat16
from mbf_mlx.errors import InputError
from mbf_mlx.learning.learner import Learner, precision_of
from mbf_mlx.learning.team import Team


def chosen(
    config: TrainConfig, learner: Learner, team: Team | None = None, begun: Precision | None = None
) -> Precision:
    """Return the precision of a training.

    Args:
        config: The training's settings.
        learner: The base model with factors attached.
        team: The processes that share each step; all have to multiply alike, so they take float32 unless told.
        begun: The precision of the interrupted training that goes on.

    Raises:
        InputError: bfloat16 is asked for, or was begun with, and cannot be had here.
    """
    can = learner.engine.by_hand and not learner.packed
    wanted = begun if config.precision == "auto" else config.precision
    if wanted is None:
        return "bfloat16" if team is None and can and bfloat16.is_faster() else "float32"
    if wanted == "float32":
        return "float32"
    why = bfloat16.reason() if bfloat16.library() is None else ""
    if not can:
        why = "only a Llama on a CPU, without dropout and with unpacked weights, multiplies in bfloat16"
    if why and begun == "bfloat16":
        raise InputError(
            f"the interrupted run multiplies in bfloat16, and this one cannot: {why}"
            "\nhint: --restart begins the task again, in float32"
        )
    if why:
        raise InputError(f"--precision: expected auto or float32, got bfloat16: {why}")
    return "bfloat16"


def expected(config: TrainConfig, lora: LoRAConfig, folder: Path) -> Precision:
    """Return the precision that trainings on a base folder will have, without loading the base."""
    if config.precision != "auto":
        return precision_of(config)
    llama = read_config(folder).get("model_type") == "llama" and not lora.dropout
    unpacked = backend.setup().kind == "cpu" and not backend.keep_quantized(unpacked_bytes(folder))
    return "bfloat16" if llama and unpacked and bfloat16.is_faster() else "float32"
