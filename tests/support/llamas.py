"""Random models of mlx-lm's with LoRA factors, rows of tokens, and their loss by way of all logits."""

import importlib
from dataclasses import dataclass

import mlx.core as mx
import numpy as np
from mlx import nn
from mlx.utils import tree_flatten, tree_map
from mlx_lm.tuner.utils import linear_to_lora_layers

VOCABULARY = 61
KEYS = ("self_attn.q_proj", "self_attn.v_proj")
LLAMA = {
    "model_type": "llama",
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "intermediate_size": 96,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "rms_norm_eps": 1e-5,
    "vocab_size": VOCABULARY,
    "rope_theta": 10000.0,
    "tie_word_embeddings": True,
}


@dataclass(frozen=True)
class Row:
    tokens: np.ndarray
    supervised: np.ndarray


def build(config, *, bits=0, keys=KEYS, seed=0, trained=None, **changes):
    """A random model of two layers with LoRA factors that already do something."""
    config = config | changes
    module = importlib.import_module(f"mlx_lm.models.{config['model_type']}")
    mx.random.seed(seed)
    model = module.Model(module.ModelArgs.from_dict(config))
    # Random weights of mlx's size leave every layer nearly silent; much larger ones make rounding grow.
    model.update({"model": {"layers": tree_map(lambda w: 1.5 * w, model.model.parameters()["layers"])}})
    if bits:
        nn.quantize(model, group_size=32, bits=bits)
    model.freeze()
    linear_to_lora_layers(
        model, trained or config["num_hidden_layers"], {"rank": 4, "scale": 2.0, "dropout": 0.0, "keys": keys}
    )
    factors = {name: 0.1 * mx.random.normal(value.shape) for name, value in tree_flatten(model.trainable_parameters())}
    model.load_weights(list(factors.items()), strict=False)
    mx.eval(model.parameters())
    return model


def rows_with(prefix, tails, supervised_tail=3, seed=0):
    """Rows of `prefix` common tokens and `tails` more, of which the last ones are supervised."""
    rng = np.random.default_rng(seed)
    common = rng.integers(1, VOCABULARY, prefix)
    rows = []
    for own in tails:
        tokens = np.concatenate([common, rng.integers(1, VOCABULARY, own)]).astype(np.int32)
        rows.append(Row(tokens, np.arange(len(tokens)) >= len(tokens) - supervised_tail))
    return rows


def plain_loss(model, rows):
    """The loss by way of all logits of each row by itself: no padding, no prefix, no picking."""
    total = mx.array(0.0)
    for row in rows:
        logits = model(mx.array(row.tokens[None, :-1]))[0]
        right = mx.take_along_axis(logits, mx.array(row.tokens[1:])[:, None], axis=-1)[:, 0]
        losses = mx.logsumexp(logits, axis=-1) - right
        total = total + (losses * mx.array(row.supervised[1:].astype(np.float32))).sum()
    return total
