"""Proof that an adapter is applied: it changes the logits of a probe."""

from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
from mlx_lm import load

from mbf_mlx.base.sources import BaseFolder
from mbf_mlx.errors import InputError
from mbf_mlx.stream.folder import StreamFolder
from mbf_mlx.stream.generations import Generation

PROBE = "The stream learns"  # what the adapter is tried on


PROBE_TOKENS = 4  # more than one: with one token nothing that q or k learned can show


def adapter_of(generation: Generation) -> str | None:
    """Return where a generation's deployed adapter is, or None where nothing was learned."""
    return str(generation.folder / "adapter") if generation.manifest.t else None


def prove_adapter(model: Any, tokenizer: Any, stream: StreamFolder, adapter: str | None) -> str:
    """Return in a sentence what answers: a model whose adapter, tried on a few tokens, changed the logits.

    Args:
        model: Loaded by mlx-lm with the adapter at `adapter`; None where the stream has learned nothing.

    Raises:
        InputError: the logits are what they are without it, or not finite.
    """
    base = stream.identity.base.name
    if adapter is None:
        return f"{base} as it is: nothing was learned yet"
    with_it = _probe(model, tokenizer)
    layers = [module for _, module in model.named_modules() if "lora_a" in module]
    scales = [layer.scale for layer in layers]
    for layer in layers:
        layer.scale = 0.0
    without = _probe(model, tokenizer)
    for layer, scale in zip(layers, scales, strict=True):
        layer.scale = scale
    change = float(np.abs(with_it - without).max())
    if not np.isfinite(change) or change == 0:
        what = "changes no logits" if change == 0 else "makes logits that are not finite"
        raise InputError(
            f"{adapter}: the adapter {what} of {base}: it would answer as the base does"
            f"\nhint: mbf status {stream.path} --verify checks the stream; mbf undo takes the last task back"
        )
    return f"{base} with the adapter of {_tasks(stream)}, which changes logits by up to {change:.2g}"


def prove_fused(stream: StreamFolder, base: BaseFolder, fused: Path) -> str:
    """Return in a sentence what answers: an export whose logits are nearer to the live adapter's than to the base's.

    Raises:
        InputError: they are not, or it is no model folder.
    """
    if not (fused / "config.json").is_file():
        raise InputError(f"--fused {fused}: expected a folder that mbf export {stream.path} mlx wrote")
    adapter = adapter_of(stream.current())
    if adapter is None:
        raise InputError(f"{stream.path}: it has learned no task, so nothing can have been exported from it")
    live, bare, ours = (
        _probe(*load(str(path), adapter_path=with_adapter)[:2])
        for path, with_adapter in ((base.path, adapter), (base.path, None), (fused, None))
    )
    if ours.shape != live.shape or not np.abs(ours - live).mean() < np.abs(ours - bare).mean():
        raise InputError(
            f"--fused {fused}: it answers more like the base than like the adapter of {stream.path}"
            f"\nhint: mbf export {stream.path} mlx {fused} --force makes it anew"
        )
    return f"{fused}, which answers like the adapter of {_tasks(stream)}, not like the base"


def _probe(model: Any, tokenizer: Any) -> np.ndarray:
    tokens = list(tokenizer.encode(PROBE))[:PROBE_TOKENS]
    return np.array(model(mx.array([tokens])).astype(mx.float32))


def _tasks(stream: StreamFolder) -> str:
    count = stream.current().manifest.t
    return f"{count} task{'' if count == 1 else 's'}"
