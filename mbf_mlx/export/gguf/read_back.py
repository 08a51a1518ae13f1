"""Opens a written GGUF file with gguf's reader and compares it with what was meant.

Every weight is decoded as llama.cpp decodes it and compared with W + delta, computed again from the base; delta = scale
* B @ A. A difference is a bug of ours or a fault of the disk, so it is no InputError.
"""

from dataclasses import dataclass
from pathlib import Path

import gguf
import numpy as np

from mbf_mlx.export.gguf import tensor_types as types
from mbf_mlx.export.gguf.tensor_plan import Matrix, Vector
from mbf_mlx.export.gguf.tensor_types import Type
from mbf_mlx.export.gguf.vocabulary import Vocabulary
from mbf_mlx.export.job import Count
from mbf_mlx.export.weights.fuse import Form, Fused, Survival, delta_rows

# The largest |stored - meant| / |meant| of a layer that rounding can explain. Normally distributed weights lose .005 at
# 8 bits and .08 at 4; a wrong order or scale gives 1 and more.
TOLERANCE = {Type.F32: 1e-6, Type.F16: 2e-3, Type.BF16: 1e-2, Type.Q8_0: 0.05, Type.Q5_1: 0.01}
TOLERANCE |= {Type.Q4_1: 0.5, Type.Q4_0: 0.5}


@dataclass(frozen=True)
class Found:
    """What a file was found to hold."""

    fused: list[Fused]  # the layers with factors
    kept: int  # layers that keep the base's codes
    error: float  # the largest |stored - W| / |W| of a layer without factors


def check(path: Path, tensors: list[Matrix | Vector], scale: float, vocabulary: Vocabulary, count: Count) -> Found:
    """Compare a file with what was meant.

    Args:
        path: The file.
        tensors: What it should hold.
        scale: delta = scale * B @ A.
        vocabulary: What it should say of its tokenizer.
        count: Called after each tensor with its bytes.

    Raises:
        RuntimeError: with every tensor and setting that is not what was meant.
    """
    reader = _Reader(path)
    stored, fused, kept, error = {tensor.name: tensor for tensor in reader.tensors}, [], 0, 0.0
    wrong = sorted(stored.keys() - {tensor.name for tensor in tensors}) + _wrong_settings(reader, vocabulary)
    for tensor in tensors:
        found = stored.get(tensor.name)
        if found is None or found.tensor_type != tensor.kind or tuple(found.shape) != tensor.shape[::-1]:
            wrong.append(tensor.name)
        elif isinstance(tensor, Vector):
            wrong += [] if np.array_equal(found.data, tensor.values) else [tensor.name]
        else:
            survival, lost = _measure(tensor, found.data, scale)
            wrong += [] if lost <= TOLERANCE[tensor.kind] else [tensor.name]
            if tensor.pair is not None:
                fused.append(_fused(tensor, survival))
            else:
                kept, error = kept + tensor.is_kept, max(error, lost)
        count(tensor.nbytes)
    if wrong:
        raise RuntimeError(f"{path}: what was read back is not what was meant: {', '.join(wrong)}")
    return Found(fused, kept, error)


class _Reader(gguf.GGUFReader):
    """gguf's reader, three times as fast on a vocabulary: it slices its data often, and a memmap's slices are slow."""

    @property
    def data(self) -> np.ndarray:
        return self._plain

    @data.setter
    def data(self, mapped: np.ndarray) -> None:
        self._plain = np.asarray(mapped)


def _wrong_settings(reader: _Reader, vocabulary: Vocabulary) -> list[str]:
    expected = {
        "tokens": vocabulary.tokens,
        "token_type": vocabulary.types,
        "merges": vocabulary.merges,
        "scores": None if vocabulary.scores is None else [float(np.float32(score)) for score in vocabulary.scores],
        "pre": vocabulary.pre,
        **{f"{_KEYS.get(kind, kind)}_token_id": token for kind, token in vocabulary.special.items()},
    }
    fields = {key: reader.get_field(f"tokenizer.ggml.{key}") for key in expected}
    found = {key: None if field is None else field.contents() for key, field in fields.items()}
    return [f"tokenizer.ggml.{key}" for key in expected if found[key] != expected[key]]


_KEYS = {"unk": "unknown", "pad": "padding"}


def _measure(tensor: Matrix, data: np.ndarray, scale: float) -> tuple[Survival, float]:
    """Return how much of a layer's update survived, and |stored - meant| / |meant| of its weights."""
    survival, total, lost = Survival(), 0.0, 0.0
    for first, last in tensor.chunks():
        weight = tensor.layer.rows(first, last)
        delta = np.zeros_like(weight) if tensor.pair is None else delta_rows(tensor.pair, scale, first, last)
        stored = types.decode_rows(data[first:last], tensor.kind)
        if tensor.order is not None:
            stored = stored[np.argsort(tensor.order)]
        survival.add(weight, delta, stored)
        total += float(np.square(weight + delta, dtype=np.float64).sum())
        lost += float(np.square(stored - (weight + delta), dtype=np.float64).sum())
    return survival, float(np.sqrt(lost / total)) if total else float(np.sqrt(lost))


@dataclass(frozen=True)
class StoredMatrix:
    """A layer's weight as a file holds it; `rows` gives what llama.cpp reads, in the order of MLX's rows."""

    shape: tuple[int, ...]
    kind: gguf.GGMLQuantizationType
    data: np.ndarray  # (out, bytes) of the file, mapped
    place: np.ndarray | None  # where each of our rows stands; None where all stay

    def rows(self, first: int = 0, last: int | None = None) -> np.ndarray:
        """Return rows `first` to `last` of W, (rows, in) float32."""
        chosen = slice(first, last) if self.place is None else self.place[first:last]
        return types.decode_rows(self.data[chosen], self.kind)


def stored_matrices(path: Path, matrices: list[Matrix]) -> dict[str, StoredMatrix]:
    """Return the layers of a file that do not keep the base's own codes, by their name in MLX."""
    found = {tensor.name: tensor for tensor in _Reader(path).tensors}
    return {
        each.layer.name: StoredMatrix(
            each.shape, each.kind, found[each.name].data, None if each.order is None else np.argsort(each.order)
        )
        for each in matrices
        if not each.is_kept
    }


def _fused(tensor: Matrix, survival: Survival) -> Fused:
    numbers = {"size": survival.size, "retention": survival.retention, "error": survival.error}
    before = str(Form(tensor.layer.setting, tensor.layer.dtype))
    return Fused(tensor.layer.name, before, tensor.kind.name, tensor.layer.nbytes, tensor.nbytes, **numbers)
