"""Factors go where the settings say, in every architecture, and come back from the model unchanged."""

import numpy as np
import pytest

from mbf_mlx.adapters import mlx_lm as adapter
from mbf_mlx.config import LoRAConfig
from mbf_mlx.errors import InputError
from mbf_mlx.methods import Pair
from tests.conftest import import_mlx

mx = import_mlx()

import mlx.nn as nn  # noqa: E402
from mlx.utils import tree_flatten  # noqa: E402

from mbf_mlx.base.load import load_base  # noqa: E402
from mbf_mlx.engine.lora_layers import attach, in_dims, lora_layers, read_factors, write_factors  # noqa: E402
from tests.support.lora_factors import effect, random_factors, write_adapter  # noqa: E402

TOKENS = mx.array([[5, 17, 44, 3, 250, 99, 7, 12, 61, 200]])


@pytest.fixture
def model(tiny_llama):
    return load_base(tiny_llama).model


def test_keys_are_names_or_paths_inside_a_block(model):
    layers = attach(model, LoRAConfig(rank=2, keys=("q_proj", "mlp.down_proj")))
    assert layers == {
        "model.layers.0.self_attn.q_proj": (64, 64),
        "model.layers.0.mlp.down_proj": (64, 128),
        "model.layers.1.self_attn.q_proj": (64, 64),
        "model.layers.1.mlp.down_proj": (64, 128),
    }
    assert adapter.block_keys(layers) == ("self_attn.q_proj", "mlp.down_proj")


def test_num_layers_counts_from_the_last_block(model):
    assert list(attach(model, LoRAConfig(rank=2, keys=("v_proj",), num_layers=1))) == [
        "model.layers.1.self_attn.v_proj"
    ]


def test_more_blocks_than_there_are_is_an_error(model):
    with pytest.raises(InputError, match="num_layers: expected at most the model's 2 blocks, got 3"):
        attach(model, LoRAConfig(num_layers=3))


def test_a_rank_above_a_layers_inputs_is_refused_before_anything_is_made(model, tiny_llama):
    """QR would have no such basis after the first task; a rank of thousands of millions would take all memory."""
    message = "LoRAConfig.rank: expected at most 64, the inputs of model.layers.*proj, got "
    for rank in (65, 9_999_999_999):
        with pytest.raises(InputError, match=f"{message}{rank}"):
            attach(model, LoRAConfig(rank=rank))
    layers = attach(model, LoRAConfig(rank=64))
    assert set(layers.values()) <= {(64, 64), (32, 64)}


def test_unknown_keys_are_named_with_those_that_exist(model):
    with pytest.raises(InputError) as refusal:
        attach(model, LoRAConfig(keys=("q_proj", "query", "proj")))
    assert "no layer called query, proj; expected of mlp.down_proj, mlp.gate_proj" in str(refusal.value)
    assert "self_attn.v_proj" in str(refusal.value)


@pytest.mark.parametrize("key", ["lm_head", "embed_tokens", "model.embed_tokens"])
def test_heads_and_embeddings_are_refused_with_the_reason(model, key):
    with pytest.raises(InputError, match="lies outside the blocks; embeddings and heads cannot get factors yet"):
        attach(model, LoRAConfig(keys=("q_proj", key)))


def test_norms_are_no_layers(model):
    with pytest.raises(InputError, match="no layer called input_layernorm"):
        attach(model, LoRAConfig(keys=("input_layernorm",)))


def tiny_model(kind, **settings):
    """Return a random model of one of mlx-lm's architectures."""
    import importlib

    module = importlib.import_module(f"mlx_lm.models.{kind}")
    config = {
        "model_type": kind, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "vocab_size": 300,
        "num_attention_heads": 4, "num_key_value_heads": 2, "rms_norm_eps": 1e-5, "head_dim": 8, "rope_theta": 1e4,
        "max_position_embeddings": 128, "tie_word_embeddings": False,
    }  # fmt: skip
    return module.Model(module.ModelArgs.from_dict(config | settings))


ARCHITECTURES = {
    "llama": ({}, "q_proj"),
    "qwen2": ({}, "q_proj"),
    "qwen3": ({}, "v_proj"),
    "phi3": ({}, "qkv_proj"),
    "gemma2": ({}, "q_proj"),
    "gemma3_text": ({"sliding_window": 64, "sliding_window_pattern": 2, "query_pre_attn_scalar": 8}, "q_proj"),
    "olmo2": ({}, "o_proj"),
    "starcoder2": ({"norm_epsilon": 1e-5}, "c_fc"),
    "cohere": ({}, "q_proj"),
    "granite": (
        {"logits_scaling": 8.0, "attention_multiplier": 0.1, "embedding_multiplier": 12.0, "residual_multiplier": 0.2,
         "attention_bias": False, "mlp_bias": False}, "up_proj"),
    "gpt2": ({"n_ctx": 64, "n_embd": 32, "n_head": 4, "n_layer": 2, "n_positions": 64, "layer_norm_epsilon": 1e-5},
             "c_attn"),
    "mamba": ({"state_size": 4, "conv_kernel": 4, "use_bias": False, "use_conv_bias": True, "time_step_rank": 4},
              "in_proj"),
}  # fmt: skip


@pytest.mark.parametrize("kind", ARCHITECTURES)
def test_factors_change_every_architecture_with_linear_layers(kind):
    settings, key = ARCHITECTURES[kind]
    model = tiny_model(kind, **settings)
    layers = attach(model, LoRAConfig(rank=2, keys=(key,)))
    assert len(layers) == 2
    assert effect(model) == 0
    write_factors(model, random_factors(read_factors(model), size=1.0))
    assert effect(model) > 0
    assert {name for name, _ in tree_flatten(model.trainable_parameters())} == {
        f"{name}.lora_{letter}" for name in layers for letter in "ab"
    }


def test_mixtures_of_experts_are_refused_by_name():
    model = tiny_model("mixtral", num_local_experts=4, num_experts_per_tok=2)
    with pytest.raises(
        InputError, match=r"not mixtures of experts(.|\n)*switch_mlp.gate_proj: SwitchLinear"
    ) as refusal:
        attach(model, LoRAConfig(keys=("q_proj", "gate_proj", "up_proj")))
    assert "q_proj" not in str(refusal.value)
    attach(model, LoRAConfig(rank=2, keys=("q_proj",)))  # its attention is ordinary


def test_convolutions_are_refused_by_name():
    model = tiny_model("mamba", **ARCHITECTURES["mamba"][0])
    with pytest.raises(InputError, match="conv1d: Conv1d"):
        attach(model, LoRAConfig(keys=("conv1d",)))


# --- factors ---


def test_fresh_factors_change_nothing_and_written_ones_do(model):
    before = np.array(model(TOKENS))
    attach(model, LoRAConfig(rank=4))
    np.testing.assert_array_equal(np.array(model(TOKENS)), before)
    assert effect(model) == 0
    factors = random_factors(read_factors(model))
    write_factors(model, factors)
    after = np.array(model(TOKENS))
    assert np.abs(after - before).max() > 1e-3
    assert effect(model) > 1e-3
    np.testing.assert_array_equal(np.array(model(TOKENS)), after)  # the probe leaves the factors alone


def test_factors_are_rank_in_and_out_rank_and_come_back_unchanged(model):
    layers = attach(model, LoRAConfig(rank=4, keys=("k_proj", "down_proj")))
    factors = random_factors(read_factors(model))
    for name, (out, inner) in layers.items():
        assert factors[name].a.shape == (4, inner) and factors[name].b.shape == (out, 4)
        assert factors[name].a.dtype == factors[name].b.dtype == np.float32
    write_factors(model, factors)
    back = read_factors(model)
    assert list(back) == list(layers)
    for name, pair in factors.items():
        np.testing.assert_array_equal(back[name].a, pair.a)
        np.testing.assert_array_equal(back[name].b, pair.b)
    write_factors(model, {name: Pair(mx.array(pair.a), mx.array(pair.b)) for name, pair in factors.items()})
    np.testing.assert_array_equal(read_factors(model)[name].b, factors[name].b)


def test_what_the_factors_add_is_scale_times_b_times_a(model, tolerance):
    layers = attach(model, LoRAConfig(rank=4, scale=3.0, keys=("v_proj",)))
    write_factors(model, random_factors(read_factors(model)))
    name = next(iter(layers))
    layer, pair = lora_layers(model)[name], read_factors(model)[name]
    x = np.random.default_rng(0).standard_normal((1, 3, 64)).astype(np.float32)
    added = np.array(layer(mx.array(x))) - np.array(layer.linear(mx.array(x)))
    np.testing.assert_allclose(added, 3.0 * x @ (pair.b @ pair.a).T, **tolerance("float32"))


def test_factors_that_do_not_fit_are_all_named(model):
    attach(model, LoRAConfig(rank=4, keys=("q_proj",)))
    factors = read_factors(model)
    first, second = factors
    factors[first] = Pair(factors[first].a[:2], factors[first].b)
    factors["model.layers.7.self_attn.q_proj"] = factors.pop(second)
    with pytest.raises(InputError) as refusal:
        write_factors(model, factors)
    assert f"{first}: expected A of shape (4, 64), got (2, 64)" in str(refusal.value)
    assert f"{second}: missing" in str(refusal.value)
    assert "model.layers.7.self_attn.q_proj: the model has no factors there" in str(refusal.value)


def test_smollm2_with_an_adapter_is_the_same_through_mlx_lm(smollm2, tmp_path, tolerance):
    from mlx_lm import load

    config = LoRAConfig()
    base = load_base(smollm2, dequantize=True, dtype="float32")
    assert len(attach(base.model, config)) == 60
    assert effect(base.model) == 0
    factors = random_factors(read_factors(base.model))
    write_factors(base.model, factors)
    assert effect(base.model) > 0.1
    write_adapter(tmp_path / "adapter", factors, config, 30)
    theirs, _ = load(str(smollm2), adapter_path=str(tmp_path / "adapter"))
    tokens = mx.array([base.tokenizer.encode("The capital")])
    expected = np.array(theirs(tokens))
    rtol, atol = tolerance("logits").values()
    np.testing.assert_allclose(
        np.array(base.model(tokens)), expected, rtol=rtol, atol=10 * atol * np.abs(expected).max()
    )


# --- what of mlx-lm we stand on ---


def test_mlx_lms_layer_still_has_what_we_call():
    import inspect

    from mlx_lm.tuner.lora import LoRALinear

    assert {"r", "dropout", "scale"} <= set(inspect.signature(LoRALinear.from_base).parameters)
    layer = LoRALinear.from_base(nn.Linear(6, 4), r=2, dropout=0.0, scale=3.0)
    assert layer.lora_a.shape == (6, 2) and layer.lora_b.shape == (2, 4) and layer.scale == 3.0
    assert "linear" in layer


def test_the_inputs_of_a_packed_layer_are_those_of_the_plain_one():
    plain = nn.Linear(96, 4)
    for bits in (2, 3, 4, 8):
        assert in_dims(nn.QuantizedLinear.from_linear(plain, group_size=32, bits=bits)) == in_dims(plain) == 96
