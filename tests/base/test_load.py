"""The base model loads in every quantization, and computes what mlx-lm computes."""

import json
import shutil

import numpy as np
import pytest

from mbf_mlx.config import LoRAConfig
from mbf_mlx.errors import InputError
from tests.conftest import import_mlx

mx = import_mlx()

import mlx.nn as nn  # noqa: E402
from mlx.utils import tree_flatten  # noqa: E402

from mbf_mlx import Stream  # noqa: E402
from mbf_mlx.base import unpack  # noqa: E402
from mbf_mlx.base.load import load_base, load_tokenizer  # noqa: E402
from mbf_mlx.base.sources import unpacked_bytes  # noqa: E402
from mbf_mlx.engine.lora_layers import attach, read_factors, write_factors  # noqa: E402
from tests.support.lora_factors import random_factors, write_adapter  # noqa: E402
from tests.support.rows import rows_of  # noqa: E402
from tests.support.tiny_llama import write_tiny_llama  # noqa: E402

STORED: dict = {}
FLOAT32 = {"dequantize": True, "dtype": "float32"}
WAYS = {"float32": FLOAT32, "packed": {"dtype": "float32"}}
TOKENS = mx.array([[5, 17, 44, 3, 250, 99, 7, 12, 61, 200]])
ALL_KEYS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
QUANTIZATIONS = [None, *[(bits, 32, "affine") for bits in (2, 3, 4, 5, 6, 8)], (4, 64, "affine")]
QUANTIZATIONS += [(4, 32, "mxfp4"), (8, 32, "mxfp8"), (4, 16, "nvfp4"), "mixed"]


@pytest.fixture(scope="module")
def quantized_llama(tmp_path_factory):
    """`quantized_llama((4, 32, "affine"))` is the folder of the tiny Llama in that quantization."""
    from tests.support.tiny_llama import CONFIG

    root = tmp_path_factory.mktemp("quantized")

    def write(kind):
        folder = root / str(kind).replace(" ", "")
        if folder.exists():
            return folder
        if kind is None or kind[2] == "affine":
            bits, group, _ = kind or (None, 32, None)
            return write_tiny_llama(folder, bits=bits, group_size=group)
        from mlx_lm.utils import load_model, quantize_model, save_config

        plain = write("plain") if kind == "never" else write_tiny_llama(folder, bits=None)
        model, config = load_model(plain)
        if kind == "mixed":

            def choose(path, module):
                if not hasattr(module, "to_quantized") or "o_proj" in path:
                    return False
                bits = 8 if "v_proj" in path or "down_proj" in path else 4
                return {"group_size": 32, "bits": bits, "mode": "affine"}

            model, config = quantize_model(model, config, 32, 4, quant_predicate=choose)
        else:
            bits, group, mode = kind
            model, config = quantize_model(model, config, group, bits, mode=mode)
        mx.save_safetensors(str(folder / "model.safetensors"), dict(tree_flatten(model.parameters())))
        save_config(config, folder / "config.json")
        assert config["vocab_size"] == CONFIG["vocab_size"]
        return folder

    return write


@pytest.mark.parametrize("kind", QUANTIZATIONS, ids=str)
def test_every_quantization_loads_learns_and_is_what_mlx_lm_loads(quantized_llama, tmp_path, kind, tolerance):
    from mlx_lm import load

    folder, config = quantized_llama(kind), LoRAConfig(rank=4, keys=ALL_KEYS)
    base = load_base(folder, **STORED)
    layers = attach(base.model, config)
    assert len(layers) == 14
    factors = random_factors(read_factors(base.model))
    write_factors(base.model, factors)
    write_adapter(tmp_path / "adapter", factors, config, 2)
    theirs, _ = load(str(folder), adapter_path=str(tmp_path / "adapter"))
    np.testing.assert_array_equal(np.array(base.model(TOKENS)), np.array(theirs(TOKENS)))
    # and a step of training reaches every factor
    loss = nn.value_and_grad(base.model, lambda model: model(TOKENS).astype(mx.float32).var())
    gradients = dict(tree_flatten(loss(base.model)[1]))
    assert sorted(gradients) == sorted(f"{name}.lora_{letter}" for name in layers for letter in "ab")
    assert all(float(mx.abs(gradient).max()) > 0 for gradient in gradients.values())


@pytest.mark.parametrize("way", ["float32", "packed"])
@pytest.mark.parametrize("kind", QUANTIZATIONS, ids=str)
def test_unpacked_weights_compute_the_same(quantized_llama, kind, way, tolerance):
    folder = quantized_llama(kind)
    stored, ours = load_base(folder, **STORED).model, load_base(folder, **WAYS[way]).model
    assert {str(array.dtype) for _, array in tree_flatten(ours.parameters())} <= (
        {"mlx.core.float32"} if way == "float32" else {"mlx.core.float32", "mlx.core.uint32", "mlx.core.uint8"}
    )
    expected = np.array(stored(TOKENS).astype(mx.float32))
    # In some modes the embedding comes out of mlx in bfloat16, and its rounding with it.
    name = "bfloat16" if isinstance(kind, tuple) and kind[2] != "affine" else "logits"
    rtol, atol = tolerance(name).values()
    np.testing.assert_allclose(np.array(ours(TOKENS)), expected, rtol=rtol, atol=atol * np.abs(expected).max())


def test_a_model_that_unpacks_step_by_step_gives_the_same_logits(tmp_path, monkeypatch):
    from tests.support.tiny_llama import write_tiny_llama

    monkeypatch.setattr(unpack, "PIECE_BYTES", 64 * 4 * 40)
    folder = write_tiny_llama(tmp_path / "tied", tie_word_embeddings=True)
    plain, stepping = (load_base(folder, **WAYS["packed"]).model for _ in range(2))
    unpack.step_by_step(stepping)
    np.testing.assert_array_equal(np.array(stepping(TOKENS)), np.array(plain(TOKENS)))
    kinds = {type(module) for _, module in stepping.named_modules()}
    assert {unpack.SteppingLinear, unpack.SteppingEmbedding} <= kinds and unpack.UnpackingLinear not in kinds


def test_packed_layers_have_the_gradients_of_unpacked_ones(quantized_llama, tolerance, monkeypatch):
    monkeypatch.setattr(unpack, "PIECE_BYTES", 64 * 4 * 40)  # several pieces a layer, the last one smaller
    results = []
    for way in ("float32", "packed"):
        model = load_base(quantized_llama((4, 32, "affine")), **WAYS[way]).model
        attach(model, LoRAConfig(rank=4, keys=ALL_KEYS))
        results.append(model)
        if len(results) == 2:
            write_factors(model, read_factors(results[0]))
    plain, packed = results
    write_factors(plain, random_factors(read_factors(plain)))
    write_factors(packed, read_factors(plain))
    gradients = [
        dict(tree_flatten(nn.value_and_grad(model, lambda model: model(TOKENS).var())(model)[1])) for model in results
    ]
    for name, expected in gradients[0].items():
        np.testing.assert_allclose(np.array(gradients[1][name]), np.array(expected), **tolerance("gradients"))
    kinds = {type(module) for _, module in packed.named_modules()}
    assert unpack.UnpackingLinear in kinds and nn.QuantizedLinear not in kinds


def test_packed_tied_embeddings_are_the_head(tmp_path, tolerance):
    from tests.support.tiny_llama import write_tiny_llama

    folder = write_tiny_llama(tmp_path / "tied", tie_word_embeddings=True)
    expected = np.array(load_base(folder, **STORED).model(TOKENS))
    for way in ("float32", "packed"):
        model = load_base(folder, **WAYS[way]).model
        np.testing.assert_allclose(np.array(model(TOKENS)), expected, **tolerance("logits"))
    assert isinstance(model.model.embed_tokens, unpack.UnpackingEmbedding)


def test_unpacked_in_float32_a_model_is_in_memory_once(tmp_path):
    from tests.support.tiny_llama import write_tiny_llama

    folder = write_tiny_llama(tmp_path / "larger", hidden_size=512, intermediate_size=2048, num_hidden_layers=6)
    mx.clear_cache()
    before = mx.get_active_memory()
    mx.reset_peak_memory()
    base = load_base(folder, **FLOAT32)
    size = sum(array.nbytes for _, array in tree_flatten(base.model.parameters()))
    largest = max(array.nbytes for _, array in tree_flatten(base.model.parameters()))
    assert mx.get_peak_memory() - before < size + 3 * largest


def test_the_bytes_of_an_unpacked_model_are_known_before_it_is_loaded(quantized_llama):
    for kind in QUANTIZATIONS:
        parameters = tree_flatten(load_base(quantized_llama(kind), **FLOAT32).model.parameters())
        assert unpacked_bytes(quantized_llama(kind)) == sum(array.nbytes for _, array in parameters), kind


def test_a_base_knows_its_quantization_and_fingerprint(quantized_llama):
    assert load_base(quantized_llama(None), **STORED).quantization == "none"
    assert load_base(quantized_llama((3, 32, "affine")), **STORED).quantization == "3 bits, group 32, affine"
    mixed = load_base(quantized_llama("mixed"), **STORED)
    assert mixed.quantization == "4 bits, group 32, affine; some layers 8 bits"
    assert mixed.fingerprint != load_base(quantized_llama(None), **STORED).fingerprint
    assert len(mixed.fingerprint) == 64


# --- what does not load ---


def changed_copy(folder, target, **changes):
    shutil.copytree(folder, target)
    config = json.loads((target / "config.json").read_text()) | changes
    (target / "config.json").write_text(json.dumps({key: value for key, value in config.items() if value is not None}))
    return target


BAD_CONFIGS = {
    "an unknown architecture": ({"model_type": "martian"}, "cannot load this model: Model type martian not supported"),
    "no architecture": ({"model_type": None}, "model_type: expected a name, got None"),
    "another size": ({"hidden_size": 128}, "cannot load this model: .*[Ss]hape"),
    "a missing size": ({"hidden_size": None}, "cannot load this model: .*hidden_size"),
    "a size in words": ({"hidden_size": "large"}, "hidden_size: expected a whole number from 1 to .*, got 'large'"),
    "no heads": ({"num_attention_heads": 0}, "num_attention_heads: expected a whole number from 1 to .*, got 0"),
    "no vocabulary": ({"vocab_size": 0}, "vocab_size: expected a whole number from 1 to 2,147,483,647, got 0"),
    "an absurd size": ({"intermediate_size": 10**12}, "intermediate_size: expected a whole number from 1 to "),
    "half a head": ({"num_key_value_heads": 1.5}, "num_key_value_heads: expected a whole number from 1 to .*, got 1.5"),
    "rotation in words": ({"rope_theta": "x"}, "rope_theta: expected a number above 0, got 'x'"),
    "quantization in words": ({"quantization": "4bit"}, "quantization: expected group_size and bits, .* got '4bit'"),
    "more blocks": ({"num_hidden_layers": 3}, "cannot load this model: Missing .* parameters"),
    "absurd blocks": ({"num_hidden_layers": 10**12}, "num_hidden_layers: expected 1 to .* got 1000000000000"),
    "no bits": ({"quantization": {"group_size": 32}}, "cannot load this model: missing in config.json: 'bits'"),
    "its own code": ({"model_file": "evil.py"}, "model_file: this model needs its own Python code, which we never run"),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD_CONFIGS)
def test_a_config_that_does_not_fit_is_refused(tiny_llama, tmp_path, name):
    changes, message = BAD_CONFIGS[name]
    folder = changed_copy(tiny_llama, tmp_path / "changed", **changes)
    (folder / "evil.py").write_text("raise SystemExit('this ran')")
    with pytest.raises(InputError, match=message) as refusal:
        load_base(folder, **STORED)
    assert str(folder) in str(refusal.value)


def test_a_tokenizer_that_cannot_be_read_is_refused(tiny_llama, tmp_path):
    folder = changed_copy(tiny_llama, tmp_path / "changed")
    (folder / "tokenizer.json").write_text('{"version": "1.0", "model": {"type": "Nonsense"}}')
    with pytest.raises(InputError, match="its tokenizer cannot be read"):
        load_base(folder, **STORED)


def test_a_tokenizer_with_code_of_its_own_runs_none(tiny_llama, tmp_path):
    folder = changed_copy(tiny_llama, tmp_path / "changed", auto_map={"AutoTokenizer": ["evil.Evil", None]})
    (folder / "evil.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w').close()\nclass Evil: pass\n")
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    settings |= {"auto_map": {"AutoTokenizer": ["evil.Evil", None]}, "tokenizer_class": "Evil"}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    try:
        load_base(folder, **STORED)
    except InputError:
        pass
    assert not (tmp_path / "ran").exists()


def test_mlx_lm_still_has_what_we_call():
    import inspect

    from mlx_lm import utils

    assert {"lazy"} <= set(inspect.signature(utils.load_model).parameters)
    assert {"tokenizer_config_extra", "eos_token_ids"} <= set(inspect.signature(utils.load_tokenizer).parameters)


# --- tokens without weights ---


def with_tokens(folder, count):
    """Add tokens to a model folder's tokenizer, behind those that it has."""
    path = folder / "tokenizer.json"
    document = json.loads(path.read_text())
    document["added_tokens"] += [
        {**document["added_tokens"][0], "id": 300 + i, "content": f"<extra_{i}>", "special": False}
        for i in range(count)
    ]
    path.write_text(json.dumps(document))


def test_tokens_without_a_row_in_the_embedding_are_refused(tiny_llama, tmp_path):
    folder = changed_copy(tiny_llama, tmp_path / "changed")
    with_tokens(folder, 2)
    message = r"expected token numbers below 300, .* got 300 \('<extra_0>'\), 301 \('<extra_1>'\)\nhint: "
    with pytest.raises(InputError, match=message):
        load_base(folder, **STORED)
    with pytest.raises(InputError, match=message):
        load_tokenizer(folder)


def test_a_token_that_settings_add_and_an_end_without_a_row_are_refused(tiny_llama, tmp_path):
    padded = changed_copy(tiny_llama, tmp_path / "padded")
    path = padded / "tokenizer_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"pad_token": "<pad>"}))
    with pytest.raises(InputError, match=r"got 300 \('<pad>'\)"):
        load_base(padded, **STORED)
    ends = changed_copy(tiny_llama, tmp_path / "ends", eos_token_id=[2, 4000])
    with pytest.raises(InputError, match=r"got 4000 \(an end token\)"):
        load_base(ends, **STORED)


def test_rows_without_a_token_are_padding(tmp_path):
    from tests.support.tiny_llama import write_tiny_llama

    folder = write_tiny_llama(tmp_path / "padded", vocab_size=320)
    with_tokens(folder, 2)
    assert len(load_base(folder, **STORED).tokenizer.get_vocab()) == 302


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"quant_method": "bitsandbytes", "load_in_4bit": True}, "bitsandbytes (4 bits)"),
        ({"quant_method": "gptq", "bits": 8}, "gptq (8 bits)"),
        ({"quant_method": "awq", "bits": 3}, "awq (3 bits)"),
        ({"quant_method": "hqq"}, "hqq"),
    ],
)
def test_weights_that_another_program_has_quantized_are_named(tmp_path, settings, said):
    folder = write_tiny_llama(tmp_path / "base", bits=None)
    tensors = mx.load(str(folder / "model.safetensors"))
    packed = {name.replace(".weight", ".qweight") if "proj" in name else name: a for name, a in tensors.items()}
    mx.save_safetensors(str(folder / "model.safetensors"), packed, {"format": "pt"})
    config = json.loads((folder / "config.json").read_text()) | {"quantization_config": settings}
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(InputError) as error:
        load_base(folder)
    assert f"mlx-lm cannot read weights that {said} has quantized\nhint: take an MLX or GGUF copy" in str(error.value)


def test_a_base_with_weights_that_are_not_finite_is_named_and_not_the_rows(tmp_path, write_jsonl):
    folder = write_tiny_llama(tmp_path / "base")
    tensors = mx.load(str(folder / "model.safetensors"))
    name = "model.layers.1.mlp.up_proj.scales"
    tensors[name] = mx.where(mx.arange(tensors[name].size).reshape(tensors[name].shape) == 5, mx.nan, tensors[name])
    mx.save_safetensors(str(folder / "model.safetensors"), tensors, {"format": "mlx"})
    task = write_jsonl("words.jsonl", rows_of(8))
    with pytest.raises(InputError, match="the base's weight model.layers.1.mlp.up_proj.* holds NaN") as error:
        Stream.open(tmp_path / "s", base=str(folder)).learn(task, iters=1)
    assert "rate" not in str(error.value)
