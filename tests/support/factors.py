"""Random factors of a base model in a folder, and the logits of that model with and without them."""

import numpy as np

from mbf_mlx.export.weights.checkpoint import Checkpoint
from mbf_mlx.methods import Pair

SCALE = 2.0
ALL_KEYS = (*(f"self_attn.{key}_proj" for key in "qkvo"), *(f"mlp.{key}_proj" for key in ("gate", "up", "down")))


def make_factors(folder, keys=("self_attn.q_proj", "self_attn.v_proj"), rank=4, size=0.03, seed=0):
    """Random factors whose delta has `size` of the length of the weight it is added to."""
    base, generator, factors = Checkpoint(folder), np.random.default_rng(seed), {}
    for name in base.layer_names():
        if name.endswith(keys):
            layer = base.layer(name)
            (out, inner), weight = layer.shape, layer.rows()
            a, b = generator.normal(size=(rank, inner)), generator.normal(size=(out, rank))
            b *= size * np.linalg.norm(weight) / np.linalg.norm(SCALE * b @ a)
            factors[name] = Pair(a.astype(np.float32), b.astype(np.float32))
    return factors


def logits(folder, factors=None):
    """Logits of a fixed prompt, with the factors attached to the float32 weights where they are given."""
    import mlx.core as mx
    import mlx_lm.utils

    model, _ = mlx_lm.utils.load_model(folder)
    model = mlx_lm.utils.dequantize_model(model)
    model.set_dtype(mx.float32)
    for name, pair in (factors or {}).items():
        layer = model
        for part in name.split("."):
            layer = layer[int(part)] if part.isdigit() else layer[part]
        layer.weight = layer.weight + SCALE * mx.array(pair.b) @ mx.array(pair.a)
    return np.array(model(mx.array([[5, 17, 200, 31, 8, 99, 250, 12]])))[0]
