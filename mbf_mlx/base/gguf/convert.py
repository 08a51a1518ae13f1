"""Turn a GGUF file of a Llama-family model into a complete MLX model folder, without loss.

llama.cpp's Q4_0, Q4_1 and Q8_0 are groups of 32 weights with a scale d and, for Q4_1, a minimum m: exactly MLX's affine
quantization, weight = scale * code + bias, with other packing and signs. Codes are re-packed, scales kept; tensors of
16 and 32 bits stay as they are. Other types have no counterpart: they are refused or, if the user asks, dequantized
and quantized again. One tensor is in memory at a time. The rows of q and k get MLX's order (names.py).

Source: docs/gguf.md of ggml-org/ggml; block layouts from its ggml-common.h.
"""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from mbf_mlx.base.gguf.config import model_config
from mbf_mlx.base.gguf.names import read_names
from mbf_mlx.base.gguf.reader import GGUFFile, GGUFTensor, read_gguf
from mbf_mlx.base.gguf.tokenizer import read_vocabulary, write_tokenizer
from mbf_mlx.errors import InputError
from mbf_mlx.files import dtypes, safetensors_file

GROUP = 32  # weights that share a scale, in GGUF's types
QUANTIZE_GROUP = 64  # weights that share a scale after --quantize, as in the hub's MLX models
SHARD_BYTES = 5 << 30  # largest safetensors file
_CHUNK_VALUES = 1 << 24  # weights unpacked at a time
_EMBEDDING = "model.embed_tokens"
_BLOCK = (
    "input_layernorm", "self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj",
    "post_attention_layernorm", "mlp.gate_proj", "mlp.up_proj", "mlp.down_proj",
)  # fmt: skip
_AS_IS = ("F32", "F16", "BF16")  # types that both formats call the same
_BITS = {"Q4_0": 4, "Q4_1": 4, "Q8_0": 8}


class Target(NamedTuple):
    """What one GGUF tensor becomes in the MLX folder."""

    source: GGUFTensor
    module: str  # "model.layers.0.self_attn.q_proj"
    kind: str  # "weight" or "bias"
    order: np.ndarray | None  # the place in GGUF of each of our rows; None where all stay in place
    quantize: int  # bits to quantize it to again, else 0


def convert(path: Path, folder: Path, *, quantize: int = 0) -> None:
    """Write the MLX model folder of a GGUF file.

    Args:
        path: The GGUF file.
        folder: A new, empty folder; the caller renames it when it is complete.
        quantize: Bits for matrices of 16 and 32 bits and of types that MLX lacks; 0 keeps the former and refuses
            the latter.

    Raises:
        InputError: a damaged file, another architecture, types that MLX lacks, or an unknown tokenizer.
    """
    file = read_gguf(path)
    config = model_config(file)
    targets = plan(file, config, quantize)
    vocabulary = read_vocabulary(file.settings, path)
    rows = file.tensors["token_embd.weight"].shape[0]
    if len(vocabulary.tokens) > rows:
        raise InputError(f"{path}: {len(vocabulary.tokens)} tokens, but only {rows} rows in token_embd.weight")
    ends = vocabulary.ends()
    config |= {"vocab_size": rows, "bos_token_id": vocabulary.special("bos"), "eos_token_id": ends[0] if ends else None}
    if quantization := _quantization(targets):
        config["quantization"] = quantization
    write_tokenizer(vocabulary, folder, config["max_position_embeddings"])
    _write_weights(file, targets, folder)
    text = json.dumps({key: value for key, value in config.items() if value is not None}, indent=2, sort_keys=True)
    (folder / "config.json").write_text(text + "\n", encoding="utf-8")


def plan(file: GGUFFile, config: dict[str, Any], quantize: int) -> list[Target]:
    """Return the target of every tensor of the file, in the file's order.

    Raises:
        InputError: tensors that are unknown, missing, of the wrong shape or of a type that MLX lacks.
    """
    shapes, names = _shapes(config), read_names(config, file.path)
    ours = {names.tensor(name): name for name in shapes}
    targets, problems = [], []
    for tensor in file.tensors.values():
        if tensor.name == "rope_freqs.weight":
            continue
        name = ours.get(tensor.name)
        if name is None:
            problems.append(f"  {tensor.name}: not part of a Llama of {config['num_hidden_layers']} blocks")
            continue
        wanted, shape = shapes.pop(name), tensor.shape
        if shape[1:] != wanted[1:] or (shape[0] != wanted[0] and wanted[0]):
            problems.append(f"  {tensor.name}: expected shape {wanted}, got {shape}")
            continue
        module, _, kind = name.rpartition(".")
        order, matrix = names.order(module, shape[0]), len(shape) == 2
        bits = quantize if matrix and tensor.type not in _BITS else 0
        targets.append(Target(tensor, module, kind, None if order is None else np.argsort(order), bits))
        if not matrix and tensor.type not in _AS_IS:
            problems.append(f"  {tensor.name}: expected a vector of 16 or 32 bits, got {tensor.type}")
        if bits and shape[-1] % GROUP:
            problems.append(f"  {tensor.name}: rows of {shape[-1]} cannot be quantized in groups of {GROUP}")
    problems += [f"  {name}: missing" for name in shapes]
    if problems:
        raise InputError(f"{file.path} is not a Llama that we can convert:\n" + "\n".join(problems[:20]))
    _refuse_types(file.path, targets)
    return targets


def _refuse_types(path: Path, targets: list[Target]) -> None:
    lossy: dict[str, int] = {}
    for target in targets:
        kind = target.source.type
        if not target.quantize and kind not in _AS_IS and kind not in _BITS:
            lossy[kind] = lossy.get(kind, 0) + 1
    if lossy:
        counts = ", ".join(f"{count} of type {kind}" for kind, count in sorted(lossy.items()))
        raise InputError(
            f"{path}: tensors that MLX cannot hold as they are: {counts}; without loss we convert "
            f"{', '.join([*_AS_IS, *_BITS])}\n"
            "hint: --quantize 4 (or 8) dequantizes them and quantizes them again, at some loss"
        )


def _shapes(config: dict[str, Any]) -> dict[str, tuple[int, ...]]:
    """Return the shape of every tensor of the model; 0 rows means any number."""
    hidden, inner, head = config["hidden_size"], config["intermediate_size"], config["head_dim"]
    queries, keys = config["num_attention_heads"] * head, config["num_key_value_heads"] * head
    sizes = {
        "q_proj": (queries, hidden),
        "k_proj": (keys, hidden),
        "v_proj": (keys, hidden),
        "o_proj": (hidden, queries),
    }
    sizes |= {"gate_proj": (inner, hidden), "up_proj": (inner, hidden), "down_proj": (hidden, inner)}
    shapes: dict[str, tuple[int, ...]] = {f"{_EMBEDDING}.weight": (0, hidden), "model.norm.weight": (hidden,)}
    if not config["tie_word_embeddings"]:
        shapes["lm_head.weight"] = (0, hidden)
    for block in range(config["num_hidden_layers"]):
        for place in _BLOCK:
            name, leaf = f"model.layers.{block}.{place}", place.rpartition(".")[2]
            shapes[f"{name}.weight"] = sizes.get(leaf, (hidden,))
            biased = config["mlp_bias"] if place.startswith("mlp") else config["attention_bias"]
            if leaf in sizes and biased:
                shapes[f"{name}.bias"] = sizes[leaf][:1]
    return shapes


def _quantization(targets: list[Target]) -> dict[str, Any] | None:
    """Return config.json's quantization: the most frequent setting, and every layer with another."""
    kinds = {}
    for target in targets:
        if target.kind == "weight" and len(target.source.shape) == 2:
            bits = target.quantize or _BITS.get(target.source.type, 0)
            kinds[target.module] = (bits, _group(target)) if bits else None
    counted = [kind for kind in kinds.values() if kind]
    if not counted:
        return None
    usual = max(set(counted), key=lambda kind: (counted.count(kind), kind))
    quantization: dict[str, Any] = {"bits": usual[0], "group_size": usual[1], "mode": "affine"}
    for module, kind in kinds.items():
        if kind is None:
            quantization[module] = False
        elif kind != usual:
            quantization[module] = {"bits": kind[0], "group_size": kind[1], "mode": "affine"}
    return quantization


def _group(target: Target) -> int:
    return QUANTIZE_GROUP if target.quantize and target.source.shape[-1] % QUANTIZE_GROUP == 0 else GROUP


def _write_weights(file: GGUFFile, targets: list[Target], folder: Path) -> None:
    """Write the safetensors files, one tensor in memory at a time."""
    shards: list[list[Target]] = [[]]
    held = 0
    for target in targets:
        if shards[-1] and held + target.source.nbytes > SHARD_BYTES:
            shards.append([])
            held = 0
        shards[-1].append(target)
        held += target.source.nbytes
    total = sum(target.source.nbytes for target in targets)
    index: dict[str, str] = {}

    def arrays(shard: list[Target]) -> Iterator[np.ndarray]:
        for target in shard:
            for _, _, array in _convert(file, target):
                yield array

    for number, shard in enumerate(shards, start=1):
        name = "model.safetensors" if len(shards) == 1 else f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        declared = [tensor for target in shard for tensor in _declare(file, target)]
        safetensors_file.write(folder / name, declared, arrays(shard))
        index |= {tensor.name: name for tensor in declared}
    if len(shards) > 1:
        document = {"metadata": {"total_size": total}, "weight_map": dict(sorted(index.items()))}
        (folder / "model.safetensors.index.json").write_text(json.dumps(document, indent=2) + "\n", encoding="utf-8")


def _declare(file: GGUFFile, target: Target) -> list[safetensors_file.Declared]:
    """Return names, types and shapes of the tensors of `_convert`, found by converting the first row."""
    pieces = _unpack(file, target, file.rows(target.source)[:1])
    rows = target.source.shape[:-1]
    return [
        safetensors_file.Declared(f"{target.module}.{suffix}", dtype, (*rows, array.shape[-1]))
        for suffix, dtype, array in pieces
    ]


def _convert(file: GGUFFile, target: Target) -> list[tuple[str, str, np.ndarray]]:
    """Return the tensors that one GGUF tensor becomes: (suffix, safetensors dtype, array)."""
    rows = file.rows(target.source)
    step = max(1, _CHUNK_VALUES // target.source.shape[-1])
    chunks = [_unpack(file, target, rows[at : at + step]) for at in range(0, len(rows), step)]
    pieces = []
    for place, (suffix, dtype, first) in enumerate(chunks[0]):
        array = first if len(chunks) == 1 else np.concatenate([chunk[place][2] for chunk in chunks])
        if target.kind == "bias" or len(target.source.shape) == 1:
            array = array.reshape(-1)
        if target.order is not None:
            array = array[target.order]
        pieces.append((suffix, dtype, array))
    return pieces


def _unpack(file: GGUFFile, target: Target, data: np.ndarray) -> list[tuple[str, str, np.ndarray]]:
    """Return some rows of a tensor, converted; `data` is uint8[rows, bytes of a row]."""
    kind = target.source.type
    where = f"{file.path}: {target.source.name}"
    if target.quantize:
        return _quantize_again(data, kind, target.quantize, _group(target), where)
    if kind in _BITS:
        # mlx unpacks an embedding in the type of its scales, and float16 would round the rows; llama.cpp does not.
        return _repack(data, kind, where, exact=target.module == _EMBEDDING)
    array = data.view(dtypes.NUMPY[kind])
    if not np.isfinite(dtypes.to_float32(array, kind) if kind == "BF16" else array).all():
        raise InputError(f"{where}: holds NaN or infinite values")
    return [(target.kind, kind, array)]


def _repack(data: np.ndarray, kind: str, where: str, exact: bool) -> list[tuple[str, str, np.ndarray]]:
    """Return codes, scales and biases as MLX packs them; `data` is uint8[rows, bytes of a row].

    Scales and biases are float16, as in the file; `exact` gives the same numbers in float32.
    """
    head = 4 if kind == "Q4_1" else 2
    codes_bytes = GROUP * _BITS[kind] // 8
    blocks = data.reshape(len(data), -1, head + codes_bytes)
    scales = np.ascontiguousarray(blocks[..., :2]).view("<f2")[..., 0]
    codes = blocks[..., head:]
    if kind == "Q4_1":
        biases = np.ascontiguousarray(blocks[..., 2:4]).view("<f2")[..., 0]
    else:
        # These codes are signed and MLX's start at zero: add 8 or 128 to the code, subtract as many scales in the bias.
        # A power of two, so this is exact.
        with np.errstate(over="ignore"):
            biases = scales * np.float16(-8 if kind == "Q4_0" else -128)
    if not (np.isfinite(scales).all() and np.isfinite(biases).all()):
        raise InputError(f"{where}: holds scales that are not finite in float16")
    if kind == "Q8_0":
        packed = codes ^ np.uint8(0x80)
    else:
        # llama.cpp: byte j holds weight j in its low half and j + 16 in its high half. MLX: 2 j and 2 j + 1.
        even, odd = codes[..., 0::2], codes[..., 1::2]
        packed = np.concatenate([(even & 15) | (odd & 15) << 4, (even >> 4) | (odd & 0xF0)], axis=-1)
    packed = np.ascontiguousarray(packed).reshape(len(data), -1).view("<u4")
    if exact:
        scales, biases = scales.astype("<f4"), biases.astype("<f4")
    dtype = "F32" if exact else "F16"
    return [("weight", "U32", packed), ("scales", dtype, scales), ("biases", dtype, biases)]


def _quantize_again(
    data: np.ndarray, kind: str, bits: int, group: int, where: str
) -> list[tuple[str, str, np.ndarray]]:
    """Return rows of any type, dequantized and quantized by MLX; `data` is uint8[rows, bytes of a row]."""
    import gguf
    import mlx.core as mx

    try:
        values = gguf.dequantize(np.ascontiguousarray(data), gguf.GGMLQuantizationType[kind])
    except NotImplementedError:
        raise InputError(f"{where}: we cannot read type {kind}; use a file with other types") from None
    if not np.isfinite(values).all() or abs(values).max(initial=0) > np.finfo(np.float16).max:
        raise InputError(f"{where}: holds values that are not finite in float16")
    parts = mx.quantize(mx.array(values.astype(np.float16)), group_size=group, bits=bits)
    return [
        (suffix, dtype, np.array(part))
        for suffix, dtype, part in zip(("weight", "scales", "biases"), ("U32", "F16", "F16"), parts, strict=True)
    ]
