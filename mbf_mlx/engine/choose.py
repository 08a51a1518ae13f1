"""Chooses the engine for a model, once: the only place that decides between the two."""

from mlx import nn

from mbf_mlx.device.backend import is_on_cpu
from mbf_mlx.device.budgets import LOGITS_BYTES
from mbf_mlx.engine import llama_pass
from mbf_mlx.engine.by_hand import ByHand
from mbf_mlx.engine.engine import Engine
from mbf_mlx.engine.through_mlx import ThroughMlx


def prepare(
    model: nn.Module,
    *,
    checkpoint: bool = False,
    logits_bytes: int = LOGITS_BYTES,
    by_hand: bool | None = None,
    compiled: bool | None = None,
) -> Engine:
    """Return the engine for a model with LoRA layers attached.

    Args:
        model: A model as mlx-lm loads it.
        checkpoint: Recompute a block's activations in the backward pass instead of keeping them.
        logits_bytes: How much memory logits may take at a time.
        by_hand: Whether llama_pass.py computes the pass. None: on a CPU, if it fits the model.
        compiled: Whether mlx-lm's pass is compiled for training. None: on a GPU.
    """
    on_cpu = is_on_cpu()
    if by_hand is None:
        by_hand = on_cpu and llama_pass.fits(model)
    if by_hand:
        return ByHand(model, checkpoint=checkpoint, logits_bytes=logits_bytes)
    compiled = not on_cpu if compiled is None else compiled
    return ThroughMlx(model, checkpoint=checkpoint, logits_bytes=logits_bytes, compiled=compiled)
