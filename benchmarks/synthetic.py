"""Model folders of any Llama's shape with random packed weights: what benchmarks measure where no real model is.

Codes are drawn, scales set so that a layer keeps the size of its input; the tokenizer is the tests' own, of 300 tokens.
"""

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

GROUP = 64
# hidden, intermediate, heads, key-value heads, head size, blocks, vocabulary, whether head and embedding are one
SHAPES = {
    "tiny": (64, 128, 4, 2, 16, 2, 300, False),
    "small": (512, 1536, 8, 2, 64, 8, 8_192, True),
    "llama-1b": (2048, 8192, 32, 8, 64, 16, 128_256, True),
    "llama-8b": (4096, 14_336, 32, 8, 128, 32, 128_256, False),
    "large-vocabulary": (512, 1536, 8, 2, 64, 4, 128_256, True),
}


def config_of(shape: str, **changes: Any) -> dict[str, Any]:
    """Return the config.json of a shape."""
    hidden, intermediate, heads, kv_heads, head_dim, blocks, vocabulary, tied = SHAPES[shape]
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": hidden,
        "intermediate_size": intermediate,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "head_dim": head_dim,
        "num_hidden_layers": blocks,
        "vocab_size": vocabulary,
        "tie_word_embeddings": tied,
        "rms_norm_eps": 1e-5,
        "rope_theta": 10000.0,
        "max_position_embeddings": 8192,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "quantization": {"group_size": GROUP, "bits": 4, "mode": "affine"},
    } | changes


def layers_of_block(hidden: int, intermediate: int, queries: int, keys: int) -> dict[str, tuple[int, int]]:
    """Return the (out, in) of the seven linear layers of a block; queries and keys are the widths of all heads."""
    return {
        "self_attn.q_proj": (queries, hidden),
        "self_attn.k_proj": (keys, hidden),
        "self_attn.v_proj": (keys, hidden),
        "self_attn.o_proj": (hidden, queries),
        "mlp.gate_proj": (intermediate, hidden),
        "mlp.up_proj": (intermediate, hidden),
        "mlp.down_proj": (hidden, intermediate),
    }


def write_model(folder: Path, shape: str, **changes: Any) -> Path:
    """Write a model folder where it is not there yet, and return it."""
    if (folder / "config.json").exists():
        return folder
    from tests.support.tiny_llama import write_tokenizer

    config = config_of(shape, **changes)
    group = config["quantization"]["group_size"]
    folder.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(0)
    hidden, intermediate, vocabulary = config["hidden_size"], config["intermediate_size"], config["vocab_size"]
    queries = config["num_attention_heads"] * config["head_dim"]
    keys = config["num_key_value_heads"] * config["head_dim"]
    parts = layers_of_block(hidden, intermediate, queries, keys)
    for block in range(config["num_hidden_layers"]):
        name = f"model.layers.{block}"
        tensors = {f"{name}.{norm}.weight": np.ones(hidden, np.float16) for norm in
                   ("input_layernorm", "post_attention_layernorm")}  # fmt: skip
        for part, (out, inner) in parts.items():
            tensors |= _packed(f"{name}.{part}", out, inner, group, rng)
        _save(folder / f"model-{block:05}.safetensors", tensors)
    tensors = {"model.norm.weight": np.ones(hidden, np.float16)}
    for name in ("model.embed_tokens",) if config["tie_word_embeddings"] else ("model.embed_tokens", "lm_head"):
        tensors |= _packed(name, vocabulary, hidden, group, rng)
    _save(folder / "model-head.safetensors", tensors)
    write_tokenizer(folder)
    (folder / "config.json").write_text(json.dumps(config, indent=1))
    return folder


def _packed(name: str, out: int, inner: int, group: int, rng: np.random.Generator) -> dict[str, np.ndarray]:
    """Return a weight of 4 bits, (out, inner), of codes 0 to 15 around 7.5."""
    codes = rng.integers(0, 2**32, (out, inner // 8), np.uint32)
    scale = 1 / (4.6 * np.sqrt(inner))  # 4.6 is the deviation of the codes
    shape = (out, inner // group)
    return {
        f"{name}.weight": codes,
        f"{name}.scales": np.full(shape, scale, np.float16),
        f"{name}.biases": np.full(shape, -7.5 * scale, np.float16),
    }


def _save(path: Path, tensors: dict[str, np.ndarray]) -> None:
    from safetensors.numpy import save_file

    save_file(tensors, path, {"format": "mlx"})
