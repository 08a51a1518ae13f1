"""The `gguf` target: the whole model as one GGUF file for llama.cpp and all that stands on it. No torch.

Layers that were not learned keep the very codes that MLX stored, where GGUF has a type for them; learned ones are W +
scale * B @ A, summed in float32 and stored once. The file is written a few rows at a time. Which tensors it has is in
tensor_plan.py, their bytes in tensor_types.py, the tokenizer in vocabulary.py; read_back.py reads all of it back.
"""

import os
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import gguf
import numpy as np

from mbf_mlx.errors import InputError
from mbf_mlx.export.gguf import tensor_types as types
from mbf_mlx.export.gguf.adapter import MAKER, OURS, is_ours, pad, write_head
from mbf_mlx.export.gguf.names import Names, read_names
from mbf_mlx.export.gguf.read_back import check
from mbf_mlx.export.gguf.rope import Rope, read_rope
from mbf_mlx.export.gguf.tensor_plan import Matrix, Vector, plan
from mbf_mlx.export.gguf.vocabulary import Vocabulary, read_vocabulary
from mbf_mlx.export.place import fresh_file
from mbf_mlx.export.weights.checkpoint import Checkpoint
from mbf_mlx.export.weights.fuse import Fused, codes_on_grid, delta_rows, find_layers
from mbf_mlx.export.weights.rounding import Rounders, no_rounder
from mbf_mlx.methods import Factors

LLAMA_CPP_TYPES = ("Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K", "IQ")  # beginnings of types that only llama.cpp makes
Progress = Callable[[int, int, str], None]  # bytes done, bytes in all, the tensor at hand


@dataclass(frozen=True)
class GGUFReport:
    """What a `gguf` export did."""

    out: Path
    types: dict[str, int]  # type -> tensors
    bytes_base: int
    bytes_out: int
    kept: int  # layers with the codes of the base
    error: float  # of the layers without factors, the largest |stored - W| / |W|
    layers: list[Fused]  # those with factors
    matrices: list[Matrix]  # all that it holds
    pre_tokenizer: str
    notes: list[str] = field(default_factory=list)  # what llama.cpp does otherwise than mlx-lm

    @property
    def retention(self) -> float:
        """The mean over the layers with factors; 1 if there is none."""
        return float(np.mean([layer.retention for layer in self.layers])) if self.layers else 1.0


def write_gguf(
    base_folder: Path,
    factors: Factors,
    scale: float,
    out: Path,
    *,
    kind: str | None = None,
    name: str | None = None,
    license_id: str | None = None,
    force: bool = False,
    forbidden: tuple[Path, ...] = (),
    rounders: Rounders = no_rounder,
    progress: Progress | None = None,
    finish: Callable[[Path, GGUFReport], None] | None = None,
) -> GGUFReport:
    """Write the base with the adapter fused into it as one GGUF file.

    Args:
        base_folder: An MLX model folder, or a Hugging Face one whose tensors are named as MLX names them.
        factors: The deployed pair of every layer; none at all writes the folder as it is.
        scale: delta = scale * B @ A.
        out: The file to make; see `place.fresh_file` for what is refused.
        kind: Type of every matrix, "F16" (of 4 bits: but for the embeddings, which get 8). None keeps each layer's own
            and stores learned ones with 8 bits or, where the base is not quantized, with 16.
        name: Of the model, as servers show it.
        license_id: SPDX id of its licence.
        force: Replace an earlier export.
        forbidden: Folders to stay out of beside the base: the stream.
        rounders: Layer -> the rounder of its inputs, for learned layers that stay on the base's grid of few bits.
        progress: Called after each tensor, first as they are written, then as they are compared.
        finish: Called with the file before it gets its name.

    Raises:
        InputError: the adapter does not fit the base, a tokenizer or architecture that GGUF cannot say, or `out` may
            not be written.
        RuntimeError: what was read back is not what was meant.
    """
    chosen = _parse_kind(kind, out)
    base = Checkpoint(base_folder)
    names, rope, tensors = _plan(base, factors, chosen)
    vocabulary = read_vocabulary(base_folder, base.config)
    needs = sum(tensor.nbytes for tensor in tensors)
    with fresh_file(out, force=force, needs=needs, forbidden=(base_folder, *forbidden), is_ours=is_ours) as path:
        writer = gguf.GGUFWriter(path, names.architecture)
        _describe(writer, base.config, rope, vocabulary, tensors)
        writer.add_name(name or base_folder.resolve().name)
        if license_id:
            writer.add_license(license_id)
        steps = _Steps(2 * needs, progress)
        _write(path, writer, tensors, scale, rounders, steps)
        found = check(path, tensors, scale, vocabulary, steps.add)
        report = GGUFReport(
            out=out,
            types=dict(Counter(tensor.kind.name for tensor in tensors)),
            bytes_base=base.nbytes,
            bytes_out=path.stat().st_size,
            kept=found.kept,
            error=found.error,
            layers=found.fused,
            matrices=[tensor for tensor in tensors if isinstance(tensor, Matrix)],
            pre_tokenizer=vocabulary.pre,
            notes=list(vocabulary.notes),
        )
        if finish:
            finish(path, report)
    return report


def _plan(
    base: Checkpoint, factors: Factors, kind: gguf.GGMLQuantizationType | None
) -> tuple[Names, Rope, list[Matrix | Vector]]:
    names, rope = read_names(base.config, base.folder), read_rope(base.config, base.folder)
    return names, rope, plan(base, factors, names, rope, kind)


def planned_bytes(base_folder: Path, factors: Factors, bits: int) -> int:
    """Return the bytes of tensors that an export with these bits would have."""
    return sum(tensor.nbytes for tensor in _plan(Checkpoint(base_folder), factors, types.BITS[bits])[2])


def keeps_few_bits(base_folder: Path, factors: Factors, kind: str | None) -> bool:
    """Return whether any layer with factors would stay on the base's grid, and so has to be rounded with care."""
    chosen, layers = _parse_kind(kind, base_folder), find_layers(Checkpoint(base_folder), factors)
    return chosen is not None and any(
        Matrix("", chosen, layer, None, factors[name]).keeps_grid for name, layer in layers.items()
    )


def quantize_line(path: Path, kind: str = "Q4_K_M") -> str:
    """Return the command with which llama.cpp makes one of its own types of a file, best of one with 16 or 32 bits."""
    return f"llama-quantize {path} {path.with_name(f'{path.stem}-{kind}.gguf')} {kind}"


def _parse_kind(kind: str | None, out: Path) -> gguf.GGMLQuantizationType | None:
    if kind is None:
        return None
    name = kind.upper()
    if name in types.TYPES:
        return types.TYPES[name]
    if name.startswith(LLAMA_CPP_TYPES):
        raise InputError(
            f"{kind}: only llama.cpp itself makes this type; export with --bits 16, then: {quantize_line(out, name)}"
        )
    raise InputError(f"type: expected one of {', '.join(types.TYPES)}, got {kind!r}")


def _describe(
    writer: gguf.GGUFWriter, config: dict[str, Any], rope: Rope, vocabulary: Vocabulary, tensors: list[Matrix | Vector]
) -> None:
    """Add everything that is no tensor, and the tensors' names, types and shapes."""
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


class _Steps:
    """Counts bytes for a progress bar."""

    def __init__(self, total: int, progress: Progress | None) -> None:
        self._done, self._total, self._progress = 0, total, progress

    def add(self, nbytes: int, name: str) -> None:
        self._done += nbytes
        if self._progress:
            self._progress(self._done, self._total, name)


def _write(
    path: Path,
    writer: gguf.GGUFWriter,
    tensors: list[Matrix | Vector],
    scale: float,
    rounders: Rounders,
    steps: _Steps,
) -> None:
    """Write the file; gguf writes its head, and the tensors follow a few rows at a time."""
    write_head(writer)
    with open(path, "ab") as file:
        for tensor in tensors:
            pad(file, writer.data_alignment)
            if isinstance(tensor, Vector):
                file.write(np.ascontiguousarray(tensor.values, dtype=np.float32).data)
            else:
                for first, last in tensor.chunks():
                    file.write(_stored_rows(tensor, scale, first, last, rounders).data)
            steps.add(tensor.nbytes, tensor.name)
        pad(file, writer.data_alignment)
        file.flush()
        os.fsync(file.fileno())


def _stored_rows(tensor: Matrix, scale: float, first: int, last: int, rounders: Rounders) -> np.ndarray:
    """Return rows of the file, (rows, bytes) uint8."""
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
            rows = types.encode(weight, tensor.kind, tensor.layer.name)
    return np.ascontiguousarray(rows if tensor.order is None else rows[tensor.order])
