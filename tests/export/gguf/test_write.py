"""The GGUF file of a whole model: every weight in its place, its type and its order, read with gguf's own reader.

test_llama_cpp.py runs such files in llama.cpp itself.

Long, because all cases read back files of one writer with the same helpers.
"""

import json

import gguf
import numpy as np
import pytest
from gguf import quants
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.numpy import save_file

from mbf_mlx.base.gguf.names import read_names
from mbf_mlx.errors import InputError
from mbf_mlx.export.card import About
from mbf_mlx.export.gguf import tensor_types as gguf_types
from mbf_mlx.export.gguf.read_back import check
from mbf_mlx.export.gguf.rope import llama3_factors, read_rope
from mbf_mlx.export.gguf.tensor_plan import plan
from mbf_mlx.export.gguf.vocabulary import read_vocabulary
from mbf_mlx.export.gguf.write import quantize_line, write_gguf
from mbf_mlx.export.weights import affine
from mbf_mlx.export.weights.checkpoint import Checkpoint
from mbf_mlx.export.weights.tensors import Tensor, Writer
from mbf_mlx.files.dtypes import from_float32
from mbf_mlx.methods import Pair
from tests.support.factors import SCALE, make_factors
from tests.support.gguf_files import LLAMA3_ROPE, as_mlx, import_gguf, read, weights
from tests.support.jobs import job_of, mean_retention, showing
from tests.support.tiny_llama import CONFIG, write_tiny_llama, write_tokenizer


@pytest.fixture(scope="module")
def half_llama(tmp_path_factory):
    """A tiny Llama as the hub's 4-bit models are: group 64, scales in float16."""
    return write_half_llama(tmp_path_factory.mktemp("half") / "llama")


def write_half_llama(folder, bits=4, group_size=64, dtype=np.float16, **changes):
    """Write a tiny MLX model with random codes, scales and offsets in a half type, without building the model."""
    config = {**CONFIG, "torch_dtype": "float16", **changes}
    config["quantization"] = {"group_size": group_size, "bits": bits, "mode": "affine"}
    rng, tensors, width = np.random.default_rng(0), {}, config["hidden_size"]
    head = config.get("head_dim", width // config["num_attention_heads"])
    queries, keys = config["num_attention_heads"] * head, config["num_key_value_heads"] * head
    shapes = {"self_attn.q_proj": (queries, width), "self_attn.k_proj": (keys, width)}
    shapes |= {"self_attn.v_proj": (keys, width), "self_attn.o_proj": (width, queries)}
    shapes |= {"mlp.gate_proj": (128, width), "mlp.up_proj": (128, width), "mlp.down_proj": (width, 128)}
    layers = {f"model.layers.{i}.{name}": shape for i in range(2) for name, shape in shapes.items()}
    layers |= {"model.embed_tokens": (config["vocab_size"], width)}
    layers |= {} if config["tie_word_embeddings"] else {"lm_head": (config["vocab_size"], width)}
    for name, (out, inner) in layers.items():
        codes = rng.integers(0, 2**bits, (out, inner), dtype=np.uint8)
        scales = rng.uniform(0.01, 0.03, (out, inner // group_size)).astype(dtype)
        tensors[f"{name}.weight"] = affine.pack(codes, bits)
        tensors[f"{name}.scales"] = scales
        centres = rng.uniform(0.4, 0.6, scales.shape) * 2**bits
        tensors[f"{name}.biases"] = (-scales * centres).astype(dtype)
    for name in [
        "model.norm",
        *(f"model.layers.{i}.{part}_layernorm" for i in (0, 1) for part in ("input", "post_attention")),
    ]:
        tensors[f"{name}.weight"] = rng.uniform(0.5, 1.5, width).astype(dtype)
    folder.mkdir(parents=True)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "mlx"})
    (folder / "config.json").write_text(json.dumps(config))
    write_tokenizer(folder)
    return folder


def test_untouched_layers_mean_exactly_what_mlx_stored(half_llama, tmp_path):
    report = write_gguf(job_of(half_llama, {}, tmp_path / "model.gguf"))
    tensors, _ = read(tmp_path / "model.gguf")
    base, names = Checkpoint(half_llama), read_names(CONFIG, half_llama)
    for layer in base.layer_names():
        stored = tensors[names.tensor(f"{layer}.weight")]
        assert stored.tensor_type == gguf.GGMLQuantizationType.Q4_1
        heads = {"q_proj": 4, "k_proj": 2}.get(layer.rpartition(".")[2])
        rows = weights(stored) if heads is None else as_mlx(weights(stored), heads)
        np.testing.assert_array_equal(rows, base.layer(layer).rows(), err_msg=layer)
    assert (report.kept, report.error, report.layers) == (len(base.layer_names()), 0.0, [])
    np.testing.assert_array_equal(tensors["output_norm.weight"].data, base.tensors["model.norm.weight"].floats())
    assert len(tensors) == len(base.layer_names()) + 5


def test_a_learned_layer_is_the_sum_at_8_bits_and_keeps_its_update(half_llama, tmp_path):
    factors = make_factors(half_llama)
    report = write_gguf(job_of(half_llama, factors, tmp_path / "model.gguf"))
    tensors, _ = read(tmp_path / "model.gguf")
    base, names = Checkpoint(half_llama), read_names(CONFIG, half_llama)
    for layer, pair in factors.items():
        stored = tensors[names.tensor(f"{layer}.weight")]
        assert stored.tensor_type == gguf.GGMLQuantizationType.Q8_0
        rows = as_mlx(weights(stored), 4) if "q_proj" in layer else weights(stored)
        before, delta = base.layer(layer).rows(), SCALE * pair.b @ pair.a
        change = rows - before
        assert (change * delta).sum() / (delta * delta).sum() == pytest.approx(1, abs=0.02)
    assert {layer.name for layer in report.layers} == set(factors)
    assert {layer.after for layer in report.layers} == {"Q8_0"}
    assert mean_retention(report) == pytest.approx(1, abs=0.02)
    assert report.kept == len(base.layer_names()) - len(factors)


def test_a_pair_that_changes_nothing_leaves_the_layer_as_it_is(half_llama, tmp_path):
    factors = {name: Pair(pair.a, 0 * pair.b) for name, pair in make_factors(half_llama).items()}
    (tmp_path / "zero").mkdir()
    write_gguf(job_of(half_llama, factors, tmp_path / "zero" / "model.gguf"))
    write_gguf(job_of(half_llama, {}, tmp_path / "model.gguf"))
    assert (tmp_path / "zero" / "model.gguf").read_bytes() == (tmp_path / "model.gguf").read_bytes()


def test_a_gguf_file_that_was_imported_leaves_with_the_same_tensors(half_llama, tmp_path):
    (tmp_path / "again").mkdir()
    write_gguf(job_of(half_llama, {}, tmp_path / "first.gguf"))
    import_gguf(tmp_path / "first.gguf", tmp_path / "folder")
    write_gguf(job_of(tmp_path / "folder", {}, tmp_path / "again" / "first.gguf"))
    first, settings_first = read(tmp_path / "first.gguf")
    second, settings_second = read(tmp_path / "again" / "first.gguf")
    assert first.keys() == second.keys()
    for name in first:
        assert first[name].tensor_type == second[name].tensor_type
        assert first[name].data.tobytes() == second[name].data.tobytes(), name
    ours = {key for key in settings_first if key.startswith(("llama.", "tokenizer.", "general."))}
    assert {key: settings_first[key] for key in ours} == {key: settings_second[key] for key in ours}


@pytest.mark.parametrize("kind", ["Q4_0", "Q8_0"])
def test_the_other_types_that_mlx_reads_come_back_byte_for_byte_too(half_llama, tmp_path, kind):
    write_gguf(job_of(half_llama, {}, tmp_path / "first.gguf", kind=kind))
    import_gguf(tmp_path / "first.gguf", tmp_path / "folder")
    write_gguf(job_of(tmp_path / "folder", {}, tmp_path / "second.gguf"))
    first, second = read(tmp_path / "first.gguf")[0], read(tmp_path / "second.gguf")[0]
    assert {name: tensor.data.tobytes() for name, tensor in first.items()} == {
        name: tensor.data.tobytes() for name, tensor in second.items()
    }
    assert first["blk.0.attn_q.weight"].tensor_type.name == kind


@settings(max_examples=40, deadline=None)
@given(
    bits=st.sampled_from([2, 3, 4, 5, 8]),
    group_size=st.sampled_from([32, 64, 128]),
    centred=st.booleans(),
    seed=st.integers(0, 1000),
)
def test_the_codes_of_any_affine_layer_mean_the_same_in_gguf(tmp_path_factory, bits, group_size, centred, seed):
    rng, folder = np.random.default_rng(seed), tmp_path_factory.mktemp("layer")
    codes = rng.integers(0, 2**bits, (6, 256), dtype=np.uint8)
    scales = rng.normal(size=(6, 256 // group_size)).astype(np.float16)
    centre = 2.0 ** (bits - 1) if centred or bits == 8 else 1.75
    tensors = {"x.weight": affine.pack(codes, bits), "x.scales": scales}
    tensors["x.biases"] = (-scales.astype(np.float32) * centre).astype(np.float16)
    save_file(tensors, folder / "model.safetensors")
    quantization = {"bits": bits, "group_size": group_size}
    (folder / "config.json").write_text(json.dumps({"quantization": quantization}))
    layer = Checkpoint(folder).layer("x", 256)
    kind = gguf_types.own_type(layer)
    assert kind.name == ("Q4_0" if bits == 4 and centred else {5: "Q5_1", 8: "Q8_0"}.get(bits, "Q4_1"))
    assert gguf_types.keeps(layer, kind)
    np.testing.assert_array_equal(quants.dequantize(gguf_types.kept_rows(layer, kind, 0, 6), kind), layer.rows())


def test_8_bits_that_gguf_cannot_say_are_rounded_once_and_the_loss_is_reported(tmp_path):
    folder = write_half_llama(tmp_path / "base", bits=8)
    report = write_gguf(job_of(folder, {}, tmp_path / "model.gguf"))
    assert report.kept == 0
    assert 0 < report.error < 0.01
    assert set(report.types) == {"Q8_0", "F32"}


@pytest.mark.parametrize(
    ("kind", "limit"),
    [("F32", 0), ("F16", 1e-3), ("BF16", 1e-2), ("Q8_0", 0.01), ("Q4_1", 0.12), ("Q4_0", 0.15), ("q8_0", 0.01)],
)
def test_every_type_holds_the_weights_as_well_as_it_can(tiny_llama, tmp_path, kind, limit):
    factors = make_factors(tiny_llama)
    report = write_gguf(job_of(tiny_llama, factors, tmp_path / "model.gguf", kind=kind))
    tensors, settings_ = read(tmp_path / "model.gguf")
    base, names = Checkpoint(tiny_llama), read_names(CONFIG, tiny_llama)
    for layer in ("model.layers.1.self_attn.v_proj", "model.layers.0.mlp.down_proj", "lm_head"):
        expected = base.layer(layer).rows()
        if layer in factors:
            expected = expected + np.float32(SCALE) * (factors[layer].b @ factors[layer].a)
        stored = tensors[names.tensor(f"{layer}.weight")]
        assert np.linalg.norm(weights(stored) - expected) <= limit * np.linalg.norm(expected)
    block_type = tensors["blk.0.ffn_up.weight"].tensor_type.name
    embedding_type = tensors["token_embd.weight"].tensor_type.name
    assert block_type == kind.upper()
    assert embedding_type == ("Q4_1" if kind == "Q4_0" else kind.upper())  # the base has it in 4 bits
    assert tensors["blk.0.attn_norm.weight"].tensor_type.name == "F32"
    assert gguf.LlamaFileType(settings_["general.file_type"]).name.endswith(kind.upper())
    assert report.types[kind.upper()] >= 14


def test_a_base_that_is_not_quantized_keeps_16_bits(tmp_path):
    folder = write_tiny_llama(tmp_path / "base", bits=None)
    rounded = {name: from_float32(tensor.floats(), "BF16") for name, tensor in Checkpoint(folder).tensors.items()}
    (folder / "model.safetensors").unlink()
    entries = {name: Tensor("BF16", array.shape) for name, array in rounded.items()}
    with Writer(folder / "model.safetensors", entries) as writer:
        for name, array in rounded.items():
            writer.write(name, array)
    factors = make_factors(folder)
    report = write_gguf(job_of(folder, factors, tmp_path / "model.gguf"))
    stored, _ = read(tmp_path / "model.gguf")
    assert stored["blk.0.ffn_up.weight"].tensor_type.name == "BF16"
    assert stored["blk.0.attn_q.weight"].tensor_type.name == "F16"
    base = Checkpoint(folder)
    np.testing.assert_array_equal(
        weights(stored["blk.0.ffn_up.weight"]), base.layer("model.layers.0.mlp.up_proj").rows()
    )
    assert report.error == 0
    assert min(layer.retention for layer in report.layers) > 0.99


def test_a_row_that_is_no_whole_number_of_blocks_leaves_with_16_bits(tmp_path):
    folder = write_tiny_llama(tmp_path / "base", bits=None, intermediate_size=80)
    write_gguf(job_of(folder, {}, tmp_path / "model.gguf", kind="Q8_0"))
    tensors, _ = read(tmp_path / "model.gguf")
    assert tensors["blk.0.ffn_down.weight"].tensor_type.name == "F16"
    assert tensors["blk.0.ffn_up.weight"].tensor_type.name == "Q8_0"


def test_the_order_of_q_and_k_turns_neighbours_as_mlx_turns_halves():
    rng, names = np.random.default_rng(0), read_names({**CONFIG, "head_dim": 16}, "here")
    x, angles = rng.normal(size=64), rng.normal(size=8)
    heads = x.reshape(4, 2, 8)
    turned = np.stack(
        [
            heads[:, 0] * np.cos(angles) - heads[:, 1] * np.sin(angles),
            heads[:, 0] * np.sin(angles) + heads[:, 1] * np.cos(angles),
        ],
        axis=1,
    ).reshape(64)
    order = names.order("model.layers.0.self_attn.q_proj", 64)
    pairs = x[order].reshape(4, 8, 2)
    neighbours = np.stack(
        [
            pairs[..., 0] * np.cos(angles) - pairs[..., 1] * np.sin(angles),
            pairs[..., 0] * np.sin(angles) + pairs[..., 1] * np.cos(angles),
        ],
        axis=-1,
    ).reshape(64)
    np.testing.assert_allclose(neighbours, turned[order], rtol=1e-12)


def test_only_q_and_k_change_their_order_and_only_where_llama_cpp_turns_neighbours():
    llama, qwen = read_names(CONFIG, "here"), read_names({**CONFIG, "model_type": "qwen2"}, "here")
    assert list(llama.order("model.layers.0.self_attn.k_proj", 8)) == [0, 2, 1, 3, 4, 6, 5, 7]
    assert llama.order("model.layers.0.self_attn.v_proj", 8) is None
    assert qwen.order("model.layers.0.self_attn.q_proj", 64) is None
    assert read_names({**CONFIG, "rope_traditional": True}, "x").order("model.layers.0.self_attn.q_proj", 64) is None


def test_the_bias_of_q_changes_its_order_with_the_rows(tmp_path):
    folder = write_tiny_llama(tmp_path / "base", attention_bias=True, mlp_bias=True)
    write_gguf(job_of(folder, {}, tmp_path / "model.gguf"))
    tensors, _ = read(tmp_path / "model.gguf")
    base = Checkpoint(folder)
    bias = base.tensors["model.layers.1.self_attn.q_proj.bias"].floats()
    assert np.unique(bias).size == bias.size
    np.testing.assert_array_equal(as_mlx(np.array(tensors["blk.1.attn_q.bias"].data), 4), bias)
    v_bias = base.tensors["model.layers.1.self_attn.v_proj.bias"].floats()
    np.testing.assert_array_equal(tensors["blk.1.attn_v.bias"].data, v_bias)


def test_llama3_factors_leave_short_waves_and_divide_long_ones():
    # dims 4, theta 100: full turns take 2 pi and 20 pi positions. Thresholds are 40 / 4 and 40 / 1 positions.
    factors = llama3_factors(100.0, 4, {**LLAMA3_ROPE, "original_max_position_embeddings": 40})
    np.testing.assert_array_equal(factors, np.float32([1, 8]))
    # Thresholds 25 and 100: the second wave lies between, at (100 / 62.83 - 1) / 3 = .1972 of the way to short.
    factors = llama3_factors(100.0, 4, {**LLAMA3_ROPE, "original_max_position_embeddings": 100})
    assert factors[1] == pytest.approx(1 / ((1 - 0.19718) / 8 + 0.19718), rel=1e-4)


def test_rope_is_read_from_both_places_where_it_may_stand(tmp_path):
    old = {**CONFIG, "rope_theta": 500000.0, "rope_scaling": LLAMA3_ROPE}
    new = {key: value for key, value in CONFIG.items() if key != "rope_theta"}
    new["rope_parameters"] = {**LLAMA3_ROPE, "rope_theta": 500000.0}
    ropes = [read_rope(config, tmp_path) for config in (old, new)]
    assert ropes[0].theta == ropes[1].theta == 500000.0
    np.testing.assert_array_equal(ropes[0].factors, ropes[1].factors)
    assert read_rope({**CONFIG, "rope_scaling": {"type": "linear", "factor": 4}}, tmp_path).linear_factor == 4.0
    assert read_rope({**CONFIG, "rope_parameters": {"rope_type": "default"}}, tmp_path).factors is None
    with pytest.raises(InputError, match="rope scaling: expected default, linear or llama3, got 'yarn'"):
        read_rope({**CONFIG, "rope_scaling": {"rope_type": "yarn", "factor": 4}}, tmp_path)


def test_the_factors_of_llama3_become_a_tensor_and_survive_the_way_back(tmp_path):
    rope = {**LLAMA3_ROPE, "factor": 32.0, "original_max_position_embeddings": 8192}
    more = {"rope_theta": 500000.0, "head_dim": 64, "max_position_embeddings": 131072, "rope_scaling": rope}
    folder = write_half_llama(tmp_path / "base", **more)
    write_gguf(job_of(folder, {}, tmp_path / "model.gguf"))
    tensors, settings_ = read(tmp_path / "model.gguf")
    assert tensors["rope_freqs.weight"].data.shape == (32,)
    assert settings_["llama.rope.dimension_count"] == settings_["llama.attention.key_length"] == 64
    import_gguf(tmp_path / "model.gguf", tmp_path / "folder")
    write_gguf(job_of(tmp_path / "folder", {}, tmp_path / "again.gguf"))
    again, _ = read(tmp_path / "again.gguf")
    np.testing.assert_array_equal(again["rope_freqs.weight"].data, tensors["rope_freqs.weight"].data)


def test_settings_say_the_size_of_the_model_and_its_tokenizer(half_llama, tmp_path):
    write_gguf(job_of(half_llama, {}, tmp_path / "mail.gguf", about=About("llama", licence="apache-2.0")))
    _, found = read(tmp_path / "mail.gguf")
    expected = {
        "general.architecture": "llama",
        "general.name": "mail",
        "general.license": "apache-2.0",
        "general.file_type": gguf.LlamaFileType.MOSTLY_Q4_1,
        "llama.block_count": 2,
        "llama.context_length": 512,
        "llama.embedding_length": 64,
        "llama.feed_forward_length": 128,
        "llama.attention.head_count": 4,
        "llama.attention.head_count_kv": 2,
        "llama.rope.dimension_count": 16,
        "llama.rope.freq_base": 10000.0,
        "llama.vocab_size": 300,
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "gpt-2",
        "tokenizer.ggml.bos_token_id": 1,
        "tokenizer.ggml.eos_token_id": 2,
        "tokenizer.ggml.unknown_token_id": 0,
        "tokenizer.ggml.padding_token_id": 2,
        "tokenizer.ggml.add_bos_token": False,
    }
    assert {key: found[key] for key in expected} == expected
    assert found["llama.attention.layer_norm_rms_epsilon"] == pytest.approx(1e-5)
    assert (
        found["tokenizer.chat_template"]
        == json.loads((half_llama / "tokenizer_config.json").read_text())["chat_template"]
    )


def test_tied_heads_are_written_once(tmp_path):
    folder = write_tiny_llama(tmp_path / "base", tie_word_embeddings=True)
    write_gguf(job_of(folder, {}, tmp_path / "model.gguf"))
    tensors, _ = read(tmp_path / "model.gguf")
    assert "output.weight" not in tensors and "token_embd.weight" in tensors


def test_what_gguf_has_no_place_for_is_refused_by_name(half_llama, tmp_path):
    base = Checkpoint(half_llama)
    tensors = {name: tensor.rows() for name, tensor in base.tensors.items()}
    folder = tmp_path / "odd"
    folder.mkdir()
    save_file({**tensors, "model.extra.weight": np.ones(4, np.float32)}, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(base.config))
    write_tokenizer(folder)
    with pytest.raises(InputError, match="GGUF's llama has no place for\n  model.extra.weight"):
        write_gguf(job_of(folder, {}, tmp_path / "model.gguf"))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["odd"]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model_type": "gemma2"}, "a GGUF file can be made of llama, mistral, qwen2, qwen3, got 'gemma2'"),
        ({"layer_types": ["sliding_attention"] * 2}, "full attention in every block"),
    ],
)
def test_an_architecture_that_we_do_not_know_is_refused(half_llama, tmp_path, changes, message):
    config = {**json.loads((half_llama / "config.json").read_text()), **changes}
    with pytest.raises(InputError, match=message):
        read_names(config, tmp_path)


@pytest.mark.parametrize("kind", ["Q4_K_M", "q6_k", "IQ4_XS"])
def test_types_that_only_llama_cpp_makes_are_answered_with_its_command(half_llama, tmp_path, kind):
    with pytest.raises(InputError, match=rf"--bits 16, then: llama-quantize .*m.gguf .*m-{kind.upper()}.gguf"):
        write_gguf(job_of(half_llama, {}, tmp_path / "m.gguf", kind=kind))
    with pytest.raises(InputError, match="--type: expected one of F32, F16, BF16, Q8_0, Q4_1, Q4_0, got 'Q9'"):
        write_gguf(job_of(half_llama, {}, tmp_path / "m.gguf", kind="Q9"))
    assert quantize_line(tmp_path / "m.gguf").endswith("m-Q4_K_M.gguf Q4_K_M")


def test_weights_that_a_type_cannot_hold_are_refused_and_leave_nothing(half_llama, tmp_path):
    factors = make_factors(half_llama, size=1e7)
    with pytest.raises(InputError, match="are not finite in F16; try --bits 16 or 32"):
        write_gguf(job_of(half_llama, factors, tmp_path / "m.gguf", kind="F16"))
    assert list(tmp_path.iterdir()) == []


def test_an_earlier_export_is_replaced_with_force_alone_and_a_foreign_file_never(half_llama, tmp_path):
    out = tmp_path / "model.gguf"
    write_gguf(job_of(half_llama, {}, out))
    with pytest.raises(InputError, match="exists; choose another place, or replace"):
        write_gguf(job_of(half_llama, {}, out))
    write_gguf(job_of(half_llama, {}, out, kind="F16", force=True))
    assert read(out)[0]["blk.0.ffn_up.weight"].tensor_type.name == "F16"
    writer = gguf.GGUFWriter(tmp_path / "theirs.gguf", "llama")
    writer.add_name("mine")
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()
    before = (tmp_path / "theirs.gguf").read_bytes()
    for foreign, content in ((tmp_path / "theirs.gguf", before), (tmp_path / "notes.txt", b"mine")):
        foreign.write_bytes(content)
        with pytest.raises(InputError, match="is no export of ours"):
            write_gguf(job_of(half_llama, {}, foreign, force=True))
        assert foreign.read_bytes() == content


@pytest.mark.parametrize("damage", ["weight", "norm", "token"])
def test_a_file_that_does_not_hold_what_was_meant_is_found_out(half_llama, tmp_path, damage):
    path = tmp_path / "model.gguf"
    factors = make_factors(half_llama)
    write_gguf(job_of(half_llama, factors, path))
    base = Checkpoint(half_llama)
    names, rope = read_names(base.config, half_llama), read_rope(base.config, half_llama)
    tensors, vocabulary = plan(base, factors, SCALE, names, rope, None), read_vocabulary(half_llama, base.config)
    check(path, tensors, SCALE, vocabulary, lambda nbytes: None)
    raw = bytearray(path.read_bytes())
    found, _ = read(path)
    if damage == "token":
        place, name = raw.index(b"<|im_end|>"), "tokenizer.ggml.tokens"
        raw[place + 2] ^= 1
    else:
        name = {"weight": "blk.1.attn_q.weight", "norm": "blk.0.attn_norm.weight"}[damage]
        start = int(found[name].data_offset)
        raw[start : start + found[name].n_bytes // 2] = bytes(found[name].n_bytes // 2)
    path.write_bytes(raw)
    with pytest.raises(RuntimeError, match=f"what was read back is not what was meant: {name}"):
        check(path, tensors, SCALE, vocabulary, lambda nbytes: None)


def test_progress_counts_every_byte_once_written_and_once_compared(half_llama, tmp_path):
    steps = []
    write_gguf(job_of(half_llama, {}, tmp_path / "m.gguf", show=showing(steps)))
    assert steps == sorted(steps) and steps[-1] == 100
    assert steps[len(steps) // 2 - 1] == 50 and len(steps) % 2 == 0


@pytest.mark.parametrize("bits", [2, 3, 4])
@pytest.mark.parametrize("size", [0.05, 1.0, 1e4])
def test_four_bits_hold_an_update_of_any_size_on_a_base_of_few_bits(tmp_path, bits, size):
    """On a grid of 2 bits nothing of it would be left, and on one of 4 a large one would be cut off."""
    base = write_tiny_llama(tmp_path / "base", bits=bits)
    report = write_gguf(job_of(base, make_factors(base, size=size), tmp_path / "a.gguf", bits=4))
    kept = [layer.retention for layer in report.layers]
    assert min(kept) > (0.5 if size < 0.1 else 0.95)
    assert report.types.keys() == {"F32", "Q4_1"}  # the embeddings, too, have 4 bits, as in the base


def test_four_bits_of_a_base_in_q4_0_stay_in_q4_0(tmp_path, mx):
    base = write_tiny_llama(tmp_path / "base")
    tensors = mx.load(str(base / "model.safetensors"))
    centred = {n: -8 * tensors[n.replace("biases", "scales")] for n in tensors if n.endswith("biases")}
    mx.save_safetensors(str(base / "model.safetensors"), tensors | centred, {"format": "mlx"})
    factors = make_factors(base)
    report = write_gguf(job_of(base, factors, tmp_path / "a.gguf", bits=4))
    assert report.types.keys() == {"F32", "Q4_0"}
    named = write_gguf(job_of(base, factors, tmp_path / "b.gguf", kind="Q4_1"))
    assert named.types["Q4_1"] > 10
