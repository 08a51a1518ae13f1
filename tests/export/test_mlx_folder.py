"""The fused MLX folder: byte for byte where nothing was learned, loads in mlx-lm, and keeps the update."""

import json

import numpy as np
import pytest
from safetensors import safe_open

from mbf_mlx.errors import InputError
from mbf_mlx.export.mlx_folder import planned_bytes, write_mlx_folder
from mbf_mlx.export.weights.checkpoint import Checkpoint
from mbf_mlx.methods import Pair
from tests.support.factors import SCALE, logits, make_factors
from tests.support.jobs import job_of, mean_retention, showing
from tests.support.tiny_llama import write_tiny_llama


def all_tensors(folder):
    """Every tensor's dtype, shape and raw bytes."""
    tensors = Checkpoint(folder).tensors
    return {name: (tensor.dtype, tensor.shape, tensor.rows().tobytes()) for name, tensor in tensors.items()}


@pytest.fixture
def factors(tiny_llama):
    return make_factors(tiny_llama)


def test_untouched_tensors_stay_byte_for_byte_and_touched_ones_go_to_8_bits(tiny_llama, factors, tmp_path):
    report = write_mlx_folder(job_of(tiny_llama, factors, tmp_path / "out"))
    before, after = all_tensors(tiny_llama), all_tensors(tmp_path / "out")
    changed = {name.rpartition(".")[0] for name in after if before.get(name) != after[name]}
    assert changed == set(factors)
    assert set(before) == set(after)
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    for name in factors:
        assert config["quantization"][name] == {"group_size": 64, "bits": 8, "mode": "affine"}
    assert {layer.name for layer in report.layers} == set(factors)
    assert all(layer.after == "8 bits, group 64" for layer in report.layers)


def test_the_base_config_keeps_every_other_key_and_its_order(tiny_llama, factors, tmp_path):
    write_mlx_folder(job_of(tiny_llama, factors, tmp_path / "out"))
    before = json.loads((tiny_llama / "config.json").read_text())
    after = json.loads((tmp_path / "out" / "config.json").read_text())
    assert list(after) == list(before)
    assert {key: value for key, value in after.items() if key != "quantization"} == {
        key: value for key, value in before.items() if key != "quantization"
    }
    assert after["quantization"]["bits"] == before["quantization"]["bits"]


def test_tokenizer_and_licence_are_the_bases_own_files(tiny_llama, factors, tmp_path):
    base = tmp_path / "base"
    base.mkdir()
    for path in tiny_llama.iterdir():
        (base / path.name).write_bytes(path.read_bytes())
    (base / "LICENSE").write_text("do as you like")
    (base / "chat_template.jinja").write_text("{{ messages }}")
    (base / ".hidden").write_text("not ours to hand on")
    write_mlx_folder(job_of(base, factors, tmp_path / "out"))
    for name in ("tokenizer.json", "tokenizer_config.json", "LICENSE", "chat_template.jinja"):
        assert (tmp_path / "out" / name).read_bytes() == (base / name).read_bytes()
    assert not (tmp_path / "out" / ".hidden").exists()


@pytest.mark.parametrize(
    ("bits", "retention", "error"), [(None, 0.99, 0.4), (6, 0.8, 2.0), (16, 0.999, 0.02), (32, 1 - 1e-5, 1e-4)]
)
def test_the_report_states_what_the_stored_weights_kept(tiny_llama, factors, tmp_path, bits, retention, error):
    report = write_mlx_folder(job_of(tiny_llama, factors, tmp_path / "out", bits=bits))
    before, after = Checkpoint(tiny_llama), Checkpoint(tmp_path / "out")
    for layer in report.layers:
        delta = SCALE * factors[layer.name].b @ factors[layer.name].a
        realised = after.layer(layer.name).rows() - before.layer(layer.name).rows()
        kept = (realised * delta).sum() / (delta * delta).sum()
        assert layer.retention == pytest.approx(kept, abs=1e-4)
        assert layer.error == pytest.approx(
            np.linalg.norm(realised - delta) / np.linalg.norm(delta), rel=1e-3, abs=1e-6
        )
        assert layer.retention > retention
        assert layer.error < error
        assert layer.size == pytest.approx(0.03, rel=1e-3)


@pytest.mark.parametrize("bits", [None, 6, 16, 32])
def test_mlx_lm_loads_the_folder_and_computes_what_the_adapter_would(tiny_llama, factors, tmp_path, bits, tolerance):
    write_mlx_folder(job_of(tiny_llama, factors, tmp_path / "out", bits=bits))
    base, live, fused = logits(tiny_llama), logits(tiny_llama, factors), logits(tmp_path / "out")
    moved = np.linalg.norm(live - base)
    assert np.linalg.norm(fused - live) < {None: 0.25, 6: 0.9, 16: 0.03, 32: 1e-4}[bits] * moved


def test_mlx_lm_generates_from_the_folder(tiny_llama, factors, tmp_path):
    from mlx_lm import generate, load

    write_mlx_folder(job_of(tiny_llama, factors, tmp_path / "out"))
    model, tokenizer = load(str(tmp_path / "out"))
    assert isinstance(generate(model, tokenizer, prompt="The stream", max_tokens=4), str)
    assert model.model.layers[0].self_attn.q_proj.bits == 8
    assert model.model.layers[0].self_attn.k_proj.bits == 4


def test_the_output_is_a_valid_safetensors_file_with_an_mlx_header(tiny_llama, factors, tmp_path):
    write_mlx_folder(job_of(tiny_llama, factors, tmp_path / "out"))
    with safe_open(tmp_path / "out" / "model.safetensors", "numpy") as file:
        assert file.metadata() == {"format": "mlx"}
        assert set(file.keys()) == set(Checkpoint(tiny_llama).tensors)


def test_6_bits_are_for_the_layers_whose_update_survives_them_and_8_for_the_others(tiny_llama, tmp_path):
    large, small = (make_factors(tiny_llama, keys, size=size) for keys, size in (("q_proj", 0.1), ("v_proj", 0.003)))
    job = job_of(tiny_llama, large | small, tmp_path / "out", bits=6)
    report = write_mlx_folder(job)
    after = {layer.name: layer.after for layer in report.layers}
    assert {after[name].partition(",")[0] for name in large} == {"6 bits"}
    assert {after[name].partition(",")[0] for name in small} == {"8 bits"}
    assert planned_bytes(job, 6) == report.bytes_out
    assert report.bytes_out < planned_bytes(job, None)
    difference = abs(logits(tmp_path / "out") - logits(tiny_llama, large | small)).max()
    assert difference < 0.3 < abs(logits(tiny_llama) - logits(tiny_llama, large | small)).max()


def test_a_layer_that_learned_nothing_stays_byte_for_byte(tiny_llama, factors, tmp_path):
    still = {name: Pair(pair.a, 0 * pair.b) for name, pair in factors.items()}
    report = write_mlx_folder(job_of(tiny_llama, still, tmp_path / "out"))
    assert all_tensors(tiny_llama) == all_tensors(tmp_path / "out")
    assert (tmp_path / "out" / "config.json").read_bytes() == (tiny_llama / "config.json").read_bytes()
    assert mean_retention(report) == 1
    assert report.bytes_out == report.bytes_base


def test_a_layer_that_the_base_does_not_quantize_keeps_its_type(tmp_path):
    base = write_tiny_llama(tmp_path / "base", bits=None)
    report = write_mlx_folder(job_of(base, make_factors(base), tmp_path / "out"))
    assert {layer.after for layer in report.layers} == {"F32"}
    assert mean_retention(report) == pytest.approx(1, abs=1e-5)
    assert (tmp_path / "out" / "config.json").read_bytes() == (base / "config.json").read_bytes()


def test_16_bits_leaves_no_quantization_and_states_the_type(tiny_llama, factors, tmp_path):
    write_mlx_folder(job_of(tiny_llama, factors, tmp_path / "out", bits=16))
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert "quantization" not in config and config["torch_dtype"] == "float16"
    tensors = Checkpoint(tmp_path / "out").tensors
    assert not any(name.endswith((".scales", ".biases")) for name in tensors)
    assert {tensor.dtype for tensor in tensors.values() if len(tensor.shape) == 2} == {"F16"}


@pytest.mark.parametrize("mode", ["mxfp4", "nvfp4", "mxfp8"])
def test_a_base_quantized_to_small_floats_is_fused_at_8_bits(mode, tmp_path, mx):
    import mlx.nn as nn
    import mlx_lm.utils
    from mlx.utils import tree_flatten

    base = write_tiny_llama(tmp_path / "base", bits=None)
    model, config = mlx_lm.utils.load_model(base)
    nn.quantize(model, mode=mode)
    weights = dict(tree_flatten(model.parameters()))
    mx.save_safetensors(str(base / "model.safetensors"), weights, {"format": "mlx"})
    layer = model.model.layers[0].self_attn.q_proj
    config["quantization"] = {"group_size": layer.group_size, "bits": layer.bits, "mode": mode}
    (base / "config.json").write_text(json.dumps(config))
    factors = make_factors(base)
    report = write_mlx_folder(job_of(base, factors, tmp_path / "out"))
    assert mean_retention(report) > 0.98
    live, fused = logits(base, factors), logits(tmp_path / "out")
    assert np.linalg.norm(fused - live) < 0.3 * np.linalg.norm(live - logits(base))


def test_weights_in_several_files_stay_in_their_files(tiny_llama, factors, tmp_path, mx):
    base = tmp_path / "base"
    base.mkdir()
    for path in tiny_llama.iterdir():
        (base / path.name).write_bytes(path.read_bytes())
    weights = mx.load(str(base / "model.safetensors"))
    (base / "model.safetensors").unlink()
    names = sorted(weights)  # which parts a layer's weight and its scales
    cut = names.index("model.layers.0.self_attn.q_proj.scales") + 1
    parts = {"model-00001-of-00002.safetensors": names[:cut], "model-00002-of-00002.safetensors": names[cut:]}
    for file, members in parts.items():
        mx.save_safetensors(str(base / file), {name: weights[name] for name in members}, {"format": "mlx"})
    index = {"metadata": {"total_parameters": 7}, "weight_map": {name: f for f, ns in parts.items() for name in ns}}
    (base / "model.safetensors.index.json").write_text(json.dumps(index))
    write_mlx_folder(job_of(base, factors, tmp_path / "out"))
    index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_parameters"] == 7
    for name, file in index["weight_map"].items():
        with safe_open(tmp_path / "out" / file, "numpy") as opened:
            assert name in opened.keys()
    write_mlx_folder(job_of(tiny_llama, factors, tmp_path / "single"))
    assert all_tensors(tmp_path / "out") == all_tensors(tmp_path / "single")


def test_progress_counts_every_tensor_and_ends_at_100_percent(tiny_llama, factors, tmp_path):
    seen = []
    write_mlx_folder(job_of(tiny_llama, factors, tmp_path / "out", show=showing(seen)))
    assert seen == sorted(seen) and seen[-1] == 100
    assert len(seen) == len(Checkpoint(tiny_llama).tensors)


def test_an_adapter_of_another_base_is_refused_with_every_layer_named(tiny_llama, factors, tmp_path):
    name = "model.layers.0.self_attn.q_proj"
    wrong = {**factors, name: Pair(np.ones((4, 96), np.float32), np.ones((64, 4), np.float32))}
    wrong["model.layers.7.self_attn.q_proj"] = wrong[name]
    with pytest.raises(InputError) as error:
        write_mlx_folder(job_of(tiny_llama, wrong, tmp_path / "out"))
    assert f"{name}: expected (64, 64), got A (4, 96) and B (64, 4)" in str(error.value)
    assert "model.layers.7.self_attn.q_proj: not in the base's files" in str(error.value)
    assert list(tmp_path.iterdir()) == []


def test_weights_packed_by_another_tool_are_refused_with_the_way_out(tiny_llama, factors, tmp_path, mx):
    base = tmp_path / "base"
    base.mkdir()
    (base / "config.json").write_text(json.dumps({"model_type": "llama"}))
    mx.save_safetensors(str(base / "model.safetensors"), {"model.layers.0.mlp.up_proj.qweight": mx.zeros((2, 2))})
    with pytest.raises(InputError, match=r"another tool packed its weights.*mlx_lm.convert"):
        write_mlx_folder(job_of(base, factors, tmp_path / "out"))


def test_other_bits_are_refused(tiny_llama, factors, tmp_path):
    with pytest.raises(InputError, match="--bits: expected one of 4, 5, 6, 8, 16, 32, got 7"):
        write_mlx_folder(job_of(tiny_llama, factors, tmp_path / "out", bits=7))
