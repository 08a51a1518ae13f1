"""Adapters in mlx-lm's layout: `adapters.safetensors` and `adapter_config.json`.

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

from mbf_mlx.adapters.layout import CONFIG as CONFIG
from mbf_mlx.adapters.layout import WEIGHTS as WEIGHTS
from mbf_mlx.device.machine import available_memory
from mbf_mlx.device.threads import side_by_side
from mbf_mlx.errors import InputError
from mbf_mlx.files import dtypes
from mbf_mlx.files.documents import read_object
from mbf_mlx.files.safetensors_file import Entry, header_of, read_header, safetensors_bytes
from mbf_mlx.files.storage import Data, read_large, sha256
from mbf_mlx.methods import Factors, Layers, Pair

_LAYER = re.compile(r"^(?P<stem>[^\d.][^.]*(?:\.[^\d.][^.]*)*)\.(?P<block>\d+)\.(?P<key>.+)$")
_PICKLES = (b"PK", b"\x80\x02", b"\x80\x03", b"\x80\x04", b"\x80\x05")  # first bytes of a pickle
_CODE = "not a safetensors file: a zip or pickle file, which may hold code and is never read"
LARGE = 64 << 20  # bytes of a file whose header is read before the rest
_COUNTS = ("I64", "I32", "I8", "U8")  # what some methods keep besides factors


@dataclass(frozen=True, kw_only=True)
class Adapter:
    """An adapter read from disk."""

    factors: Factors
    rank: int
    scale: float
    keys: tuple[str, ...]  # paths inside a block
    config: dict[str, Any]  # adapter_config.json as it was
    sha256: str  # of adapters.safetensors

    @property
    def layers(self) -> Layers:
        """The (out, in) of every layer's update."""
        return {name: (pair.b.shape[0], pair.a.shape[1]) for name, pair in self.factors.items()}


def adapter_files(
    factors: Factors, *, scale: float, num_layers: int, base: str, extra: dict[str, Any] | None = None
) -> dict[str, Data]:
    """Return an adapter's files by name; the same factors give the same bytes.

    Args:
        factors: A (rank, in) and B (out, rank) by layer; all of one rank.
        scale: The number in delta = scale * B @ A.
        num_layers: How many of the model's last blocks hold the layers.
        base: The base as mlx-lm users pass it to `--model`.
        extra: Settings for our own tools, stored under "mbf".
    """
    tensors = {}
    for name, pair in factors.items():
        tensors[f"{name}.lora_a"] = np.asarray(pair.a, np.float32).T
        tensors[f"{name}.lora_b"] = np.asarray(pair.b, np.float32).T
    rank = next(iter(factors.values())).a.shape[0] if factors else 0
    config = {
        "fine_tune_type": "lora",
        "lora_parameters": {"dropout": 0.0, "keys": list(block_keys(factors)), "rank": rank, "scale": float(scale)},
        "mbf": {"orientation": "lora_a (in, rank), lora_b (rank, out)", "alpha": float(scale) * rank, **(extra or {})},
        "model": base,
        "num_layers": num_layers,
    }
    return {
        WEIGHTS: safetensors_bytes(tensors),
        CONFIG: (json.dumps(config, indent=2, sort_keys=True) + "\n").encode(),
    }


def block_keys(layers: Layers | Factors) -> tuple[str, ...]:
    """Return the layers' paths inside their blocks, each once, in order."""
    return tuple(dict.fromkeys(split_layer(name)[1] for name in layers))


def split_layer(name: str) -> tuple[int, str]:
    """Return a layer's block number and its path inside the block: "model.layers.3.mlp.up_proj" -> (3, "mlp.up_proj").

    Raises:
        InputError: the name is not that of a layer inside a block.
    """
    match = _LAYER.match(name)
    if match is None:
        raise InputError(f"{name}: expected a layer inside a block, as in model.layers.0.self_attn.q_proj")
    return int(match["block"]), match["key"]


def read_adapter(folder: Path) -> Adapter:
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
    data = read_weights(folder / WEIGHTS)
    digest = sha256(data)
    factors = pair_up(decode_tensors(data, folder / WEIGHTS), folder / WEIGHTS)
    rank = next(iter(factors.values())).a.shape[0]
    try:
        keys = block_keys(factors)
    except InputError as error:
        raise InputError(f"{folder / WEIGHTS}: {error}") from error
    scale = float(parameters["scale"])
    return Adapter(factors=factors, rank=rank, scale=scale, keys=keys, config=config, sha256=digest)


def is_number(value: Any) -> bool:
    """Return whether a value from a JSON file is a finite number."""
    return isinstance(value, (int, float)) and not isinstance(value, bool) and abs(value) <= sys.float_info.max


def _read_config(path: Path) -> dict[str, Any]:
    try:
        return read_object(path)
    except FileNotFoundError:
        raise InputError(f"{path}: missing; expected an adapter folder with {CONFIG} and {WEIGHTS}") from None


def pair_up(tensors: dict[str, np.ndarray], where: Path) -> Factors:
    """Return factors from mlx-lm's tensors, (in, rank) and (rank, out), transposed in the tensors' own memory.

    Raises:
        InputError: a tensor without its other half, other names, shapes or ranks that do not fit, or values that are
            not finite; every problem is named.
    """
    names = sorted({key.rpartition(".")[0] for key in tensors})
    halves = [(tensors.get(f"{name}.lora_a"), tensors.get(f"{name}.lora_b")) for name in names]
    found = dict(zip(names, side_by_side(_pair, halves, products=False)))
    problems = [f"  {name}: {pair}" for name, pair in found.items() if isinstance(pair, str)]
    factors = {name: pair for name, pair in found.items() if not isinstance(pair, str)}
    problems += [f"  {key}: not a LoRA factor" for key in tensors if not key.endswith((".lora_a", ".lora_b"))]
    if ranks := {pair.a.shape[0] for pair in factors.values()} if not problems else set():
        if len(ranks) > 1:
            problems.append(f"  expected one rank, got {sorted(ranks)}")
    elif not problems:
        problems.append("  no factors at all")
    if problems:
        raise InputError(f"{where} is not a plain LoRA adapter:\n" + "\n".join(problems))
    return dict(sorted(factors.items(), key=lambda item: _order(item[0])))


def _pair(halves: tuple[np.ndarray | None, np.ndarray | None]) -> Pair | str:
    """Return a layer's factors from its two tensors, or a sentence on what is wrong with them."""
    a, b = halves
    if a is None or b is None:
        return "expected lora_a and lora_b"
    if a.ndim != 2 or b.ndim != 2 or a.shape[1] != b.shape[0]:
        return f"expected (in, rank) and (rank, out), got {a.shape} and {b.shape}"
    if not (np.isfinite(a).all() and np.isfinite(b).all()):
        return "holds NaN or infinite values"
    return Pair(_turn(a), _turn(b))


def _turn(matrix: np.ndarray) -> np.ndarray:
    """Return the transpose in the matrix's own memory, row after row; fresh memory would take twice the time."""
    turned = matrix.reshape(matrix.shape[::-1])
    turned[...] = np.ascontiguousarray(matrix.T)
    return turned


def _order(name: str) -> tuple[int, str]:
    match = _LAYER.match(name)
    return (int(match["block"]), match["key"]) if match else (-1, name)


def read_tensors(path: Path, *, integers: bool = False) -> dict[str, np.ndarray]:
    """Read a safetensors file of floating-point tensors; they come back as float32.

    Args:
        path: The file.
        integers: Whether tensors of whole numbers may be in it, too.

    Raises:
        InputError: no such file, not safetensors, tensors of another kind, or numbers beyond float32.
    """
    return decode_tensors(read_weights(path), path, integers=integers)


def read_weights(path: Path) -> memoryview:
    """Return the bytes of a file of tensors; of a large one, the header is checked first.

    Raises:
        InputError: no such file, a header that does not fit it, or more bytes than there is memory for.
    """
    try:
        size = path.stat().st_size if path.is_file() else 0
        if size > LARGE:
            read_header(path)
            if size > (free := available_memory()):
                raise InputError(f"{path}: expected at most {free:,} bytes, the memory that is free, got {size:,}")
        return read_large(path)
    except FileNotFoundError:
        raise InputError(f"{path}: missing") from None


def decode_tensors(data: Data, where: Path, *, integers: bool = False) -> dict[str, np.ndarray]:
    """Return the tensors in a safetensors file's bytes; those in float32 share its memory.

    Types, `integers` and errors are those of `read_tensors`; `where` names the file in errors.
    """
    try:
        entries, _ = header_of(data, where)
    except InputError as error:
        if data[:2] in _PICKLES:
            raise InputError(f"{where}: {_CODE}") from error
        raise
    kinds = dtypes.FLOATS + (_COUNTS if integers else ())
    return {name: _to_array(data, entry, where, kinds) for name, entry in entries.items()}


def _to_array(data: Data, entry: Entry, path: Path, kinds: tuple[str, ...]) -> np.ndarray:
    if entry.dtype not in kinds:
        raise InputError(f"{path}: {entry.name}: expected one of {', '.join(kinds)}, got {entry.dtype}")
    array = np.ndarray(entry.shape, dtypes.NUMPY[entry.dtype], data, entry.begin)
    array = np.require(array, requirements="A")  # others' headers may have any length
    if entry.dtype not in dtypes.FLOATS or entry.dtype == "F32":
        return array
    if entry.dtype != "F64":
        return dtypes.to_float32(array, entry.dtype)
    with np.errstate(over="ignore"):
        single = array.astype(np.float32)
    if (np.isinf(single) & np.isfinite(array)).any():
        raise InputError(f"{path}: {entry.name}: expected numbers that float32 can hold, got {np.abs(array).max():.3g}")
    return single
