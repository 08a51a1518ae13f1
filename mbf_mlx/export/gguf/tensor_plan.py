"""The tensors of a GGUF file: their names, types and shapes, the order of their rows, and their sources."""

from dataclasses import dataclass

import gguf
import numpy as np

from mbf_mlx.base.gguf.names import Names
from mbf_mlx.errors import InputError
from mbf_mlx.export.gguf import tensor_types as types
from mbf_mlx.export.gguf.rope import Rope
from mbf_mlx.export.gguf.tensor_types import Type
from mbf_mlx.export.weights.checkpoint import CHUNK_ELEMENTS, Checkpoint, Layer
from mbf_mlx.export.weights.fuse import SAFE_BITS, find_layers
from mbf_mlx.methods import Factors, Pair

EMBEDDINGS = ("token_embd.weight", "output.weight")
ROPE_FREQS = "rope_freqs.weight"
COMPUTED = ("rotary_emb.inv_freq", "rotary_emb.freqs")  # in some folders, though config.json suffices


@dataclass(frozen=True)
class Matrix:
    """A layer's weight in the file."""

    name: str
    kind: gguf.GGMLQuantizationType
    layer: Layer
    order: np.ndarray | None  # which of our rows is at each place; None where all stay in place
    pair: Pair | None  # the learned factors; None without any

    @property
    def shape(self) -> tuple[int, ...]:
        """(out, in)."""
        return self.layer.shape

    @property
    def nbytes(self) -> int:
        """Bytes in the file."""
        return self.shape[0] * types.row_bytes(self.kind, self.shape[1])

    @property
    def is_kept(self) -> bool:
        """Whether it keeps the codes that the base stores."""
        return self.pair is None and types.keeps(self.layer, self.kind)

    @property
    def keeps_grid(self) -> bool:
        """Whether it has factors and stays on the base's grid of few bits, so that it needs careful rounding."""
        own = self.layer.setting
        return self.pair is not None and own is not None and own.bits < SAFE_BITS and types.keeps(self.layer, self.kind)

    def chunks(self) -> list[tuple[int, int]]:
        """Return ranges of rows to work on, one at a time; all rows at once if they change places."""
        out, inner = self.shape
        step = out if self.order is not None else max(1, CHUNK_ELEMENTS // inner)
        return [(first, min(first + step, out)) for first in range(0, out, step)]


@dataclass(frozen=True)
class Vector:
    """A small tensor in the file, always float32: a norm, a linear layer's bias, the factors of the rope."""

    name: str
    values: np.ndarray
    kind: gguf.GGMLQuantizationType = Type.F32

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of the values."""
        return self.values.shape

    @property
    def nbytes(self) -> int:
        """Bytes in the file."""
        return self.values.nbytes


def plan(
    base: Checkpoint, factors: Factors, names: Names, rope: Rope, kind: gguf.GGMLQuantizationType | None
) -> list[Matrix | Vector]:
    """Return the file's tensors in their order.

    Args:
        base: The model's folder.
        factors: The deployed pair of every layer; a pair whose B is zero changes nothing and counts as none.
        names: GGUF's names of the model's tensors.
        rope: Its factors, if any, become a tensor.
        kind: The type of every matrix; None chooses one for each.

    Raises:
        InputError: names every tensor of the base that has no place in the file.
    """
    touched = find_layers(base, factors)
    layers = {layer: touched.get(layer) or base.layer(layer) for layer in base.layer_names()}
    tied = base.config.get("tie_word_embeddings", True)
    tensors: list[Matrix | Vector] = []
    homeless = []
    for name, tensor in base.tensors.items():
        layer, _, part = name.rpartition(".")
        if (part in ("scales", "biases") and layer in layers) or name.endswith(COMPUTED):
            continue
        if tied and layer == "lm_head" and layer not in factors:
            continue  # mlx-lm leaves it out, too
        target = names.tensor(name)
        if target is None or (tied and layer == "lm_head"):
            homeless.append(f"  {name}")
            continue
        order = names.order(layer, tensor.shape[0])
        if part == "weight" and layer in layers:
            pair = factors.get(layer)
            pair = pair if pair is not None and np.any(pair.b) else None
            tensors.append(Matrix(target, _choose(target, layers[layer], pair, kind), layers[layer], order, pair))
        else:
            values = tensor.floats()
            tensors.append(Vector(target, values if order is None or part != "bias" else values[order]))
    if homeless:
        raise InputError(f"{base.folder}: GGUF's {names.architecture} has no place for\n" + "\n".join(homeless))
    return tensors if rope.factors is None else [*tensors, Vector(ROPE_FREQS, rope.factors)]


def _choose(
    target: str, layer: Layer, pair: Pair | None, kind: gguf.GGMLQuantizationType | None
) -> gguf.GGMLQuantizationType:
    if kind is None:
        kind = types.own_type(layer) if pair is None else types.fused_type(layer)
    elif target in EMBEDDINGS and kind in (Type.Q4_0, Type.Q4_1):
        kind = Type.Q8_0  # 4 bits here would harm every token; llama.cpp's own tool avoids it, too
    return types.fitting(kind, layer.shape[1])
