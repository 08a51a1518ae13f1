"""Rotary position embedding in GGUF's words: base frequency, scaling, and the factors of Llama 3.

config.json has them in `rope_theta` and `rope_scaling` or, since version 5 of transformers, in `rope_parameters`. Both
are read; `rope_parameters` takes precedence.
"""

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gguf
import numpy as np

from mbf_mlx.errors import InputError


@dataclass(frozen=True)
class Rope:
    """A model's rotary position embedding."""

    theta: float
    dims: int  # numbers of a head
    linear_factor: float | None = None  # positions are divided by it
    factors: np.ndarray | None = None  # (dims / 2,) float32, the divisor of each frequency

    def add_to(self, writer: gguf.GGUFWriter) -> None:
        """Add the settings to a file; the factors are a tensor."""
        writer.add_rope_dimension_count(self.dims)
        writer.add_rope_freq_base(self.theta)
        if self.linear_factor is not None:
            writer.add_rope_scaling_type(gguf.RopeScalingType.LINEAR)
            writer.add_rope_scaling_factor(self.linear_factor)


def read_rope(config: dict[str, Any], where: Path) -> Rope:
    """Return the rotary position embedding that a config.json describes.

    Raises:
        InputError: a scaling that GGUF files of ours cannot express.
    """
    scaling = config.get("rope_parameters") or config.get("rope_scaling") or {}
    theta = float(scaling.get("rope_theta") or config.get("rope_theta") or 10000.0)
    dims = config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"]
    kind = scaling.get("rope_type") or scaling.get("type") or "default"
    if kind == "default":
        return Rope(theta, dims)
    if kind == "linear":
        return Rope(theta, dims, linear_factor=float(scaling["factor"]))
    if kind == "llama3":
        return Rope(theta, dims, factors=llama3_factors(theta, dims, scaling))
    raise InputError(f"{where}: rope scaling: expected default, linear or llama3, got {kind!r}; export mlx or peft")


def llama3_factors(theta: float, dims: int, scaling: dict[str, Any]) -> np.ndarray:
    """Return Llama 3's divisor of each frequency, (dims / 2,) float32: 1 for short waves, `factor` for long ones.

    Source: Llama 3.1's reference code (apply_scaling); mlx-lm's Llama3RoPE computes the same.
    """
    factor, original = scaling["factor"], scaling.get("original_max_position_embeddings", 8192)
    low, high = scaling.get("low_freq_factor", 1.0), scaling.get("high_freq_factor", 4.0)
    exponents = np.arange(0, dims, 2, dtype=np.float32) / np.float32(dims)
    # Two divisions, in the order of llama.cpp's converter, give the same last bit as that one.
    waves = np.float32(2 * math.pi) / (1 / np.float32(theta) ** exponents)  # positions of a full turn
    smooth = (np.float32(original) / waves - np.float32(low)) / np.float32(high - low)
    between = 1 / ((1 - smooth) / np.float32(factor) + smooth)
    long_or_between = np.where(waves > original / low, np.float32(factor), between)
    return np.where(waves < original / high, np.float32(1), long_or_between).astype(np.float32)
