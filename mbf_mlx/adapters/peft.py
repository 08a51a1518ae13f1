"""Adapters in PEFT's layout: `adapter_model.safetensors` and `adapter_config.json`. Imports neither torch nor mlx.

Shapes: PEFT stores A (rank, in) and B (out, rank) as we hold them. Its delta is alpha / rank * B @ A, or
alpha / sqrt(rank) * B @ A with rsLoRA. alpha has to be a whole number, because other readers parse it as one.
"""

import json
import math
import re
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from mbf_mlx.adapters.mlx_lm import decode_tensors, is_number, read_weights, split_layer
from mbf_mlx.errors import InputError
from mbf_mlx.files.documents import read_object
from mbf_mlx.files.safetensors_file import safetensors_bytes
from mbf_mlx.files.storage import Data, sha256
from mbf_mlx.methods import Factors, Pair

WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"
PREFIX = "base_model.model."
_REPEATS, _REPEATED_GROUP = re.compile(r"[*+{]"), re.compile(r"\)[*+{]")  # parts of a regular expression
_TENSOR = re.compile(r"^(?P<layer>.+)\.lora_(?P<half>[AB])(\.default)?\.weight$")
# Settings that change the update beyond alpha / rank * B @ A, so that plain factors cannot express it.
_REFUSED = {
    "use_dora": "DoRA rescales the base weights by a trained magnitude, which LoRA factors do not hold",
    "modules_to_save": "whole modules were trained beside the factors; retrain with modules_to_save=None",
    "trainable_token_indices": "embedding rows were trained beside the factors",
    "target_parameters": "parameters outside linear layers were trained",
    "layer_replication": "it was trained on a model whose layers are repeated",
    "lora_bias": "biases were trained beside the factors",
    "fan_in_fan_out": "its layers store their weights transposed, which no Llama does",
    "alora_invocation_tokens": "an activated LoRA applies to some tokens only, a merged one to all",
    "use_qalora": "QA-LoRA pools the inputs of A",
    "use_bdlora": "block-diagonal factors are stored in another shape",
    "kasa_config": "KaSA adds a trained diagonal between the factors",
    "monteclora_config": "MonteCLoRA adds trained distributions to the factors",
    "velora_config": "VeLoRA stores more than the factors",
    "arrow_config": "Arrow routes between adapters",
}
# These initializations subtract the first factors from the base weights, so the adapter needs that other base.
_OTHER_BASE = ("pissa", "olora", "corda", "loftq", "lora_ga")


@dataclass(frozen=True)
class PeftAdapter:
    """A PEFT adapter as plain factors of one rank and one scale."""

    factors: Factors
    rank: int
    scale: float
    base: str | None  # base_model_name_or_path
    sha256: str  # of adapter_model.safetensors
    notes: tuple[str, ...] = ()  # what was folded or padded


def peft_files(factors: Factors, scale: float, *, base: str | None, num_blocks: int) -> dict[str, Data]:
    """Return a PEFT adapter's files by name; the same factors give the same bytes.

    Where scale * rank is a whole number, it becomes lora_alpha and the factors stay as they are. Otherwise lora_alpha
    is the rank and B is multiplied by the scale.

    Args:
        factors: A (rank, in) and B (out, rank) by layer, all of one rank.
        scale: The number in delta = scale * B @ A.
        base: The unquantized model that PEFT and llama.cpp's converter load: a hub id or a folder.
        num_blocks: Blocks of the model; an adapter of all blocks needs no list of them.
    """
    rank = next(iter(factors.values())).a.shape[0]
    alpha, factor = round(scale * rank), None
    if alpha / rank != scale:
        alpha, factor = rank, np.float32(scale)
    tensors = {}
    for name, pair in factors.items():
        b = np.asarray(pair.b, np.float32)
        tensors[f"{PREFIX}{name}.lora_A.weight"] = np.asarray(pair.a, np.float32)
        tensors[f"{PREFIX}{name}.lora_B.weight"] = b if factor is None else factor * b
    modules, blocks = _targets(list(factors), num_blocks)
    config = {
        "alpha_pattern": {},
        "base_model_name_or_path": base,
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
        "init_lora_weights": True,
        "layers_pattern": None if blocks is None else "layers",
        "layers_to_transform": blocks,
        "lora_alpha": alpha,
        "lora_dropout": 0.0,
        "modules_to_save": None,
        "peft_type": "LORA",
        "r": rank,
        "rank_pattern": {},
        "target_modules": modules,
        "task_type": "CAUSAL_LM",
        "use_dora": False,
        "use_rslora": False,
    }
    return {
        WEIGHTS: safetensors_bytes(tensors, "pt"),
        CONFIG: (json.dumps(config, indent=2, sort_keys=True) + "\n").encode(),
    }


def _targets(layers: list[str], num_blocks: int) -> tuple[list[str], list[int] | None]:
    """Return target_modules and layers_to_transform that name exactly these layers."""
    try:
        places = [split_layer(name) for name in layers]
    except InputError:  # a layer outside the blocks, such as lm_head, needs whole paths
        return sorted(layers), None
    blocks, keys = sorted({block for block, _ in places}), sorted({key for _, key in places})
    if len(places) != len(blocks) * len(keys):
        return sorted(layers), None
    short = sorted({key.rpartition(".")[2] for key in keys})
    modules = short if len(short) == len(keys) else keys
    return modules, None if blocks == list(range(num_blocks)) else blocks


def read_peft(folder: Path) -> PeftAdapter:
    """Read a PEFT LoRA folder of any float type as plain factors.

    The result has one scale and one rank: B is multiplied in layers with another alpha, and factors of a lower rank are
    padded with zeros. The update stays the one that PEFT computes, with rsLoRA and alpha and rank patterns, too.

    Raises:
        InputError: files missing or damaged, or an adapter that plain factors cannot hold; every reason is named.
    """
    config = _read_config(folder)
    _refuse(config, folder)
    halves, digest = _read_halves(folder)
    scales, factors, problems, notes = {}, {}, [], []
    for layer, half in halves.items():
        a, b = half.get("A"), half.get("B")
        if a is None or b is None or a.ndim != 2 or b.ndim != 2 or a.shape[0] != b.shape[1]:
            shapes = {name: array.shape for name, array in half.items()}
            problems.append(f"  {layer}: expected A (rank, in) and B (out, rank), got {shapes}")
            continue
        rank = _of_layer(config, "rank_pattern", layer, config.get("r"), folder)
        alpha = _of_layer(config, "alpha_pattern", layer, config.get("lora_alpha"), folder)
        if not isinstance(rank, int) or isinstance(rank, bool) or not is_number(alpha) or rank != a.shape[0]:
            problems.append(f"  {layer}: expected factors of rank {rank} and an alpha, got {a.shape[0]} and {alpha!r}")
        elif not (np.isfinite(a).all() and np.isfinite(b).all()):
            problems.append(f"  {layer}: holds NaN or infinite values")
        else:
            scales[layer] = alpha / (math.sqrt(rank) if config.get("use_rslora") else rank)
            factors[layer] = Pair(a.astype(np.float32, copy=False), b.astype(np.float32, copy=False))
    if problems or not factors:
        reasons = "\n".join(problems or ["  no factors at all"])
        raise InputError(f"{folder / WEIGHTS} is not a plain LoRA adapter:\n{reasons}")
    scale = Counter(scales.values()).most_common(1)[0][0] or 1.0
    rank = max(pair.a.shape[0] for pair in factors.values())
    folded = [layer for layer in factors if scales[layer] != scale]
    padded = [layer for layer in factors if factors[layer].a.shape[0] != rank]
    if folded:
        notes.append(f"{len(folded)} layers have another alpha; it was folded into their B")
    if padded:
        notes.append(f"{len(padded)} layers of a lower rank were padded with zeros to rank {rank}")
    plain = {layer: _pad(pair, scales[layer] / scale, rank) for layer, pair in factors.items()}
    return PeftAdapter(plain, rank, float(scale), config.get("base_model_name_or_path"), digest, tuple(notes))


def _read_config(folder: Path) -> dict[str, Any]:
    path = folder / CONFIG
    try:
        config = read_object(path)
    except FileNotFoundError:
        raise InputError(f"{path}: missing; expected a PEFT folder with {CONFIG} and {WEIGHTS}") from None
    if config.get("peft_type") != "LORA":
        raise InputError(
            f"{path}: peft_type: expected 'LORA', got {config.get('peft_type')!r}; only LoRA can be merged"
        )
    return config


def _refuse(config: dict[str, Any], folder: Path) -> None:
    """Raise InputError with every setting that makes the update more than its factors."""
    reasons = [f"  {key}: {reason}" for key, reason in _REFUSED.items() if config.get(key)]
    if config.get("bias", "none") != "none":
        reasons.append(f"  bias={config['bias']!r}: biases were trained beside the factors")
    init = config.get("init_lora_weights")
    if isinstance(init, str) and init.lower().startswith(_OTHER_BASE):
        reasons.append(
            f"  init_lora_weights={init!r}: its base weights were changed before training; save it again as LoRA of "
            "the original base (save_pretrained with path_initial_model_for_weight_conversion)"
        )
    if reasons:
        raise InputError(f"{folder / CONFIG}: cannot be read as plain LoRA:\n" + "\n".join(reasons))


def _read_halves(folder: Path) -> tuple[dict[str, dict[str, np.ndarray]], str]:
    """Return {"A": ..., "B": ...} by layer, in the order of the blocks, and the file's sha256."""
    if not (folder / WEIGHTS).exists() and (folder / "adapter_model.bin").exists():
        raise InputError(f"{folder}: adapter_model.bin is a pickle, which can run code; save it as safetensors")
    halves: dict[str, dict[str, np.ndarray]] = {}
    data, other = read_weights(folder / WEIGHTS), []
    for key, array in decode_tensors(data, folder / WEIGHTS).items():
        match = _TENSOR.match(key)
        if match is None:
            other.append(f"  {key}" + (": embeddings cannot be merged" if "lora_embedding" in key else ""))
        else:
            halves.setdefault(match["layer"].removeprefix(PREFIX), {})[match["half"]] = array
    if other:
        raise InputError(f"{folder / WEIGHTS} holds more than factors of linear layers:\n" + "\n".join(other))
    return dict(sorted(halves.items(), key=lambda item: _order(item[0]))), sha256(data)


def _order(layer: str) -> tuple[int, str]:
    try:
        return split_layer(layer)
    except InputError:
        return -1, layer


def _of_layer(config: dict[str, Any], pattern: str, layer: str, default: Any, folder: Path) -> Any:
    """Return a pattern's value for a layer; PEFT takes the first key that the layer's path ends with."""
    patterns = config.get(pattern) or {}
    if not isinstance(patterns, dict):
        raise InputError(f"{folder / CONFIG}: {pattern}: expected values by layer, got {str(patterns)[:80]}")
    for key, value in patterns.items():
        # Matching could take forever: refuse patterns that repeat a group or repeat often.
        if len(key) > 500 or len(_REPEATS.findall(key)) > 4 or _REPEATED_GROUP.search(key):
            raise InputError(f"{folder / CONFIG}: {pattern}: {key[:80]!r} is too complex for the name of a layer")
        try:
            if re.match(rf"(.*\.)?({key})$", layer):
                return value
        except re.error as error:
            raise InputError(f"{folder / CONFIG}: {pattern}: {key!r} is no regular expression: {error}") from error
    return default


def _pad(pair: Pair, factor: float, rank: int) -> Pair:
    missing = rank - pair.a.shape[0]
    b = pair.b if factor == 1 else (factor * pair.b).astype(np.float32)
    if not missing:
        return Pair(pair.a, b)
    return Pair(np.pad(pair.a, ((0, missing), (0, 0))), np.pad(b, ((0, 0), (0, missing))))
