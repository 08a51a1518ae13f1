"""A base model with factors attached, ready to learn and to be scored."""

import importlib.metadata
import platform
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from mbf_mlx.base.decisive_files import decisive_files
from mbf_mlx.base.load import Base, load_base
from mbf_mlx.base.sources import unpacked_bytes
from mbf_mlx.config import LearnConfig, LoRAConfig, Precision, TrainConfig
from mbf_mlx.device import backend, bfloat16
from mbf_mlx.engine.choose import prepare
from mbf_mlx.engine.engine import Engine
from mbf_mlx.engine.lora_layers import attach, write_factors
from mbf_mlx.learning.team import Team
from mbf_mlx.memory.limit import limit_of
from mbf_mlx.methods import Factors, Layers, Pair


@dataclass(frozen=True)
class Learner:
    """A base model with factors attached, ready to learn into a stream and to be scored."""

    base: Base
    layers: Layers
    engine: Engine
    lora: LoRAConfig
    packed: bool  # quantized weights stay packed

    @property
    def tokenizer(self) -> Any:
        """The base's tokenizer, as mlx-lm wraps it."""
        return self.base.tokenizer

    @property
    def context(self) -> int | None:
        """The most tokens that the base can read, answer included; None where its config.json does not say."""
        stated = self.base.config.get("max_position_embeddings")
        return stated if isinstance(stated, int) and stated > 0 else None

    def described(self) -> dict[str, Any]:
        """Return what another process needs to hold the same."""
        base: dict[str, Any] = {"path": str(self.base.path), "fingerprint": self.base.fingerprint}
        base["files"] = decisive_files(self.base.path)
        return base | {"lora": asdict(self.lora), "packed": self.packed}

    def apply_limits(self, settings: LearnConfig) -> None:
        """Let the engine keep to the settings: its precision, whether it recomputes activations, where it stops.

        Raises:
            InputError: the settings ask for products in bfloat16, which cannot be had here.
        """
        checkpoint, by_hand = settings.train.grad_checkpoint, self.engine.by_hand
        precision, most = precision_of(settings.train), settings.memory_limit
        self.engine.multiply_in(precision)
        limit = limit_of(self.base.path, self.lora, by_hand, self.packed, checkpoint, precision == "bfloat16", most)
        self.engine.checkpoint = checkpoint
        self.engine.before = limit or (lambda batch, training: None)
        if limit:
            self.engine.room = limit.room

    def deploy(self, factors: Factors) -> None:
        """Let the model apply these factors, without dropout; no factors make it the base model again."""
        nothing = {
            name: Pair(np.zeros((1, inner), np.float32), np.zeros((out, 1), np.float32))
            for name, (out, inner) in self.layers.items()
        }
        self.base.model.eval()
        write_factors(self.base.model, factors or nothing)


# A base's folder, which layers get factors, whether quantized weights stay packed on a CPU.
LoadLearner = Callable[[Path, LoRAConfig, bool], Learner]


def load_learner(folder: Path, lora: LoRAConfig, keep_quantized: bool = False) -> Learner:
    """Load a base model in the form that trains fastest on this device, with factors attached.

    Args:
        folder: The base model's folder, as `sources.resolve_base` returns it.
        lora: Which layers get factors.
        keep_quantized: Keep quantized weights packed on a CPU, too.
    """
    device = backend.setup()
    packed = keep_quantized or backend.keep_quantized(unpacked_bytes(folder))
    base = load_base(folder, dequantize=not packed, dtype=device.dtype)
    layers = attach(base.model, lora)
    return Learner(base, layers, prepare(base.model), lora, packed)


def precision_of(config: TrainConfig) -> Precision:
    """Return the precision of settings in which it is decided (`precision.chosen`); undecided is float32."""
    return "bfloat16" if config.precision == "bfloat16" else "float32"


def run_conditions(team: Team | None = None, precision: Precision = "float32") -> dict[str, Any]:
    """Return what a bit-identical continuation needs besides the same run: device, threads, processes, versions.

    Args:
        team: The processes that share each step, if there are several.
        precision: Of the products with frozen weights; for bfloat16 the library that multiplies is named.
    """
    device = backend.setup()
    processes = {"processes": team.size} if team else {}
    products = {"products": bfloat16.reason()} if precision == "bfloat16" else {}
    return (
        processes
        | products
        | {
            "device": device.kind,
            "processor": platform.machine(),
            "threads": device.threads,
            "dtype": device.dtype or "the model's",
            "mlx": importlib.metadata.version("mlx"),
            "mlx_lm": importlib.metadata.version("mlx-lm"),
        }
    )
