"""GGUF's names for a model and its tensors, and its order of the rows of q and k, for reading and writing such files.

The names are those of the gguf library. Rotary position embedding turns pairs of rows of a head: MLX and Hugging Face
pair row i of its first half with row i of its second half, GGUF's `llama` pairs neighbours. So GGUF's row 2 i is our
row i, and its row 2 i + 1 is our row i of the second half. Reads config.json alone; needs neither weights nor mlx.
"""

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import gguf
import numpy as np

from mbf_mlx.errors import InputError


@dataclass(frozen=True)
class Architecture:
    """GGUF's side of a model_type."""

    kind: gguf.MODEL_ARCH
    neighbours: bool  # llama.cpp pairs neighbouring rows of q and k


ARCHITECTURES = {
    "llama": Architecture(gguf.MODEL_ARCH.LLAMA, True),
    "mistral": Architecture(gguf.MODEL_ARCH.LLAMA, True),
    "qwen2": Architecture(gguf.MODEL_ARCH.QWEN2, False),
    "qwen3": Architecture(gguf.MODEL_ARCH.QWEN3, False),
}


@dataclass(frozen=True)
class Names:
    """GGUF's names for one model, and the order of its rows."""

    kind: gguf.MODEL_ARCH
    blocks: int
    heads: int  # of q
    kv_heads: int  # of k and v
    neighbours: bool  # rows of q and k change their order

    @property
    def architecture(self) -> str:
        """The value of `general.architecture`."""
        return str(gguf.MODEL_ARCH_NAMES[self.kind])

    def tensor(self, name: str) -> str | None:
        """Return GGUF's name of a tensor such as "model.layers.0.mlp.up_proj.weight"; None if it has none."""
        found: str | None = self._map.get_name(name, (".weight", ".bias"))
        return found

    def order(self, layer: str, out: int) -> np.ndarray | None:
        """Return which of a layer's `out` rows is at each place in GGUF, (out,); None where all stay in place."""
        heads = {"q_proj": self.heads, "k_proj": self.kv_heads}.get(layer.rpartition(".")[2])
        if heads is None or not self.neighbours:
            return None
        return np.arange(out).reshape(heads, 2, out // heads // 2).swapaxes(1, 2).reshape(-1)

    @cached_property
    def _map(self) -> gguf.TensorNameMap:
        return gguf.get_tensor_name_map(self.kind, self.blocks)


def read_names(config: dict[str, Any], where: Path) -> Names:
    """Return GGUF's names for the model that a config.json describes.

    Args:
        config: The contents of config.json.
        where: The model's folder, for messages.

    Raises:
        InputError: an architecture, or a variant of one, that has no such GGUF files.
    """
    architecture = ARCHITECTURES.get(config.get("model_type", ""))
    if architecture is None:
        raise InputError(
            f"{where}: model_type: a GGUF file can be made of {', '.join(ARCHITECTURES)}, got "
            f"{config.get('model_type')!r}; export mlx, or export peft and use llama.cpp's own converters"
        )
    if "sliding_attention" in (config.get("layer_types") or []):
        raise InputError(f"{where}: layer_types: GGUF files of this architecture have full attention in every block")
    heads = config["num_attention_heads"]
    return Names(
        kind=architecture.kind,
        blocks=config["num_hidden_layers"],
        heads=heads,
        kv_heads=config.get("num_key_value_heads") or heads,
        neighbours=architecture.neighbours and not config.get("rope_traditional"),
    )
