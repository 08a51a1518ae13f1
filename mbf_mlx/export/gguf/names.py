"""What GGUF calls a model and its tensors, and in which order it keeps the rows of q and k.

MLX and Hugging Face pair row i of the first half of a head with row i of the second half (rotary position embedding);
GGUF's `llama` pairs neighbours, so that row 2 i of a head is our row i and row 2 i + 1 our row i of the second half.
Needs a model's config alone, neither weights nor mlx.
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
    """What GGUF makes of a model_type."""

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
        """Return GGUF's name of a tensor, "model.layers.0.mlp.up_proj.weight"; None if it has none."""
        found: str | None = self._map.get_name(name, (".weight", ".bias"))
        return found

    def order(self, layer: str, out: int) -> np.ndarray | None:
        """Return which of a layer's `out` rows stands at each place in GGUF; None where all stay in their place."""
        heads = {"q_proj": self.heads, "k_proj": self.kv_heads}.get(layer.rpartition(".")[2])
        if heads is None or not self.neighbours:
            return None
        return np.arange(out).reshape(heads, 2, out // heads // 2).swapaxes(1, 2).reshape(-1)

    @cached_property
    def _map(self) -> gguf.TensorNameMap:
        return gguf.get_tensor_name_map(self.kind, self.blocks)


def read_names(config: dict[str, Any], where: Path) -> Names:
    """Return the names for the model that a config.json describes.

    Args:
        config: Its contents.
        where: The model's folder, for messages.

    Raises:
        InputError: an architecture, or a variant of one, that this export does not know.
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
