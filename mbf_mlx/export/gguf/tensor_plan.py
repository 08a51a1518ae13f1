"""The tensors of a GGUF file: their names, types and shapes, the order of their rows, and their sources."""

from dataclasses import dataclass
from functools import cached_property

import gguf
import numpy as np

from mbf_mlx.base.gguf.names import Names
from mbf_mlx.errors import InputError
from mbf_mlx.export.gguf import tensor_types as types
from mbf_mlx.export.gguf.rope import Rope
from mbf_mlx.export.gguf.tensor_types import Type
from mbf_mlx.export.weights.checkpoint import CHUNK_ELEMENTS, COMPUTED, Checkpoint, Layer
from mbf_mlx.export.weights.fuse import SAFE_BITS, delta_rows, find_layers
from mbf_mlx.methods import Factors, Pair

FOUR_BITS = (Type.Q4_0, Type.Q4_1)
LARGE_UPDATE = 0.1  # of the weights' length; a larger one gets a new grid
EMBEDDINGS = ("token_embd.weight", "output.weight")
ROPE_FREQS = "rope_freqs.weight"


@dataclass(frozen=True)
class Matrix:
    """A layer's weight in the file."""

    name: str
    kind: gguf.GGMLQuantizationType
    layer: Layer
    order: np.ndarray | None  # which of our rows is at each place; None where all stay in place
    pair: Pair | None  # the learned factors; None without any
    scale: float  # delta = scale * B @ A

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

    @cached_property
    def keeps_grid(self) -> bool:
        """Whether it has factors and stays on the base's grid of few bits, so that it needs careful rounding.

        A grid of less than 4 bits is coarser than the file's type, and a large update does not fit into the base's.
        """
        own = self.layer.setting
        if self.pair is None or own is None or not 4 <= own.bits < SAFE_BITS or not types.keeps(self.layer, self.kind):
            return False
        weights = updates = 0.0
        for first, last in self.chunks():
            weights += float(np.square(self.layer.rows(first, last), dtype=np.float64).sum())
            updates += float(np.square(delta_rows(self.pair, self.scale, first, last), dtype=np.float64).sum())
        return updates <= LARGE_UPDATE**2 * weights

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
    base: Checkpoint,
    factors: Factors,
    scale: float,
    names: Names,
    rope: Rope,
    kind: gguf.GGMLQuantizationType | None,
    named: bool = False,
) -> list[Matrix | Vector]:
    """Return the file's tensors in their order.

    Args:
        base: The model's folder.
        factors: The deployed pair of every layer; a pair whose B is zero changes nothing and counts as none.
        names: GGUF's names of the model's tensors.
        rope: Its factors, if any, become a tensor.
        scale: delta = scale * B @ A.
        kind: The type of every matrix; None chooses one for each.
        named: Whether the user named the type, and not its bits alone: then no other type of so many bits is taken.

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
            tensors.append(
                Matrix(target, _choose(target, layers[layer], pair, kind, named), layers[layer], order, pair, scale)
            )
        else:
            values = tensor.floats()
            tensors.append(Vector(target, values if order is None or part != "bias" else values[order]))
    if homeless:
        raise InputError(f"{base.folder}: GGUF's {names.architecture} has no place for\n" + "\n".join(homeless))
    return tensors if rope.factors is None else [*tensors, Vector(ROPE_FREQS, rope.factors)]


def _choose(
    target: str, layer: Layer, pair: Pair | None, kind: gguf.GGMLQuantizationType | None, named: bool
) -> gguf.GGMLQuantizationType:
    own = types.own_type(layer)
    if kind is None:
        kind = own if pair is None else types.fused_type(layer)
    elif kind in FOUR_BITS and own in FOUR_BITS and (target in EMBEDDINGS or not named):
        kind = own  # the base's codes fit into it
    elif kind in FOUR_BITS and target in EMBEDDINGS:
        kind = Type.Q8_0  # 4 bits here would harm every token; llama.cpp's own tool avoids it, too
    return types.fitting(kind, layer.shape[1])
