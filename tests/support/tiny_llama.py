"""Writes a complete, tiny MLX model folder: a random two-layer Llama and a tokenizer trained on the text below."""

import json

TEXT = """The stream learns one task after another and keeps what it has learned before.
A short mail asks whether the meeting on Monday can be moved to Tuesday at three.
Please answer yes or no, and say which label fits: sports, music, travel, cooking or news.
The train to the coast was late, so we read the paper and talked about the weather.
Fry the onions in butter, add the rice, stir, and pour in the hot stock little by little.
She sang the second song twice because the people in the last row asked for it.
Is the review positive or negative? The film was long, loud and, in the end, very good.
"""
VOCABULARY = 300
TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
CONFIG = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "max_position_embeddings": 512,
    "tie_word_embeddings": False,
    "vocab_size": VOCABULARY,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "torch_dtype": "float32",
}


def write_tiny_llama(folder, *, bits=4, group_size=32, seed=0, **changes):
    """Write the model into `folder`. With `bits=None` it is not quantized; `changes` change its config."""
    import mlx.core as mx
    import mlx.nn as nn
    from mlx.utils import tree_flatten, tree_map
    from mlx_lm.models import llama

    config = {**CONFIG, **changes}
    folder.mkdir(parents=True)
    mx.random.seed(seed)
    model = llama.Model(llama.ModelArgs.from_dict(config))
    # Larger than a real initialization, so that both layers matter and logits differ clearly.
    model.update(tree_map(lambda value: 2.5 * value if value.ndim == 2 else value, model.parameters()))
    if bits is not None:
        nn.quantize(model, group_size=group_size, bits=bits)
        config["quantization"] = {"group_size": group_size, "bits": bits, "mode": "affine"}
    mx.save_safetensors(str(folder / "model.safetensors"), dict(tree_flatten(model.parameters())), {"format": "mlx"})
    write_tokenizer(folder)
    # Written last: a folder with config.json is complete.
    (folder / "config.json").write_text(json.dumps(config, indent=2))
    return folder


def write_tokenizer(folder):
    """Write a byte-level BPE tokenizer with a ChatML template, whose end token is <|im_end|>."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=["<|endoftext|>", "<|im_start|>", "<|im_end|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(TEXT.splitlines(), trainer)
    tokenizer.save(str(folder / "tokenizer.json"))
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": "<|im_start|>",
        "eos_token": "<|im_end|>",
        "unk_token": "<|endoftext|>",
        "pad_token": "<|im_end|>",
        "clean_up_tokenization_spaces": False,
        "model_max_length": CONFIG["max_position_embeddings"],
        "chat_template": TEMPLATE,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(settings, indent=2))
