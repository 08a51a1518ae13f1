"""The adapter as a GGUF file: read back with gguf's reader, it means the same update, on rows in GGUF's order."""

import subprocess
import sys

import numpy as np
import pytest

from mbf_mlx.base.gguf.names import read_names
from mbf_mlx.errors import InputError
from mbf_mlx.export.gguf.adapter import adapter_tensors, write_gguf_adapter
from mbf_mlx.export.gguf.write import write_gguf
from mbf_mlx.methods import Pair
from tests.support.factors import ALL_KEYS, SCALE, make_factors
from tests.support.gguf_files import as_mlx, read, weights
from tests.support.house import ROOT
from tests.support.jobs import job_of
from tests.support.tiny_llama import CONFIG


def test_the_file_says_what_llama_cpp_asks_for(tiny_llama, tmp_path):
    factors = make_factors(tiny_llama, ALL_KEYS)
    report = write_gguf_adapter(job_of(tiny_llama, factors, tmp_path / "mail.gguf"))
    tensors, settings = read(tmp_path / "mail.gguf")
    expected = {
        "general.architecture": "llama",
        "general.type": "adapter",
        "general.name": "mail",
        "adapter.type": "lora",
        "adapter.lora.alpha": SCALE * 4,
    }
    assert {key: settings[key] for key in expected} == expected
    assert (report.rank, report.alpha, report.layers) == (4, 8.0, 14)
    assert report.nbytes == (tmp_path / "mail.gguf").stat().st_size
    names = {name.removesuffix(half) for half in (".lora_a", ".lora_b") for name in tensors if name.endswith(half)}
    assert len(tensors) == 2 * len(names) == 28
    assert {name.split(".")[2] for name in names} == {
        *("attn_q", "attn_k", "attn_v", "attn_output"),
        *("ffn_gate", "ffn_up", "ffn_down"),
    }
    assert {tensor.tensor_type.name for tensor in tensors.values()} == {"F32"}


def test_base_and_adapter_together_are_the_fused_file(tiny_llama, tmp_path):
    factors = make_factors(tiny_llama, ALL_KEYS)
    write_gguf(job_of(tiny_llama, {}, tmp_path / "base.gguf", kind="F32"))
    write_gguf(job_of(tiny_llama, factors, tmp_path / "fused.gguf", kind="F32"))
    write_gguf_adapter(job_of(tiny_llama, factors, tmp_path / "adapter.gguf"))
    base, _ = read(tmp_path / "base.gguf")
    fused, _ = read(tmp_path / "fused.gguf")
    adapter, settings = read(tmp_path / "adapter.gguf")
    touched = [name for name in base if f"{name}.lora_a" in adapter]
    assert len(touched) == 14
    for name in touched:
        a, b = (np.array(adapter[f"{name}.lora_{half}"].data) for half in "ab")
        delta = settings["adapter.lora.alpha"] / a.shape[0] * b @ a  # as llama.cpp multiplies them
        np.testing.assert_allclose(weights(base[name]) + delta, weights(fused[name]), rtol=1e-5, atol=1e-6)


def test_only_the_rows_of_b_of_q_and_k_change_their_order(tiny_llama):
    factors = make_factors(tiny_llama, ALL_KEYS)
    tensors = adapter_tensors(factors, read_names(CONFIG, tiny_llama))
    for layer, target, heads in (("self_attn.q_proj", "attn_q", 4), ("self_attn.k_proj", "attn_k", 2)):
        pair = factors[f"model.layers.1.{layer}"]
        np.testing.assert_array_equal(tensors[f"blk.1.{target}.weight.lora_a"], pair.a)
        np.testing.assert_array_equal(as_mlx(tensors[f"blk.1.{target}.weight.lora_b"], heads), pair.b)
    pair = factors["model.layers.0.mlp.down_proj"]
    np.testing.assert_array_equal(tensors["blk.0.ffn_down.weight.lora_b"], pair.b)


def test_layers_that_an_adapter_file_cannot_change_are_named_together(tiny_llama, tmp_path):
    pair = Pair(np.ones((2, 64), np.float32), np.ones((300, 2), np.float32))
    factors = {"lm_head": pair, "model.embed_tokens": pair, "model.layers.0.odd": pair}
    with pytest.raises(
        InputError, match="export gguf, which fuses them:\n  lm_head\n  model.embed_tokens\n  model.*odd"
    ):
        write_gguf_adapter(job_of(tiny_llama, factors, tmp_path / "a.gguf"))
    with pytest.raises(InputError, match="it has no factors at all"):
        write_gguf_adapter(job_of(tiny_llama, {}, tmp_path / "a.gguf"))
    assert not (tmp_path / "a.gguf").exists()


def test_an_earlier_adapter_is_replaced_with_force_alone_and_a_foreign_file_never(tiny_llama, tmp_path):
    factors, out = make_factors(tiny_llama), tmp_path / "a.gguf"
    write_gguf_adapter(job_of(tiny_llama, factors, out))
    with pytest.raises(InputError, match="exists"):
        write_gguf_adapter(job_of(tiny_llama, factors, out))
    write_gguf_adapter(job_of(tiny_llama, factors, out, scale=2 * SCALE, force=True))
    assert read(out)[1]["adapter.lora.alpha"] == 2 * SCALE * 4
    out.write_bytes(b"GGUF but not ours")
    with pytest.raises(InputError, match="no export of ours"):
        write_gguf_adapter(job_of(tiny_llama, factors, out, force=True))


def test_it_needs_neither_mlx_nor_torch_nor_the_weights(tiny_llama, tmp_path):
    (tmp_path / "base").mkdir()
    (tmp_path / "base" / "config.json").write_text((tiny_llama / "config.json").read_text())
    code = """
import sys
for name in ("mlx", "mlx.core", "mlx_lm", "torch", "transformers"):
    sys.modules[name] = None
from pathlib import Path
import numpy as np
from mbf_mlx.export.gguf.adapter import write_gguf_adapter
from mbf_mlx.methods import Pair
from tests.support.jobs import job_of
pair = Pair(np.ones((2, 64), np.float32), np.ones((64, 2), np.float32))
folder = Path(sys.argv[1])
write_gguf_adapter(job_of(folder / "base", {"model.layers.0.self_attn.q_proj": pair}, folder / "a.gguf", scale=2.0))
"""
    subprocess.run([sys.executable, "-c", code, str(tmp_path)], check=True, cwd=ROOT)
    assert set(read(tmp_path / "a.gguf")[0]) == {"blk.0.attn_q.weight.lora_a", "blk.0.attn_q.weight.lora_b"}


def test_a_folder_that_is_no_model_is_refused(tmp_path):
    pair = Pair(np.ones((2, 64), np.float32), np.ones((64, 2), np.float32))
    with pytest.raises(InputError, match="not a model folder: expected a config.json in it"):
        write_gguf_adapter(job_of(tmp_path, {"model.layers.0.self_attn.q_proj": pair}, tmp_path / "a.gguf", scale=2.0))
    for text, message in (("{", "config.json: not JSON"), ("[]", "expected a JSON object, got list")):
        (tmp_path / "config.json").write_text(text)
        with pytest.raises(InputError, match=message):
            write_gguf_adapter(
                job_of(tmp_path, {"model.layers.0.self_attn.q_proj": pair}, tmp_path / "a.gguf", scale=2.0)
            )
