"""Factors that do something, as an adapter folder, too, and what they do to a model's logits."""

import mlx.core as mx
import numpy as np

from mbf_mlx.adapters import mlx_lm as adapter
from mbf_mlx.engine.lora_layers import lora_layers
from mbf_mlx.methods import Pair


def random_factors(factors, size=0.05):
    random = np.random.default_rng(1)
    return {
        name: Pair(pair.a, (size * random.standard_normal(pair.b.shape)).astype(np.float32))
        for name, pair in factors.items()
    }


def write_adapter(folder, factors, config, blocks):
    folder.mkdir()
    files = adapter.adapter_files(factors, scale=config.scale, num_layers=blocks, base="tiny")
    for name, content in files.items():
        (folder / name).write_bytes(content)


def effect(model):
    """The largest difference that the factors make to any logit of a short row; 0 where they do nothing."""
    layers, tokens = lora_layers(model), mx.arange(1, 9)[None]
    with_factors = model(tokens)
    kept = {name: layer.lora_b for name, layer in layers.items()}
    for layer in layers.values():
        layer.lora_b = mx.zeros_like(layer.lora_b)
    difference = mx.abs(with_factors.astype(mx.float32) - model(tokens).astype(mx.float32)).max().item()
    for name, layer in layers.items():
        layer.lora_b = kept[name]
    return difference
