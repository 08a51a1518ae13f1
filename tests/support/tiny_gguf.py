"""Writes tiny GGUF files with the gguf package: a random two-layer Llama with its vocabulary, in any tensor types."""

import json

import gguf
import numpy as np

from tests.support.tiny_llama import TEMPLATE, write_tokenizer

HIDDEN, INNER, HEADS, GROUPS, BLOCKS = 64, 128, 4, 2, 2
TYPES = gguf.GGMLQuantizationType
NORMAL, CONTROL = 1, 3


def tiny_weights(vocabulary, seed=0, blocks=BLOCKS, tied=False):
    """Return a Llama's weights as float32, by their names in Hugging Face's files."""
    random = np.random.default_rng(seed)
    head = HIDDEN // HEADS

    def matrix(out, inner):
        return (random.standard_normal((out, inner)) * 2.5 / np.sqrt(inner)).astype(np.float32)

    weights = {"model.embed_tokens.weight": matrix(vocabulary, HIDDEN), "model.norm.weight": np.ones(HIDDEN, "f4")}
    if not tied:
        weights["lm_head.weight"] = matrix(vocabulary, HIDDEN)
    for block in range(blocks):
        name = f"model.layers.{block}"
        weights |= {
            f"{name}.self_attn.q_proj.weight": matrix(HEADS * head, HIDDEN),
            f"{name}.self_attn.k_proj.weight": matrix(GROUPS * head, HIDDEN),
            f"{name}.self_attn.v_proj.weight": matrix(GROUPS * head, HIDDEN),
            f"{name}.self_attn.o_proj.weight": matrix(HIDDEN, HEADS * head),
            f"{name}.mlp.gate_proj.weight": matrix(INNER, HIDDEN),
            f"{name}.mlp.up_proj.weight": matrix(INNER, HIDDEN),
            f"{name}.mlp.down_proj.weight": matrix(HIDDEN, INNER),
            f"{name}.input_layernorm.weight": (1 + 0.1 * random.standard_normal(HIDDEN)).astype(np.float32),
            f"{name}.post_attention_layernorm.weight": (1 + 0.1 * random.standard_normal(HIDDEN)).astype(np.float32),
        }
    return weights


def interleaved(rows, heads):
    """Return rows of q or k in llama.cpp's order, as its converter writes them."""
    return rows.reshape(heads, 2, len(rows) // heads // 2, *rows.shape[1:]).swapaxes(1, 2).reshape(rows.shape)


def byte_level_vocabulary(folder):
    """Return tokens, types and merges of the tiny Llama's own tokenizer, and leave its files in `folder`."""
    write_tokenizer(folder)
    content = json.loads((folder / "tokenizer.json").read_text())
    ids = content["model"]["vocab"]
    tokens = sorted(ids, key=ids.get)
    special = {token["content"] for token in content["added_tokens"]}
    merges = [pair if isinstance(pair, str) else " ".join(pair) for pair in content["model"]["merges"]]
    return tokens, [CONTROL if token in special else NORMAL for token in tokens], merges


def write_tiny_gguf(path, scratch, *, types="F32", settings=None, weights=None, drop=(), extra=(), blocks=BLOCKS):
    """Write a GGUF file and return its weights by their names in Hugging Face's files, as the file holds them.

    Args:
        path: The file.
        scratch: A folder for the tokenizer's own files.
        types: The type of every matrix, or types by the end of its GGUF name ("attn_q.weight") with "" for the others.
        settings: Changed settings, by their full names; a setting with the value None is left out.
        weights: Weights to use instead of random ones.
        drop, extra: Names of tensors to leave out; (name, array, type) of tensors to add.
        blocks: Number of blocks.
    """
    scratch.mkdir(parents=True, exist_ok=True)
    tokens, kinds, merges = byte_level_vocabulary(scratch)
    weights = weights or tiny_weights(len(tokens), blocks=blocks)
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, blocks)
    changed = {
        "general.architecture": "llama",
        "llama.block_count": blocks,
        "llama.context_length": 512,
        "llama.embedding_length": HIDDEN,
        "llama.feed_forward_length": INNER,
        "llama.attention.head_count": HEADS,
        "llama.attention.head_count_kv": GROUPS,
        "llama.attention.layer_norm_rms_epsilon": 1e-5,
        "llama.rope.freq_base": 10000.0,
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "gpt-2",
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": kinds,
        "tokenizer.ggml.merges": merges,
        "tokenizer.ggml.bos_token_id": tokens.index("<|im_start|>"),
        "tokenizer.ggml.eos_token_id": tokens.index("<|im_end|>"),
        "tokenizer.chat_template": TEMPLATE,
    } | (settings or {})
    writer = gguf.GGUFWriter(path, changed.pop("general.architecture"))
    for key, value in changed.items():
        add_setting(writer, key, value)
    held = {}
    for name, values in weights.items():
        target = names.get_name(name, try_suffixes=(".weight", ".bias"))
        if target in drop:
            continue
        chosen = types if isinstance(types, str) else next(
            kind for end, kind in types.items() if target.endswith(end) or not end
        )  # fmt: skip
        kind = TYPES[chosen] if values.ndim == 2 else TYPES.F32
        data = gguf.quantize(values, kind)
        held[name] = gguf.dequantize(data, kind).reshape(values.shape)
        if name.endswith(("q_proj.weight", "k_proj.weight", "q_proj.bias", "k_proj.bias")):
            data = interleaved(data, HEADS if "q_proj" in name else GROUPS)
        writer.add_tensor(target, data, raw_dtype=kind)
    for name, data, kind in extra:
        writer.add_tensor(name, data, raw_dtype=TYPES[kind])
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return held


def add_setting(writer, key, value):
    """Add a setting with the type that llama.cpp's converter uses."""
    if value is None:
        return
    if isinstance(value, bool):
        writer.add_bool(key, value)
    elif isinstance(value, str):
        writer.add_string(key, value)
    elif isinstance(value, float):
        writer.add_float32(key, value)
    elif isinstance(value, int):
        writer.add_uint32(key, value)
    else:
        writer.add_array(key, list(value))
