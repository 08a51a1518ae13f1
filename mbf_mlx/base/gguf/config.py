"""The settings of a GGUF file as the config.json that mlx-lm and transformers read.

It covers Llama-family architectures, as far as mlx-lm's Llama computes them. A setting that would change the model in a
way that mlx-lm lacks is refused, not dropped.
"""

from typing import Any

import numpy as np

from mbf_mlx.base.gguf.reader import GGUFFile
from mbf_mlx.errors import InputError

# Settings under "llama." that change nothing in the model; any other one that we do not read is refused.
_HARMLESS = ("vocab_size", "tensor_data_layout", "rope.scaling.finetuned")
_LARGEST = 1 << 31  # no model has larger sizes


def model_config(file: GGUFFile) -> dict[str, Any]:
    """Return config.json of the model, without vocabulary and quantization."""
    architecture = file.settings.get("general.architecture")
    if architecture != "llama":
        raise InputError(
            f"{file.path}: general.architecture: expected llama (Llama, Mistral, TinyLlama, SmolLM), got "
            f"{architecture!r}\nhint: other models load from their MLX or Hugging Face folder"
        )
    kind, parts = file.settings.get("general.type", "model"), file.settings.get("split.count", 1)
    if kind != "model":
        raise InputError(f"{file.path}: general.type: expected a whole model, got {kind!r}")
    if parts not in (0, 1):
        raise InputError(f"{file.path}: one of {parts} parts of a model\nhint: llama-gguf-split --merge joins them")
    read = _Settings(file)
    if file.settings.get("llama.expert_count"):
        raise InputError(f"{file.path}: a mixture of experts (llama.expert_count); its layers are not supported")
    hidden, heads = read("embedding_length", int), read("attention.head_count", int)
    blocks, groups = read("block_count", int), read("attention.head_count_kv", int, heads)
    if heads % groups or blocks > len(file.tensors):
        raise InputError(
            f"{file.path}: impossible sizes: {blocks} blocks in {len(file.tensors)} tensors, {heads} heads over "
            f"{groups} of keys"
        )
    head = read("attention.key_length", int, max(1, hidden // heads))
    turned, values = read("rope.dimension_count", int, head), read("attention.value_length", int, head)
    if (turned, values) != (head, head) or head % 2:
        raise InputError(
            f"{file.path}: heads of {head} dimensions with {turned} of them rotated and values of {values}: "
            "expected all to be the same even number"
        )
    config: dict[str, Any] = {
        "architectures": ["LlamaForCausalLM"],
        "attention_bias": "blk.0.attn_q.bias" in file.tensors,
        "head_dim": head,
        "hidden_act": "silu",
        "hidden_size": hidden,
        "intermediate_size": read("feed_forward_length", int),
        "max_position_embeddings": read("context_length", int),
        "mlp_bias": "blk.0.ffn_gate.bias" in file.tensors,
        "model_type": "llama",
        "num_attention_heads": heads,
        "num_hidden_layers": blocks,
        "num_key_value_heads": groups,
        "rms_norm_eps": read("attention.layer_norm_rms_epsilon", float),
        "rope_theta": read("rope.freq_base", float, 10000.0),
        "tie_word_embeddings": "output.weight" not in file.tensors,
    }
    config["rope_scaling"] = _rope_scaling(file, read, config)
    read.refuse_unread()
    return config


class _Settings:
    """The file's "llama." settings by name; remembers which were read."""

    def __init__(self, file: GGUFFile) -> None:
        self.file, self.seen = file, {*_HARMLESS, "expert_count", "expert_used_count"}

    def __call__(self, name: str, kind: type, default: Any = None) -> Any:
        self.seen.add(name)
        value = self.file.settings.get(f"llama.{name}", default)
        fits = isinstance(value, kind) and not isinstance(value, bool)
        if kind is str and fits:
            return value
        if not fits or not 0 < value < _LARGEST:
            words = {int: "a whole number above 0", float: "a number above 0", str: "a name"}[kind]
            got = "nothing" if value is None else repr(value)[:80]
            raise InputError(f"{self.file.path}: llama.{name}: expected {words}, got {got}")
        # The shortest number that is this float32: 1e-05, not 9.99e-06.
        return float(str(np.float32(value))) if kind is float else value

    def refuse_unread(self) -> None:
        unread = [name for name in self.file.settings if name.startswith("llama.") and name[6:] not in self.seen]
        if unread:
            raise InputError(f"{self.file.path}: unknown settings that may change the model: {', '.join(unread)}")


def _rope_scaling(file: GGUFFile, read: _Settings, config: dict[str, Any]) -> dict[str, Any] | None:
    """Return config.json's rope_scaling: Llama 3's from the frequency factors, or a linear one, or None."""
    kind, factor = read("rope.scaling.type", str, "none"), read("rope.scaling.factor", float, 1.0)
    context = read("rope.scaling.original_context_length", int, 8192)
    if "rope_freqs.weight" in file.tensors and kind == "none":
        return _llama3_scaling(file, config, context)
    if kind == "linear":
        return {"rope_type": "linear", "type": "linear", "factor": factor}
    if kind != "none" or "rope_freqs.weight" in file.tensors:
        raise InputError(
            f"{file.path}: llama.rope.scaling.type: expected none or linear (and then no rope_freqs.weight), got "
            f"{kind!r}"
        )
    return None


def _llama3_scaling(file: GGUFFile, config: dict[str, Any], context: int) -> dict[str, Any]:
    """Return the settings of Llama 3's RoPE that give the file's frequency factors.

    Wavelengths shorter than context / high have factor 1, those longer than context / low the full factor, and those
    between them 1 / ((1 - s) / factor + s) with s = (context / wavelength - low) / (high - low). Every Llama so far has
    low 1 and high 4: we assume these and check.
    """
    tensor = file.tensors["rope_freqs.weight"]
    half = config["head_dim"] // 2
    if tensor.type != "F32" or tensor.shape != (half,):
        raise InputError(f"{file.path}: rope_freqs.weight: expected F32 ({half},), got {tensor.type} {tensor.shape}")
    factors = np.frombuffer(file.rows(tensor).tobytes(), dtype="<f4").astype(np.float64)
    factor, low, high = max(float(factors.max()), 1.0), 1.0, 4.0
    wavelengths = 2 * np.pi * config["rope_theta"] ** (np.arange(half) / half)
    smooth = np.clip((context / wavelengths - low) / (high - low), 0, 1)
    if not np.allclose(factors, 1 / ((1 - smooth) / factor + smooth), rtol=1e-4):
        raise InputError(f"{file.path}: rope_freqs.weight: these are not Llama 3's frequency factors")
    return {
        "rope_type": "llama3",
        "factor": factor,
        "low_freq_factor": low,
        "high_freq_factor": high,
        "original_max_position_embeddings": context,
    }
