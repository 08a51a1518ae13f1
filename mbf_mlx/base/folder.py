"""Facts about a model folder, read from its files without mlx: layers and their shapes, the chat template."""

import hashlib
import json
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from mbf_mlx.base.sources import read_config, weight_files
from mbf_mlx.errors import InputError
from mbf_mlx.files.safetensors_file import read_header
from mbf_mlx.methods import Layers

# What architectures call their embedding and their head.
_VOCABULARY_WEIGHT = re.compile(r"(^|\.)(embed_tokens|embed_in|word_embeddings|tok_embeddings|wte|lm_head)\.weight$")
_BLOCK_WEIGHT = re.compile(r"^.*\blayers\.(?P<block>\d+)\.(?P<key>.+)\.weight$")


def chosen_layers(folder: Path, keys: Iterable[str], num_layers: int) -> tuple[Layers, int]:
    """Return the (out, in) of the chosen linear layers of a model folder, and its number of blocks.

    Args:
        folder: A local model folder.
        keys: Names of layers, or their paths inside a block.
        num_layers: How many blocks, counted from the last; -1 is all.

    Raises:
        InputError: keys that name no layer, or more blocks than the model has.
    """
    wanted, found = tuple(keys), {}
    quantization = read_config(folder).get("quantization") or {}
    tensors = {name: entry for path in weight_files(folder) for name, entry in read_header(path)[0].items()}
    for name, entry in tensors.items():
        match = _BLOCK_WEIGHT.match(name)
        if match is None or len(entry.shape) != 2:
            continue
        layer, out, inner = name.removesuffix(".weight"), *entry.shape
        if (scales := tensors.get(f"{layer}.scales")) is not None:
            own = quantization.get(layer)
            inner = scales.shape[1] * (own if isinstance(own, dict) else quantization).get("group_size", 32)
        found[int(match["block"]), match["key"], layer] = (out, inner)
    blocks = 1 + max((block for block, _, _ in found), default=-1)
    if num_layers > blocks:
        raise InputError(f"num_layers: expected at most {blocks}, the blocks of {folder}, got {num_layers}")
    first = blocks - num_layers if num_layers > 0 else 0
    layers = {
        layer: shape
        for (block, key, layer), shape in sorted(found.items())
        if block >= first and (key in wanted or key.rpartition(".")[2] in wanted)
    }
    named = {part for _, key, _ in found for part in (key, key.rpartition(".")[2])}
    if unknown := [key for key in wanted if key not in named]:
        available = sorted({key.rpartition(".")[2] for _, key, _ in found})
        raise InputError(f"keys: no layer called {', '.join(unknown)}; expected of {', '.join(available)}")
    return layers, blocks


def vocabulary_rows(folder: Path) -> int:
    """Return how many tokens a model folder has weights for: the fewest rows of its embedding, its head and vocab_size.

    Raises:
        InputError: config.json or a header cannot be read, or nothing in them says so.
    """
    counts = [
        entry.shape[0]
        for path in weight_files(folder)
        for name, entry in read_header(path)[0].items()
        if _VOCABULARY_WEIGHT.search(name) and len(entry.shape) == 2
    ]
    if isinstance(stated := read_config(folder).get("vocab_size"), int):
        counts.append(stated)
    if not counts:
        raise InputError(f"{folder}/config.json: vocab_size: expected the number of tokens, got nothing")
    return min(counts)


def check_template(folder: Path, sha256: str, stream: Path) -> None:
    """Refuse a model folder whose chat template is not the one that a stream was taught with.

    Args:
        folder: A local model folder.
        sha256: The digest of the stream's template; "" or the digest of an empty text where it was taught without one.
        stream: The stream's folder, for the message.

    Raises:
        InputError: the folder has another template, or none.
    """
    text = template_text(folder)
    found = template_sha256(text or "")
    if sha256 in ("", template_sha256(""), found) or (text is None and _has_several_templates(folder)):
        return
    raise InputError(
        f"{folder}: its chat template is not the one that {stream} was taught with: expected sha256 {sha256[:12]},"
        f" got {found[:12] if text else 'no template'}"
        "\nhint: restore the tokenizer's files, or name another copy of the base with --model"
    )


def template_sha256(text: str) -> str:
    """Return the digest by which a stream knows its chat template."""
    return hashlib.sha256(text.encode()).hexdigest()


def _has_several_templates(folder: Path) -> bool:
    try:
        return isinstance(json.loads((folder / "tokenizer_config.json").read_bytes()).get("chat_template"), list)
    except (OSError, ValueError, AttributeError):
        return False


def template_text(folder: Path) -> str | None:
    """Return the chat template of a model folder, or None where it has none."""
    separate = folder / "chat_template.jinja"
    if separate.is_file():
        return separate.read_text(encoding="utf-8")
    try:
        template = json.loads((folder / "tokenizer_config.json").read_bytes()).get("chat_template")
    except (OSError, ValueError, AttributeError):
        return None
    return template if isinstance(template, str) else None


def describe_quantization(config: dict[str, Any]) -> str:
    """Return in words how a model is quantized: "4 bits, group 64, affine", or "none"."""
    quantization = config.get("quantization") or {}
    if "bits" not in quantization:
        return "none"
    words = f"{quantization['bits']} bits, group {quantization['group_size']}, {quantization.get('mode', 'affine')}"
    layers = [layer for layer in quantization.values() if isinstance(layer, dict)]
    others = sorted({layer.get("bits", quantization["bits"]) for layer in layers} - {quantization["bits"]})
    return words + (f"; some layers {' and '.join(map(str, others))} bits" if others else "")
