"""One adapter on disk, in mlx-lm's layout: `adapters.safetensors` and `adapter_config.json`.

Shapes: our A is (rank, in) and our B (out, rank); mlx-lm stores the transposes, `lora_a` (in, rank) and `lora_b`
(rank, out), in float32. Its `scale` is the number in delta = scale * B @ A, never divided by the rank.
"""

import json
import re
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import safetensors
import safetensors.numpy

from mbf_mlx.errors import InputError
from mbf_mlx.methods import Factors, Layers, Pair
from mbf_mlx.records import CONFIG as CONFIG
from mbf_mlx.records import WEIGHTS as WEIGHTS
from mbf_mlx.storage import read_file

_LAYER = re.compile(r"^(?P<stem>[^\d.][^.]*(?:\.[^\d.][^.]*)*)\.(?P<block>\d+)\.(?P<key>.+)$")
_PICKLES = (b"PK", b"\x80\x02", b"\x80\x03", b"\x80\x04", b"\x80\x05")  # what torch.save and pickle begin with
_DTYPES = {"F64": "<f8", "F32": "<f4", "F16": "<f2", "BF16": "<u2"}
_COUNTS = {"I64": "<i8", "I32": "<i4", "I8": "|i1", "U8": "|u1"}  # what some methods keep besides factors


@dataclass(frozen=True, kw_only=True)
class Adapter:
    """An adapter read from disk."""

    factors: Factors
    rank: int
    scale: float
    keys: tuple[str, ...]  # paths inside a block
    config: dict[str, Any]  # adapter_config.json as it was

    @property
    def layers(self) -> Layers:
        """The (out, in) of every layer's update."""
        return {name: (pair.b.shape[0], pair.a.shape[1]) for name, pair in self.factors.items()}


def encode(
    factors: Factors, *, scale: float, num_layers: int, base: str, extra: dict[str, Any] | None = None
) -> dict[str, bytes]:
    """Return an adapter's files by name; the same factors give the same bytes.

    Args:
        factors: A (rank, in) and B (out, rank) by layer; all of one rank.
        scale: The number in delta = scale * B @ A.
        num_layers: Blocks of the model counted from the last that hold the layers.
        base: What mlx-lm users pass as `--model`.
        extra: What our own tools want to know, kept under "mbf".
    """
    tensors = {}
    for name, pair in factors.items():
        tensors[f"{name}.lora_a"] = np.ascontiguousarray(np.asarray(pair.a).T, dtype=np.float32)
        tensors[f"{name}.lora_b"] = np.ascontiguousarray(np.asarray(pair.b).T, dtype=np.float32)
    rank = next(iter(factors.values())).a.shape[0] if factors else 0
    config = {
        "fine_tune_type": "lora",
        "lora_parameters": {"dropout": 0.0, "keys": list(block_keys(factors)), "rank": rank, "scale": float(scale)},
        "mbf": {"orientation": "lora_a (in, rank), lora_b (rank, out)", "alpha": float(scale) * rank, **(extra or {})},
        "model": base,
        "num_layers": num_layers,
    }
    return {
        WEIGHTS: encode_tensors(tensors),
        CONFIG: (json.dumps(config, indent=2, sort_keys=True) + "\n").encode(),
    }


def block_keys(layers: Layers | Factors) -> tuple[str, ...]:
    """Return the paths inside a block of the given layers, each once, in order."""
    return tuple(dict.fromkeys(split_layer(name)[1] for name in layers))


def split_layer(name: str) -> tuple[int, str]:
    """Return a layer's block number and its path inside the block: "model.layers.3.mlp.up_proj" -> (3, "mlp.up_proj").

    Raises:
        InputError: the name is not of a layer inside a block.
    """
    match = _LAYER.match(name)
    if match is None:
        raise InputError(f"{name}: expected a layer inside a block, as in model.layers.0.self_attn.q_proj")
    return int(match["block"]), match["key"]


def read(folder: Path) -> Adapter:
    """Read an adapter folder of mlx-lm's layout.

    Raises:
        InputError: a missing or damaged file, an adapter that is not plain LoRA, factors that do not fit each other.
    """
    config = _read_config(folder / CONFIG)
    where, parameters = folder / CONFIG, config.get("lora_parameters")
    kind = config.get("fine_tune_type", "lora")
    if kind != "lora":
        raise InputError(f"{where}: fine_tune_type: expected 'lora', got {kind!r}; only plain LoRA can be merged")
    if not isinstance(parameters, dict) or not is_number(parameters.get("scale")):
        raise InputError(f"{where}: expected lora_parameters with rank and scale, got {str(parameters)[:200]}")
    factors = pair_up(read_tensors(folder / WEIGHTS), folder / WEIGHTS)
    rank = next(iter(factors.values())).a.shape[0]
    try:
        keys = block_keys(factors)
    except InputError as error:
        raise InputError(f"{folder / WEIGHTS}: {error}") from error
    return Adapter(factors=factors, rank=rank, scale=float(parameters["scale"]), keys=keys, config=config)


def is_number(value: Any) -> bool:
    """Return whether a value out of a JSON file is a finite number."""
    return isinstance(value, (int, float)) and not isinstance(value, bool) and abs(value) <= sys.float_info.max


def _read_config(path: Path) -> dict[str, Any]:
    try:
        config = json.loads(read_file(path))
    except FileNotFoundError:
        raise InputError(f"{path}: missing; expected an adapter folder with {CONFIG} and {WEIGHTS}") from None
    except InputError:
        raise
    except (ValueError, RecursionError) as error:
        raise InputError(f"{path}: not JSON: {error}") from error
    if not isinstance(config, dict):
        raise InputError(f"{path}: expected a JSON object, got {type(config).__name__}")
    return config


def pair_up(tensors: dict[str, np.ndarray], where: Path) -> Factors:
    """Return factors from mlx-lm's tensors, (in, rank) and (rank, out), all problems named at once.

    Raises:
        InputError: a tensor without its other half, other names, shapes or ranks that do not fit, values not finite.
    """
    problems, factors = [], {}
    for name in sorted({key.rpartition(".")[0] for key in tensors}):
        a, b = tensors.get(f"{name}.lora_a"), tensors.get(f"{name}.lora_b")
        if a is None or b is None:
            problems.append(f"  {name}: expected lora_a and lora_b")
        elif a.ndim != 2 or b.ndim != 2 or a.shape[1] != b.shape[0]:
            problems.append(f"  {name}: expected (in, rank) and (rank, out), got {a.shape} and {b.shape}")
        elif not (np.isfinite(a).all() and np.isfinite(b).all()):
            problems.append(f"  {name}: holds NaN or infinite values")
        else:
            factors[name] = Pair(np.ascontiguousarray(a.T), np.ascontiguousarray(b.T))
    problems += [f"  {key}: not a LoRA factor" for key in tensors if not key.endswith((".lora_a", ".lora_b"))]
    if ranks := {pair.a.shape[0] for pair in factors.values()} if not problems else set():
        if len(ranks) > 1:
            problems.append(f"  expected one rank, got {sorted(ranks)}")
    elif not problems:
        problems.append("  no factors at all")
    if problems:
        raise InputError(f"{where} is not a plain LoRA adapter:\n" + "\n".join(problems))
    return dict(sorted(factors.items(), key=lambda item: _order(item[0])))


def _order(name: str) -> tuple[int, str]:
    match = _LAYER.match(name)
    return (int(match["block"]), match["key"]) if match else (-1, name)


def encode_tensors(tensors: dict[str, np.ndarray]) -> bytes:
    """Return a safetensors file; the same tensors give the same bytes."""
    return safetensors.numpy.save(tensors, metadata={"format": "mlx"})


def read_tensors(path: Path, *, integers: bool = False) -> dict[str, np.ndarray]:
    """Read a safetensors file of floating-point tensors; float16 and bfloat16 come back as float32.

    Args:
        path: The file.
        integers: Whether whole numbers are welcome, too.

    Raises:
        InputError: no such file, not safetensors, or tensors of another kind.
    """
    try:
        return decode_tensors(read_file(path), path, integers=integers)
    except FileNotFoundError:
        raise InputError(f"{path}: missing") from None


def decode_tensors(data: bytes, where: Path, *, integers: bool = False) -> dict[str, np.ndarray]:
    """Return the tensors of a safetensors file's bytes; `where` names it in errors. See `read_tensors`."""
    try:
        entries = safetensors.deserialize(data)
    except safetensors.SafetensorError as error:
        kind = "a zip or pickle file, which may hold code and is never read" if data[:2] in _PICKLES else str(error)
        raise InputError(f"{where}: not a readable safetensors file: {kind}") from error
    kinds = _DTYPES | _COUNTS if integers else _DTYPES
    return {name: _to_array(name, entry, where, kinds) for name, entry in entries}


def _to_array(name: str, entry: Any, path: Path, kinds: dict[str, str]) -> np.ndarray:
    if entry["dtype"] not in kinds:
        raise InputError(f"{path}: {name}: expected one of {', '.join(kinds)}, got {entry['dtype']}")
    array = np.frombuffer(entry["data"], dtype=kinds[entry["dtype"]]).reshape(entry["shape"])  # its own bytearray
    if entry["dtype"] == "BF16":
        return (array.astype(np.uint32) << 16).view(np.float32)
    return array.astype(np.float32) if entry["dtype"] == "F16" else array
