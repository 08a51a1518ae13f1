"""A GGUF file becomes an MLX folder with the same weights and the same tokens, or is refused with the reason.

Long, because it is a table of files that fit or are refused, each with the whole message.
"""

import json
import re
import struct
import time

import gguf
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from mbf_mlx.base.gguf.convert import convert
from mbf_mlx.base.gguf.reader import read_gguf
from mbf_mlx.base.gguf.tokenizer import read_vocabulary, write_tokenizer
from mbf_mlx.errors import InputError
from mbf_mlx.files.safetensors_file import read_header
from tests.conftest import import_mlx
from tests.support.tiny_gguf import (
    HEADS,
    HIDDEN,
    TYPES,
    byte_level_vocabulary,
    interleaved,
    tiny_weights,
    write_tiny_gguf,
)

import_mlx()
KEPT = ["F32", "F16", "BF16", "Q4_0", "Q4_1", "Q8_0"]


@pytest.fixture
def write(tmp_path):
    """Write a tiny GGUF file; returns its path and its weights as the file holds them."""

    def write_file(**changes):
        path = tmp_path / "tiny.gguf"
        return path, write_tiny_gguf(path, tmp_path / "scratch", **changes)

    return write_file


@pytest.fixture
def converted(tmp_path):
    """Convert a GGUF file into a new folder, and return that."""

    def convert_file(path, **options):
        folder = tmp_path / "converted"
        folder.mkdir()
        convert(path, folder, **options)
        return folder

    return convert_file


def loaded_weights(folder):
    """Return the weights of a folder as mlx-lm loads them, unpacked in float32 by mlx."""
    import mlx.core as mx
    from mlx.utils import tree_flatten
    from mlx_lm.utils import load_model

    model, config = load_model(folder)
    arrays = dict(tree_flatten(model.parameters()))
    weights = {}
    for name, array in arrays.items():
        stem, _, kind = name.rpartition(".")
        if kind == "weight" and f"{stem}.scales" in arrays:
            setting = {**config["quantization"], **(config["quantization"].get(stem) or {})}
            scales, biases = arrays[f"{stem}.scales"], arrays[f"{stem}.biases"]
            array = mx.dequantize(
                array, scales.astype(mx.float32), biases.astype(mx.float32), setting["group_size"], setting["bits"]
            )
        if kind not in ("scales", "biases"):
            weights[name] = np.array(array.astype(mx.float32))
    return weights


def assert_same(got, expected):
    assert got.keys() == expected.keys()
    for name in expected:
        np.testing.assert_array_equal(got[name], expected[name], err_msg=name)


@pytest.mark.parametrize("kind", KEPT)
def test_every_kept_type_becomes_exactly_the_weights_that_gguf_reads(write, converted, kind):
    path, held = write(types=kind)
    assert_same(loaded_weights(converted(path)), held)


def test_a_file_of_mixed_types_keeps_each_layer_as_it_is(write, converted):
    types = {"attn_q.weight": "Q4_0", "token_embd.weight": "Q8_0", "ffn_down.weight": "F16", "": "Q4_1"}
    path, held = write(types=types)
    folder = converted(path)
    assert_same(loaded_weights(folder), held)
    quantization = json.loads((folder / "config.json").read_text())["quantization"]
    assert (quantization["bits"], quantization["group_size"]) == (4, 32)
    assert quantization["model.embed_tokens"] == {"bits": 8, "group_size": 32, "mode": "affine"}
    assert quantization["model.layers.1.mlp.down_proj"] is False


def test_the_logits_are_those_of_the_model_before_it_became_a_gguf(tmp_path, write, converted):
    import mlx.core as mx
    from mlx_lm import load
    from mlx_lm.models import llama

    from tests.support.tiny_llama import CONFIG, VOCABULARY

    weights = tiny_weights(VOCABULARY, seed=3)
    path, _ = write(weights=weights)
    original = llama.Model(llama.ModelArgs.from_dict(CONFIG))
    original.load_weights([(name, mx.array(value)) for name, value in weights.items()])
    tokens = mx.arange(3, 30)[None]
    model, tokenizer = load(str(converted(path)))
    np.testing.assert_array_equal(np.array(model(tokens)), np.array(original(tokens)))
    assert tokenizer.eos_token_ids == {0, 2}


def test_tied_embeddings_and_biases_come_along(write, converted):
    weights = tiny_weights(300, tied=True)
    for block in range(2):
        for layer, out in (("q", HIDDEN), ("k", HIDDEN // 2), ("v", HIDDEN // 2), ("o", HIDDEN)):
            weights[f"model.layers.{block}.self_attn.{layer}_proj.bias"] = np.linspace(-1, 1, out, dtype=np.float32)
    path, held = write(weights=weights, types="Q4_1")
    folder = converted(path)
    assert_same(loaded_weights(folder), held)
    config = json.loads((folder / "config.json").read_text())
    assert config["tie_word_embeddings"] and config["attention_bias"]


def test_other_types_are_refused_and_the_hint_names_quantize(write, converted):
    path, _ = write(types={"ffn_down.weight": "Q5_0", "ffn_up.weight": "Q5_1", "": "Q4_0"})
    with pytest.raises(InputError, match=r"2 of type Q5_0, 2 of type Q5_1(.|\n)*hint: --quantize 4"):
        converted(path)


def test_quantize_requantizes_what_mlx_cannot_hold_and_keeps_the_rest(write, converted):
    path, held = write(types={"ffn_down.weight": "Q5_0", "attn_v.weight": "F16", "": "Q4_0"})
    folder = converted(path, quantize=8)
    weights = loaded_weights(folder)
    kept = [name for name in held if "down_proj" not in name and "v_proj" not in name]
    assert_same({name: weights[name] for name in kept}, {name: held[name] for name in kept})
    for name in set(held) - set(kept):
        step = np.ptp(held[name]) / 255
        np.testing.assert_allclose(weights[name], held[name], atol=step)
    quantization = json.loads((folder / "config.json").read_text())["quantization"]
    assert quantization["model.layers.0.mlp.down_proj"] == {"bits": 8, "group_size": 64, "mode": "affine"}


def test_k_quants_that_gguf_reads_can_be_quantized_anew(write, converted):
    random = np.random.default_rng(0)
    blocks = random.integers(0, 256, (HIDDEN, 210), dtype=np.uint8)  # Q6_K: 256 weights a block, its scale at the end
    blocks[:, 208:] = np.full((HIDDEN, 1), 0.01, np.float16).view(np.uint8)
    weights = tiny_weights(300)
    for name in [name for name in weights if ".mlp." in name]:
        out, inner = weights[name].shape
        weights[name] = np.zeros((256 if out == 128 else out, 256 if inner == 128 else inner), np.float32)
    name = "blk.0.ffn_down.weight"
    path, _ = write(
        weights=weights, drop=(name,), extra=[(name, blocks, "Q6_K")], settings={"llama.feed_forward_length": 256}
    )
    weights = loaded_weights(converted(path, quantize=8))
    expected = gguf.dequantize(blocks, TYPES.Q6_K)
    np.testing.assert_allclose(weights["model.layers.0.mlp.down_proj.weight"], expected, atol=np.ptp(expected) / 255)


def test_a_scale_too_large_for_float16_is_refused(write, converted):
    path, _ = write(types="Q8_0")
    file = read_gguf(path)
    tensor = file.tensors["blk.1.attn_v.weight"]
    content = bytearray(path.read_bytes())
    content[tensor.offset : tensor.offset + 2] = np.float16(600.0).tobytes()  # 128 times it is beyond float16
    path.write_bytes(content)
    with pytest.raises(InputError, match="blk.1.attn_v.weight: holds scales that are not finite"):
        converted(path)


# --- config ---


def test_the_config_has_the_settings_of_the_file(write, converted):
    path, _ = write(settings={"llama.rope.freq_base": 500000.0, "llama.attention.layer_norm_rms_epsilon": 1e-6})
    config = json.loads((converted(path) / "config.json").read_text())
    assert config["rope_theta"] == 500000.0
    assert config["rms_norm_eps"] == 1e-6
    assert (config["num_attention_heads"], config["num_key_value_heads"], config["head_dim"]) == (4, 2, 16)
    assert (config["bos_token_id"], config["eos_token_id"], config["vocab_size"]) == (1, 2, 300)


def llama3_factors(theta, head, factor=8.0, context=8192):
    """Return Llama 3's frequency factors, one dimension after the other."""
    factors = []
    for place in range(0, head, 2):
        wavelength = 2 * np.pi * theta ** (place / head)
        if wavelength < context / 4:
            factors.append(1.0)
        elif wavelength > context:
            factors.append(factor)
        else:
            smooth = (context / wavelength - 1) / 3
            factors.append(1 / ((1 - smooth) / factor + smooth))
    return np.array(factors, dtype=np.float32)


def test_llama_3_frequency_factors_become_its_rope_scaling(write, converted):
    factors = llama3_factors(500000.0, 16, factor=32.0)
    assert len(set(factors)) > 2  # some dimension lies between
    path, _ = write(settings={"llama.rope.freq_base": 500000.0}, extra=[("rope_freqs.weight", factors, "F32")])
    folder = converted(path)
    config = json.loads((folder / "config.json").read_text())
    assert config["rope_scaling"] == {
        "rope_type": "llama3",
        "factor": 32.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    }
    # and mlx-lm turns by the frequencies that llama.cpp divides by these factors
    from mlx_lm.utils import load_model

    rope = load_model(folder)[0].layers[0].self_attn.rope
    plain = 500000.0 ** (np.arange(0, 16, 2) / 16)
    np.testing.assert_allclose(np.array(rope._freqs), plain * factors, rtol=1e-5)


def test_other_frequency_factors_are_refused(write, converted):
    factors = np.linspace(1, 8, 8, dtype=np.float32)
    path, _ = write(extra=[("rope_freqs.weight", factors, "F32")])
    with pytest.raises(InputError, match="these are not Llama 3's frequency factors"):
        converted(path)


def test_linear_rope_scaling_is_kept(write, converted):
    path, _ = write(settings={"llama.rope.scaling.type": "linear", "llama.rope.scaling.factor": 4.0})
    config = json.loads((converted(path) / "config.json").read_text())
    assert config["rope_scaling"] == {"rope_type": "linear", "type": "linear", "factor": 4.0}


REFUSED_SETTINGS = {
    "another architecture": ({"general.architecture": "qwen2"}, "general.architecture: expected llama .* got 'qwen2'"),
    "an adapter": ({"general.type": "adapter"}, "general.type: expected a whole model, got 'adapter'"),
    "a split file": ({"split.count": 3}, "one of 3 parts of a model"),
    "experts": ({"llama.expert_count": 8}, "mixture of experts"),
    "no size": ({"llama.embedding_length": None}, "llama.embedding_length: expected a whole number .* got nothing"),
    "size zero": (
        {"llama.feed_forward_length": 0},
        "llama.feed_forward_length: expected a whole number above 0, got 0",
    ),
    "size in words": ({"llama.block_count": "two"}, "llama.block_count: expected a whole number above 0, got 'two'"),
    "size in truth": ({"llama.block_count": True}, "llama.block_count: expected a whole number above 0, got True"),
    "absurd blocks": ({"llama.block_count": 4000000000}, "llama.block_count: expected a whole number above 0"),
    "many blocks": ({"llama.block_count": 1000000}, "impossible sizes: 1000000 blocks in 21 tensors"),
    "odd heads": ({"llama.attention.head_count_kv": 3}, "impossible sizes: .* 4 heads over 3 of keys"),
    "partial rotation": ({"llama.rope.dimension_count": 8}, "heads of 16 dimensions with 8 of them rotated"),
    "yarn": ({"llama.rope.scaling.type": "yarn"}, "llama.rope.scaling.type: expected none or linear .* 'yarn'"),
    "unknown setting": ({"llama.logit_scale": 0.5}, "unknown settings that may change the model: llama.logit_scale"),
    "epsilon not a number": (
        {"llama.attention.layer_norm_rms_epsilon": float("nan")},
        "llama.attention.layer_norm_rms_epsilon: expected a number above 0, got nan",
    ),
    "fewer rows than tokens": ({"tokenizer.ggml.tokens": [f"t{i}" for i in range(301)]}, "expected a type for each"),
    "no tokenizer": ({"tokenizer.ggml.tokens": None}, "tokenizer.ggml.tokens: expected a list of tokens"),
    "other tokenizer": ({"tokenizer.ggml.model": "t5"}, "tokenizer.ggml.model: expected gpt2 .* got 't5'"),
    "other pre-tokenizer": ({"tokenizer.ggml.pre": "viking"}, "tokenizer.ggml.pre: expected one of .* got 'viking'"),
    "no pre-tokenizer": ({"tokenizer.ggml.pre": None}, "tokenizer.ggml.pre: expected one of .* got 'default'"),
    "no merges": ({"tokenizer.ggml.merges": None}, "tokenizer.ggml.merges: missing"),
    "wrong merges": (
        {"tokenizer.ggml.merges": ["a b", "qq zz"]},
        "merges: 'a b' is no pair|merges: 'qq zz' is no pair",
    ),
    "special token outside": ({"tokenizer.ggml.bos_token_id": 300}, "bos_token_id: expected 0 to 299, got 300"),
}


@pytest.mark.parametrize("name", REFUSED_SETTINGS)
def test_settings_that_do_not_fit_are_refused_with_the_reason(write, converted, name):
    changes, message = REFUSED_SETTINGS[name]
    path, _ = write(settings=changes)
    with pytest.raises(InputError, match=message) as refusal:
        converted(path)
    assert str(path) in str(refusal.value)


def test_every_tensor_that_does_not_fit_is_named(write, converted):
    path, _ = write(
        drop=("blk.0.attn_k.weight", "output_norm.weight"),
        extra=[
            ("blk.0.attn_k.weight", np.zeros((HIDDEN, HIDDEN), np.float32), "F32"),
            ("blk.0.attn_sinks.weight", np.zeros(4, np.float32), "F32"),
        ],
    )
    with pytest.raises(InputError) as refusal:
        converted(path)
    message = str(refusal.value)
    assert "blk.0.attn_k.weight: expected shape (32, 64), got (64, 64)" in message
    assert "blk.0.attn_sinks.weight: not part of a Llama of 2 blocks" in message
    assert "model.norm.weight: missing" in message


# --- the file's header ---


def header(*, version=3, tensors=0, settings=0, rest=b""):
    return b"GGUF" + struct.pack("<IQQ", version, tensors, settings) + rest


def string(text):
    return struct.pack("<Q", len(text)) + text


def setting(key, kind, value):
    return string(key) + struct.pack("<I", kind) + value


def tensor(name=b"x", shape=(32,), kind=0, offset=0):
    return string(name) + struct.pack(f"<I{len(shape)}QIQ", len(shape), *shape, kind, offset)


DAMAGED_HEADERS = {
    "empty": (b"", "not a GGUF file|cannot read"),
    "another format": (b"PK\x03\x04" + bytes(100), "not a GGUF file: expected it to begin with GGUF"),
    "only a magic": (b"GGUF", "its header would end behind the file's 4 bytes"),
    "old": (header(version=1, rest=bytes(64)), "expected GGUF version 2 or 3, got 1"),
    "big-endian": (header(version=0x03000000, rest=bytes(64)), "a big-endian file"),
    "absurd settings": (header(settings=1 << 60), "settings and 0 tensors would end behind"),
    "absurd tensors": (header(tensors=1 << 50), "tensors would end behind"),
    "key too long": (header(settings=1, rest=struct.pack("<Q", 1 << 40) + bytes(64)), "expected at most 65535 bytes"),
    "value cut off": (header(settings=1, rest=setting(b"a", 8, struct.pack("<Q", 500))), "a would end behind"),
    "unknown kind": (header(settings=1, rest=setting(b"abc", 99, bytes(8))), "abc: unknown type 99"),
    "not UTF-8": (header(settings=1, rest=setting(b"\xff\xfe", 4, bytes(8))), "is not UTF-8"),
    "set twice": (header(settings=2, rest=2 * setting(b"abcd", 4, bytes(4))), "abcd is set twice"),
    "array too long": (
        header(settings=1, rest=setting(b"a", 9, struct.pack("<IQ", 4, 1 << 40))), "expected at most 16,777,216 items"
    ),
    "array cut off": (header(settings=1, rest=setting(b"a", 9, struct.pack("<IQ", 4, 1000))), "a would end behind"),
    "array of arrays": (header(settings=1, rest=setting(b"a", 9, struct.pack("<IQ", 9, 1))), "items of type 9"),
    "alignment": (
        header(settings=1, rest=setting(b"general.alignment", 4, struct.pack("<I", 24))), "a power of two, got 24"
    ),
    "dimensions": (header(tensors=1, rest=tensor(shape=(1,) * 5) + bytes(64)), "expected 1 to 4 dimensions, got 5"),
    "no dimensions": (header(tensors=1, rest=tensor(shape=()) + bytes(64)), "expected 1 to 4 dimensions, got 0"),
    "empty tensor": (header(tensors=1, rest=tensor(shape=(32, 0)) + bytes(64)), r"impossible shape \(0, 32\)"),
    "overflowing shape": (header(tensors=1, rest=tensor(shape=(1 << 33, 1 << 33)) + bytes(64)), "impossible shape"),
    "tensor type": (header(tensors=1, rest=tensor(kind=77) + bytes(64)), "unknown type 77"),
    "removed type": (header(tensors=1, rest=tensor(kind=4) + bytes(64)), "unknown type 4"),
    "block": (header(tensors=1, rest=tensor(shape=(33,), kind=2) + bytes(64)), "rows of 33 are not whole Q4_0 blocks"),
    "offset": (header(tensors=1, rest=tensor(offset=7) + bytes(256)), "offset 7 is not a multiple of 32"),
    "offset far away": (header(tensors=1, rest=tensor(offset=1 << 40) + bytes(256)), "was it cut off"),
    "data cut off": (header(tensors=1, rest=tensor(shape=(1000,)) + bytes(256)), "of a file of .* was it cut off"),
    "overlap": (
        header(tensors=2, rest=tensor(b"one") + tensor(b"two", offset=96) + bytes(999)), "two overlaps tensor one"
    ),
    "tensor twice": (header(tensors=2, rest=2 * tensor(b"twin") + bytes(256)), "tensor twin is there twice"),
}  # fmt: skip


@pytest.mark.parametrize("name", DAMAGED_HEADERS)
def test_damaged_headers_are_refused_with_the_reason(tmp_path, name):
    content, message = DAMAGED_HEADERS[name]
    path = tmp_path / "damaged.gguf"
    path.write_bytes(content)
    with pytest.raises(InputError, match=message) as refusal:
        read_gguf(path)
    assert str(path) in str(refusal.value)


def test_a_missing_file_and_a_folder_are_refused(tmp_path):
    for path in (tmp_path / "absent.gguf", tmp_path):
        with pytest.raises(InputError, match="cannot read"):
            read_gguf(path)


@pytest.fixture(scope="module")
def tiny_file(tmp_path_factory):
    """The bytes of a tiny GGUF file, and where its tensor data begin."""
    folder = tmp_path_factory.mktemp("tiny")
    write_tiny_gguf(folder / "tiny.gguf", folder / "scratch", types="Q4_1", blocks=1)
    content = (folder / "tiny.gguf").read_bytes()
    return content, min(tensor.offset for tensor in read_gguf(folder / "tiny.gguf").tensors.values())


@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_no_change_of_header_bytes_ends_in_anything_but_a_model_or_a_refusal(tmp_path, tiny_file, data):
    content, begin = tiny_file
    changed = bytearray(content)
    for _ in range(data.draw(st.integers(1, 4))):
        place = data.draw(st.integers(0, begin - 1))
        piece = data.draw(st.binary(min_size=1, max_size=9))
        changed[place : place + len(piece)] = piece
    path = tmp_path / "changed.gguf"
    path.write_bytes(changed[: data.draw(st.sampled_from([len(changed), begin, begin // 2, len(changed) - 1]))])
    try:
        file = read_gguf(path)
    except InputError as refusal:
        assert str(path) in str(refusal)
        return
    assert all(0 < tensor.offset and tensor.offset + tensor.nbytes <= len(changed) for tensor in file.tensors.values())


@settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_no_changed_setting_ends_in_anything_but_a_folder_or_a_refusal(tmp_path_factory, tiny_file, data):
    content, begin = tiny_file
    changed = bytearray(content)
    # Behind the key of a "llama." setting stand its type and value.
    places = [match.end() for match in re.finditer(rb"llama\.[a-z_.]+", bytes(content[:begin]))]
    place = data.draw(st.sampled_from(places))
    piece = data.draw(st.binary(min_size=8, max_size=8))
    changed[place + 4 : place + 4 + data.draw(st.integers(1, 4))] = piece[: data.draw(st.integers(1, 4))]
    folder = tmp_path_factory.mktemp("changed")
    (folder / "changed.gguf").write_bytes(changed)
    (folder / "out").mkdir()
    try:
        convert(folder / "changed.gguf", folder / "out")
    except InputError:
        return
    read_header(folder / "out" / "model.safetensors")


# --- the tokenizer ---

MIXED = [
    "The capital of France is Paris.",
    "  two  spaces   three    and a tab\tand\n\n\nlines \r\n",
    "Don't, I'LL, we've: 1234567 and 3.14159",
    "Zażółć gęślą jaźń, naïve café, ﬁ ligature, e\u0301",
    "नमस्ते 中文字符 日本語 العربية 한국어 ελληνικά",
    "😀🎉👩‍👩‍👧 \u200b zero width",
    "def f(x):\n        return x ** 2  # code",
    "",
    "a" * 70,
]


def original_and_imported(tmp_path, **changes):
    """Return the tiny Llama's own tokenizer and the one that comes out of its GGUF file."""
    from tokenizers import Tokenizer
    from transformers import AutoTokenizer

    write_tiny_gguf(tmp_path / "tiny.gguf", tmp_path / "scratch", blocks=1, **changes)
    (tmp_path / "out").mkdir()
    convert(tmp_path / "tiny.gguf", tmp_path / "out")
    return Tokenizer.from_file(str(tmp_path / "scratch" / "tokenizer.json")), AutoTokenizer.from_pretrained(
        tmp_path / "out"
    )


def test_a_byte_level_tokenizer_cuts_as_the_one_it_came_from(tmp_path):
    original, imported = original_and_imported(tmp_path)
    for text in MIXED:
        assert imported.encode(text) == original.encode(text).ids, text
        assert imported.decode(imported.encode(text)) == text
    text = "<|im_start|>user\nhello<|im_end|>"
    assert imported.encode(text) == original.encode(text).ids
    assert imported.encode(text)[0] == 1 and imported.encode(text)[-1] == 2


def test_the_chat_template_and_the_special_tokens_come_out_of_the_file(tmp_path):
    _, imported = original_and_imported(tmp_path, settings={"tokenizer.ggml.padding_token_id": 0})
    assert (imported.bos_token, imported.eos_token, imported.pad_token) == (
        "<|im_start|>",
        "<|im_end|>",
        "<|endoftext|>",
    )
    text = imported.apply_chat_template([{"role": "user", "content": "hi"}], tokenize=False, add_generation_prompt=True)
    assert text == "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n"
    generation = json.loads((tmp_path / "out" / "generation_config.json").read_text())
    assert generation == {"bos_token_id": 1, "eos_token_id": [2, 0], "pad_token_id": 0}


def naive_bpe(text, pattern, merges):
    """Return the pieces of a text: cut by `pattern`, joined by `merges` in their order, the slowest way."""
    import regex

    alphabet = byte_alphabet()
    pieces = []
    for word in regex.findall(pattern, text):
        parts = [alphabet[byte] for byte in word.encode()]
        for left, right in merges:
            place = 0
            while place < len(parts) - 1:
                if (parts[place], parts[place + 1]) == (left, right):
                    parts[place : place + 2] = [left + right]
                place += 1
        pieces += parts
    return pieces


def byte_alphabet():
    """Return GPT-2's printable character for each byte: itself where it is one, else the next from 256 on."""
    printable = {*range(33, 127), *range(161, 173), *range(174, 256)}
    others = iter(range(256, 512))
    return {byte: chr(byte if byte in printable else next(others)) for byte in range(256)}


# As llama.cpp writes them, in src/llama-vocab.cpp; where it cuts in steps, one expression that does the same.
PATTERNS = {
    "gpt-2": r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+",
    "smollm": r"\p{N}|'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?[^\s\p{L}\p{N}]+|\s+(?![^\s\p{N}])|\s+",
    "llama-bpe": r"(?:'[sS]|'[tT]|'[rR][eE]|'[vV][eE]|'[mM]|'[lL][lL]|'[dD])|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}|"
    r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+",
    "qwen2": r"(?:'[sS]|'[tT]|'[rR][eE]|'[vV][eE]|'[mM]|'[lL][lL]|'[dD])|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}|"
    r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+",
}


@pytest.mark.parametrize("pre", PATTERNS)
def test_each_pre_tokenizer_cuts_as_an_independent_one_does(tmp_path, pre):
    import unicodedata

    _, imported = original_and_imported(
        tmp_path, settings={"tokenizer.ggml.pre": pre, "tokenizer.ggml.add_bos_token": False}
    )
    merges = [tuple(line.split(" ")) for line in byte_level_vocabulary(tmp_path / "scratch")[2]]
    for text in MIXED:
        composed = unicodedata.normalize("NFC", text) if pre == "qwen2" else text
        expected = naive_bpe(composed, PATTERNS[pre], merges)
        assert imported.convert_ids_to_tokens(imported.encode(text)) == expected, text


def test_llama_3_begins_texts_with_bos_and_others_where_the_file_says_so(tmp_path):
    _, imported = original_and_imported(tmp_path / "llama-3", settings={"tokenizer.ggml.pre": "llama-bpe"})
    assert imported.encode("hi")[0] == 1
    assert 1 not in imported.encode("hi", add_special_tokens=False)
    _, imported = original_and_imported(tmp_path / "silent")
    assert imported.encode("hi")[0] != 1
    both = {"tokenizer.ggml.add_bos_token": True, "tokenizer.ggml.add_eos_token": True}
    _, imported = original_and_imported(tmp_path / "asked", settings=both)
    assert imported.encode("hi")[0] == 1 and imported.encode("hi")[-1] == 2


@pytest.fixture(scope="module")
def sentencepiece_model(tmp_path_factory):
    """A SentencePiece BPE model with byte fallback and Llama's settings, trained on our own text."""
    sentencepiece = pytest.importorskip("sentencepiece", reason="needs sentencepiece, the reference for its own format")
    from tests.support.tiny_llama import TEXT

    folder = tmp_path_factory.mktemp("sentencepiece")
    (folder / "text.txt").write_text(TEXT * 3)
    sentencepiece.SentencePieceTrainer.train(
        input=str(folder / "text.txt"), model_prefix=str(folder / "tiny"), model_type="bpe", vocab_size=500,
        byte_fallback=True, normalization_rule_name="identity", remove_extra_whitespaces=False, split_digits=True,
        allow_whitespace_only_pieces=True, character_coverage=0.99, minloglevel=2,
    )  # fmt: skip
    return sentencepiece.SentencePieceProcessor(model_file=str(folder / "tiny.model"))


@pytest.mark.parametrize(
    ("tokens", "message"),
    [
        (["<unk>", "b" * 200_000], "expected tokens of at most 512 letters, got one of 200,000"),
        ([*map(str, range(200_000)), "199999"], "'199999' is there twice"),
    ],
    ids=["long", "doubled"],
)
def test_an_absurd_vocabulary_is_refused_in_linear_time(tmp_path, tokens, message):
    settings = {
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.scores": [0.0] * len(tokens),
        "tokenizer.ggml.token_type": [2] + [1] * (len(tokens) - 1),
    }
    begin = time.process_time()
    with pytest.raises(InputError, match=message):
        write_tokenizer(read_vocabulary(settings, tmp_path / "x.gguf"), tmp_path, 64)
    assert time.process_time() - begin < 5


def test_a_sentencepiece_vocabulary_cuts_as_sentencepiece_does(tmp_path, sentencepiece_model):
    model = sentencepiece_model
    count = model.get_piece_size()
    kinds = [
        3 if model.is_control(i) else 2 if model.is_unknown(i) else 6 if model.is_byte(i) else 1 for i in range(count)
    ]
    changes = {
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.pre": None,
        "tokenizer.ggml.merges": None,
        "tokenizer.ggml.tokens": [model.id_to_piece(i) for i in range(count)],
        "tokenizer.ggml.scores": [float(model.get_score(i)) for i in range(count)],
        "tokenizer.ggml.token_type": kinds,
        "tokenizer.ggml.bos_token_id": model.bos_id(),
        "tokenizer.ggml.eos_token_id": model.eos_id(),
    }
    _, imported = original_and_imported(tmp_path, settings=changes, weights=tiny_weights(count, blocks=1))
    for text in MIXED:
        assert imported.encode(text) == [model.bos_id(), *model.encode(text)], text
        assert imported.decode(imported.encode(text), skip_special_tokens=True) == model.decode(model.encode(text))
    # The streaming decoder that mlx-lm picks for it gives the same text.
    from mlx_lm.utils import load_tokenizer

    detokenizer = load_tokenizer(tmp_path / "out").detokenizer
    for token in model.encode(MIXED[0]):
        detokenizer.add_token(token)
    detokenizer.finalize()
    assert detokenizer.text == MIXED[0]


# --- the real thing ---


@pytest.fixture(scope="module")
def smollm2_tokenizer(smollm2):
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(smollm2)


def test_smollm2_cuts_digits_one_by_one_and_decodes_back(smollm2_tokenizer):
    for text in MIXED:
        assert smollm2_tokenizer.decode(smollm2_tokenizer.encode(text)) == text
    tokens = smollm2_tokenizer.convert_ids_to_tokens(smollm2_tokenizer.encode("In 1234, x=56"))
    assert tokens == ["In", "Ġ", "1", "2", "3", "4", ",", "Ġx", "=", "5", "6"]
    assert smollm2_tokenizer.encode("<|im_start|>user<|im_end|>") == [1, 4093, 2]


# What llama.cpp (through node-llama-cpp) gives for these texts with SmolLM2's own GGUF file.
# fmt: off
LLAMA_CPP_IDS = [
    [504, 3575, 282, 4649, 314, 7042, 30],
    [216, 827, 216, 5600, 256, 1296, 333, 284, 253, 10147, 197, 397, 1116, 198, 5110, 216, 2738],
    [8084, 982, 28, 339, 23, 16421, 28, 392, 3543, 42, 216, 33, 34, 35, 36, 37, 38, 39, 284, 216, 35, 30, 33,
     36, 33, 37, 41],
    [74, 81, 144, 137, 7342, 25954, 27804, 310, 48137, 27588, 92, 143, 223, 48868, 144, 135, 41146, 28, 15486,
     46494, 37366, 28, 40367, 13042, 906, 28, 297, 151, 219],
    [30658, 35090, 38770, 16525, 26293, 30581, 216, 28589, 29184, 36518, 40562, 116, 17097, 241, 115, 40993,
     179, 120, 248, 27819, 34966, 20602, 31462, 23339, 43463, 216, 33085, 246, 181, 130, 251, 183, 240, 129,
     32524, 17162, 17162, 25723, 11517, 12001, 21118, 26112],
    [10813, 242, 218, 10813, 232, 227, 10813, 235, 119, 321, 231, 10813, 235, 119, 321, 231, 10813, 235, 117,
     459, 229, 6708, 8068],
    [1604, 275, 24, 104, 727, 448, 1003, 1792, 1903, 216, 34, 216, 907, 2909],
    [46880, 46880, 46880, 46880, 46880, 46880, 46880, 46880, 46880, 46880, 46880, 46880, 46880, 46880, 46880,
     46880, 46880, 11510],
]
# fmt: on


def test_smollm2_cuts_as_llama_cpp_does(smollm2_tokenizer):
    for text, ids in zip(filter(None, MIXED), LLAMA_CPP_IDS, strict=True):
        assert smollm2_tokenizer.encode(text) == ids, text


def test_smollm2_answers_through_mlx_lm_as_it_is(smollm2):
    from mlx_lm import generate, load

    model, tokenizer = load(str(smollm2))
    question = [{"role": "user", "content": "What is the capital of France?"}]
    prompt = tokenizer.apply_chat_template(question, add_generation_prompt=True)
    assert generate(model, tokenizer, prompt, max_tokens=20) == "The capital of France is Paris."


def test_interleaving_is_what_llama_cpp_does_to_a_head():
    rows = np.arange(HEADS * 4)[:, None]
    assert interleaved(rows, HEADS)[:4, 0].tolist() == [0, 2, 1, 3]
