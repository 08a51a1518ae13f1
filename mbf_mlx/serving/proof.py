"""Proof that an adapter is applied: it changes the logits of a short probe text."""

from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np

from mbf_mlx.base.chat_templates import with_date
from mbf_mlx.base.folder import check_template, template_sha256, template_text
from mbf_mlx.base.load import load_to_answer
from mbf_mlx.base.sources import BaseFolder, check_folder, read_config
from mbf_mlx.errors import InputError, quoted
from mbf_mlx.stream.folder import StreamFolder
from mbf_mlx.stream.generations import Generation

PROBE = "The stream learns"
SIZES = (
    *("model_type", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads"),
    *("num_key_value_heads", "head_dim", "vocab_size", "max_position_embeddings"),
)
PROBE_TOKENS = 4  # more than one: with a single token, what q and k learned has no effect


def adapter_of(generation: Generation) -> str | None:
    """Return the path of a generation's deployed adapter; None if nothing was learned."""
    return str(generation.folder / "adapter") if generation.manifest.t else None


def prove_adapter(model: Any, tokenizer: Any, stream: StreamFolder, adapter: str | None) -> str:
    """Check that the adapter changes the logits of a few tokens; return a sentence on the model that answers.

    Args:
        model: As mlx-lm loads it with the adapter.
        tokenizer: The model's tokenizer.
        stream: The stream.
        adapter: The adapter's path; None if the stream has learned nothing.

    Raises:
        InputError: the adapter does not change the logits, or they are not finite.
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
        what = "changes no logits" if change == 0 else "gives logits that are not finite"
        raise InputError(
            f"{adapter}: the adapter {what} of {base}, so it would not answer as it was taught"
            f"\nhint: mbf status {quoted(stream.path)} --verify checks the stream; mbf undo removes the last task"
        )
    return f"{base} with the adapter of {_tasks(stream)}, which changes logits by up to {change:.2g}"


def prove_fused(stream: StreamFolder, base: BaseFolder, fused: Path) -> str:
    """Check that an export's logits are nearer to the live adapter's than to the base's; return a sentence on it.

    Raises:
        InputError: they are not, the export cannot be loaded, or it has another chat template.
    """
    adapter = adapter_of(stream.current())
    if adapter is None:
        raise InputError(f"{stream.path}: it has learned no task, so there is no export of it")
    live, bare = (_probe(*load_to_answer(base.path, path)) for path in (adapter, None))
    try:
        ours = _probe(*load_to_answer(fused))
    except Exception as error:  # mlx and the tokenizer raise anything about files that do not fit together
        raise InputError(
            f"--fused {fused}: it cannot be loaded: {error}"
            f"\nhint: mbf export {quoted(stream.path)} mlx {quoted(fused)} --force exports it again"
        ) from error
    if ours.shape != live.shape or not np.abs(ours - live).mean() < np.abs(ours - bare).mean():
        raise InputError(
            f"--fused {fused}: it answers more like the base than like the adapter of {stream.path}"
            f"\nhint: mbf export {quoted(stream.path)} mlx {quoted(fused)} --force exports it again"
        )
    own, date = template_text(base.path), stream.date()
    expected = template_sha256(with_date(own, date)) if own and date else stream.identity.template_sha256
    if stream.identity.template != "none":  # raw prompts are not rendered with any
        check_template(fused, expected, stream.path)
    return f"{fused}, which answers like the adapter of {_tasks(stream)}, not like the base"


def check_export(fused: Path, base: BaseFolder, stream: StreamFolder) -> None:
    """Check that a folder is a model of the base's sizes, from its files alone.

    Raises:
        InputError: it is not, or its files are damaged.
    """
    if not (fused / "config.json").is_file():
        raise InputError(f"--fused {fused}: expected a folder that mbf export {quoted(stream.path)} mlx wrote")
    check_folder(fused)
    config, expected = read_config(fused), read_config(base.path)
    if other := [name for name in SIZES if config.get(name) != expected.get(name)]:
        name = other[0]
        raise InputError(
            f"--fused {fused}: config.json: {name}: expected {expected.get(name)!r} as in {base.name},"
            f" got {config.get(name)!r}"
            f"\nhint: mbf export {quoted(stream.path)} mlx {quoted(fused)} --force exports it again"
        )


def logits_of(model: Any) -> int:
    """Return how many logits a model gives."""
    return int(model(mx.array([[0]])).shape[-1])


def _probe(model: Any, tokenizer: Any) -> np.ndarray:
    tokens = list(tokenizer.encode(PROBE))[:PROBE_TOKENS]
    return np.array(model(mx.array([tokens])).astype(mx.float32))


def _tasks(stream: StreamFolder) -> str:
    count = stream.current().manifest.t
    return f"{count} task{'' if count == 1 else 's'}"
