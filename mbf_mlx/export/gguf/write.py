"""The `gguf` target: the whole model as one GGUF file for llama.cpp and the programs built on it. No torch.

Layers without factors keep the codes that MLX stored, where GGUF has a type for them. Layers with factors become W +
scale * B @ A, summed in float32 and stored once. The file is written a few rows at a time. tensor_plan.py says which
tensors it has, tensor_types.py makes their bytes, vocabulary.py the tokenizer; read_back.py reads all of it back.
"""

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import gguf
import numpy as np

from mbf_mlx.base.gguf.names import Names, read_names
from mbf_mlx.errors import InputError, quoted
from mbf_mlx.export.gguf import tensor_types as types
from mbf_mlx.export.gguf.adapter import MAKER, OURS, is_ours, pad, write_head
from mbf_mlx.export.gguf.read_back import check
from mbf_mlx.export.gguf.rope import Rope, read_rope
from mbf_mlx.export.gguf.tensor_plan import Matrix, Vector, plan
from mbf_mlx.export.gguf.vocabulary import Vocabulary, read_vocabulary
from mbf_mlx.export.job import Count, Job
from mbf_mlx.export.place import fresh_file
from mbf_mlx.export.weights.checkpoint import Checkpoint
from mbf_mlx.export.weights.fuse import Fused, codes_on_grid, delta_rows
from mbf_mlx.export.weights.rounding import Rounders, no_rounder
from mbf_mlx.files.storage import flush

LLAMA_CPP_TYPES = ("Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K", "IQ")  # first letters of types that only llama.cpp makes


@dataclass(frozen=True)
class GGUFReport:
    """What a `gguf` export did."""

    types: dict[str, int]  # type -> number of tensors
    bytes_base: int
    bytes_out: int
    kept: int  # layers that keep the base's codes
    error: float  # the largest |stored - W| / |W| of a layer without factors
    layers: list[Fused]  # those with factors
    matrices: list[Matrix]  # all matrices of the file
    notes: list[str] = field(default_factory=list)  # where llama.cpp differs from mlx-lm


def write_gguf(
    job: Job, rounders: Rounders = no_rounder, finish: Callable[[Path, GGUFReport], None] | None = None
) -> GGUFReport:
    """Write the base with the adapter fused into it as one GGUF file, called as the file is without its suffix.

    `job.kind` or `job.bits` name the type of every matrix; with 4 bits the embeddings get 8, and 16 are F16 or BF16,
    whichever weights/half_type.py chooses. Without them each layer
    keeps its own type, and layers with factors get 8 bits, or 16 where the base is not quantized.

    Args:
        job: The export. Without any factors the base is written as it is.
        rounders: Layer -> the rounder of its inputs, for learned layers that stay on the base's grid of few bits.
        finish: Called with the file before it gets its name.

    Raises:
        InputError: the adapter does not fit the base, GGUF cannot express its tokenizer or architecture, or `job.out`
            may not be written.
        RuntimeError: what was read back is not what was meant.
    """
    chosen, base = _type(job), Checkpoint(job.base)
    names, rope, tensors = _plan(base, job, chosen)
    vocabulary = read_vocabulary(job.base, base.config, job.chat_template, job.template == "none")
    needs = sum(tensor.nbytes for tensor in tensors)
    with fresh_file(job.out, force=job.force, needs=needs, forbidden=job.off_limits, is_ours=is_ours) as path:
        writer = gguf.GGUFWriter(path, names.architecture)
        _describe(writer, base.config, rope, vocabulary, tensors)
        writer.add_name(job.out.stem)
        if job.about.licence:
            writer.add_license(job.about.licence)
        with job.counting(2 * needs) as count:
            _write(path, writer, tensors, job.scale, rounders, count)
            found = check(path, tensors, job.scale, vocabulary, count)
        report = GGUFReport(
            types=dict(Counter(tensor.kind.name for tensor in tensors)),
            bytes_base=base.nbytes,
            bytes_out=path.stat().st_size,
            kept=found.kept,
            error=found.error,
            layers=found.fused,
            matrices=[tensor for tensor in tensors if isinstance(tensor, Matrix)],
            notes=list(vocabulary.notes),
        )
        if finish:
            finish(path, report)
    return report


def _plan(
    base: Checkpoint, job: Job, kind: gguf.GGMLQuantizationType | None
) -> tuple[Names, Rope, list[Matrix | Vector]]:
    names, rope = read_names(base.config, base.folder), read_rope(base.config, base.folder)
    return names, rope, plan(base, job.factors, job.scale, names, rope, kind, named=job.kind is not None)


def planned_bytes(job: Job, bits: int) -> int:
    """Return the bytes of tensors that the export would have with these bits."""
    return sum(tensor.nbytes for tensor in _plan(Checkpoint(job.base), job, types.BITS[bits])[2])


def keeps_few_bits(job: Job) -> bool:
    """Return whether any layer with factors would stay on the base's grid, and so has to be rounded with care."""
    if (chosen := _type(job)) is None:
        return False
    return any(isinstance(each, Matrix) and each.keeps_grid for each in _plan(Checkpoint(job.base), job, chosen)[2])


def has_float_type(job: Job) -> bool:
    """Return whether every matrix is to have 16 or 32 bits, so that llama.cpp can make its own types of the file."""
    return _type(job) in (types.Type.F32, types.Type.F16, types.Type.BF16)


def quantize_line(path: Path, kind: str = "Q4_K_M") -> str:
    """Return the command that turns a file, best one of 16 or 32 bits, into one of llama.cpp's own types."""
    return f"llama-quantize {quoted(path)} {quoted(path.with_name(f'{path.stem}-{kind}.gguf'))} {kind}"


def _type(job: Job) -> gguf.GGMLQuantizationType | None:
    """Return the GGUF type that --type or --bits names; None where neither is given. That of 16 bits is measured."""
    if job.kind is None:
        if job.bits is not None and job.bits not in types.BITS:
            raise InputError(f"--bits: expected one of {', '.join(map(str, types.BITS))} for GGUF, got {job.bits}")
        if job.bits == 16:
            return types.FLOAT_TYPES[job.float_type()]
        return None if job.bits is None else types.BITS[job.bits]
    name = job.kind.upper()
    if name in types.TYPES:
        return types.TYPES[name]
    if name.startswith(LLAMA_CPP_TYPES):
        raise InputError(
            f"--type: only llama.cpp makes {job.kind}; export with --bits 16, then: {quantize_line(job.out, name)}"
        )
    raise InputError(f"--type: expected one of {', '.join(types.TYPES)}, got {job.kind!r}")


def _describe(
    writer: gguf.GGUFWriter, config: dict[str, Any], rope: Rope, vocabulary: Vocabulary, tensors: list[Matrix | Vector]
) -> None:
    """Add the file's settings, and the names, types and shapes of its tensors."""
    matrices = Counter(tensor.kind for tensor in tensors if isinstance(tensor, Matrix))
    heads = config["num_attention_heads"]
    writer.add_type(gguf.GGUFType.MODEL)
    writer.add_string(MAKER, OURS)
    writer.add_file_type(types.FILE_TYPES[matrices.most_common(1)[0][0]])
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_context_length(config.get("max_position_embeddings") or 2048)
    writer.add_embedding_length(config["hidden_size"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(heads)
    writer.add_head_count_kv(config.get("num_key_value_heads") or heads)
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_vocab_size(config["vocab_size"])
    if config.get("head_dim"):
        writer.add_key_length(config["head_dim"])
        writer.add_value_length(config["head_dim"])
    rope.add_to(writer)
    vocabulary.add_to(writer)
    for tensor in tensors:
        writer.add_tensor_info(tensor.name, tensor.shape, np.dtype(np.float32), tensor.nbytes, tensor.kind)


def _write(
    path: Path,
    writer: gguf.GGUFWriter,
    tensors: list[Matrix | Vector],
    scale: float,
    rounders: Rounders,
    count: Count,
) -> None:
    """Write the file: its head by gguf, then the tensors a few rows at a time."""
    write_head(writer)
    with open(path, "ab") as file:
        for tensor in tensors:
            pad(file, writer.data_alignment)
            if isinstance(tensor, Vector):
                file.write(np.ascontiguousarray(tensor.values, dtype=np.float32).data)
            else:
                for first, last in tensor.chunks():
                    file.write(_stored_rows(tensor, scale, first, last, rounders).data)
            count(tensor.nbytes)
        pad(file, writer.data_alignment)
        file.flush()
        flush(file.fileno())


def _stored_rows(tensor: Matrix, scale: float, first: int, last: int, rounders: Rounders) -> np.ndarray:
    """Return rows of a matrix as the file stores them, (rows, bytes) uint8."""
    if tensor.is_kept:
        rows = types.kept_rows(tensor.layer, tensor.kind, first, last)
    else:
        weight = tensor.layer.rows(first, last)
        if tensor.pair is not None:
            weight = weight + delta_rows(tensor.pair, scale, first, last)
        if tensor.keeps_grid:
            found = codes_on_grid(tensor.layer, weight, (first, last), rounders(tensor.layer.name))
            rows = types.pack_codes(*found, tensor.kind)
        else:
            rows = types.encode_rows(weight, tensor.kind, tensor.layer.name)
    return np.ascontiguousarray(rows if tensor.order is None else rows[tensor.order])
