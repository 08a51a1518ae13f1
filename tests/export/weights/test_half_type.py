"""The 16-bit type of an export: measured, said, and the same in every target."""

import json
import os
import subprocess
import sys
from dataclasses import replace

import numpy as np
import pytest

from mbf_mlx.errors import InputError
from mbf_mlx.export import run
from mbf_mlx.export.job import ExportRows
from mbf_mlx.export.weights.checkpoint import Checkpoint
from mbf_mlx.export.weights.half_type import HalfType, choose_half_type
from tests.conftest import ROOT
from tests.support.factors import SCALE, logits, make_factors
from tests.support.jobs import job_of
from tests.support.tiny_llama import write_tiny_llama
from tests.support.token_rows import token_rows

HALVES = ("float16", "bfloat16")


def write_base(folder, dtype="bfloat16", change=lambda weights: None, **options):
    """A tiny Llama whose floats, or scales, are of a type; `change` changes its weights in place."""
    import mlx.core as mx

    base = write_tiny_llama(folder, torch_dtype=dtype, **options)
    weights = dict(mx.load(str(base / "model.safetensors")))
    change(weights)
    wanted = getattr(mx, dtype)
    weights = {name: value.astype(wanted) if value.dtype == mx.float32 else value for name, value in weights.items()}
    mx.save_safetensors(str(base / "model.safetensors"), weights, {"format": "mlx"})
    return base


def job_for(base, out, size=0.03, **options):
    rows = {"read_rows": lambda: ExportRows((), token_rows(40), "made-up rows")}
    return job_of(base, make_factors(base, size=size), out, **{"bits": 16, **rows, **options})


def types_in(folder):
    return {tensor.dtype for tensor in Checkpoint(folder).tensors.values()}


def set_weight(name, values):
    """Return a change of a base: the first numbers of a tensor."""

    def change(weights):
        import mlx.core as mx

        array = np.array(weights[name])
        array.flat[: len(values)] = values
        weights[name] = mx.array(array)

    return change


DOWN = "model.layers.1.mlp.down_proj.weight"


@pytest.mark.parametrize("tied", [False, True])
def test_a_base_with_bfloat16_scales_is_exported_in_float16(tmp_path, tied):
    many = ExportRows((), token_rows(400), "made-up rows")
    base = write_base(tmp_path / "base", tie_word_embeddings=tied)
    job = job_for(base, tmp_path / "out", size=0.008, read_rows=lambda: many)
    document = run(job, "mlx")
    half = document["half_type"]
    assert half["chosen"] == "float16" and half["why_not_float16"] is None
    assert half["errors"]["float16"] <= 0.05 and half["errors"]["bfloat16"] > 4 * half["errors"]["float16"]
    assert half["errors"]["float16"] == pytest.approx(document["error"], rel=1e-5)
    assert types_in(job.out) == {"F16"} and document["quality"]["agreement"] >= 0.95
    config = json.loads((job.out / "config.json").read_text())
    assert config["torch_dtype"] == "float16" and "quantization" not in config
    card = (job.out / "README.md").read_text()
    assert f"Stored in float16. The update keeps {100 * (1 - document['error']):.0f} %" in card
    assert (
        f"float16 rounds by {document['error']:.2f} of it, bfloat16 would by {half['errors']['bfloat16']:.2f}" in card
    )
    other = run(replace(job, half=HalfType("BF16", {"BF16": 0.2}), allow_loss=True, out=tmp_path / "other"), "mlx")
    assert other["error"] == pytest.approx(half["errors"]["bfloat16"], rel=1e-5)
    assert document["quality"]["agreement"] >= other["quality"]["agreement"]
    assert document["quality"]["kl"] < other["quality"]["kl"]


def test_a_weight_beyond_float16_makes_it_bfloat16_which_is_said(tmp_path):
    base = write_base(tmp_path / "base", bits=None, change=set_weight(DOWN, [1e6]))
    document = run(job_for(base, tmp_path / "out", size=0.2), "mlx")
    half = document["half_type"]
    assert half["chosen"] == "bfloat16" and list(half["errors"]) == ["bfloat16"]
    assert half["why_not_float16"] == f"float16 ends at 65,504, and {DOWN} goes up to 1e+06"
    assert half["why_not_float16"] in (tmp_path / "out" / "README.md").read_text()
    assert types_in(tmp_path / "out") == {"BF16"}
    assert json.loads((tmp_path / "out" / "config.json").read_text())["torch_dtype"] == "bfloat16"


@pytest.mark.parametrize("name", ["model.norm.weight", "model.embed_tokens.weight"])
def test_no_tensor_may_overflow_a_norm_neither(tmp_path, name):
    base = write_base(tmp_path / "base", bits=None, change=set_weight(name, [7e4]))
    half = choose_half_type(Checkpoint(base), make_factors(base), SCALE)
    assert half.dtype == "BF16" and f"{name} goes up to 7e+04" in half.why_not_float16


def test_a_tensor_that_float16_would_flush_away_makes_it_bfloat16(tmp_path):
    import mlx.core as mx

    def shrink(weights):
        weights[DOWN] = weights[DOWN] * mx.array(1e-7)

    base = write_base(tmp_path / "base", bits=None, change=shrink)
    half = choose_half_type(Checkpoint(base), make_factors(base), SCALE)
    assert half.dtype == "BF16" and f"the numbers of {DOWN} are so small" in half.why_not_float16
    # a few small numbers among others, as every model has them, are no reason
    few = write_base(tmp_path / "few", bits=None, change=set_weight(DOWN, [1e-7, 1e-9, 0]))
    assert choose_half_type(Checkpoint(few), make_factors(few), SCALE).dtype == "F16"


def test_tables_that_nobody_reads_decide_nothing_and_stay(tmp_path):
    import mlx.core as mx

    table = "model.layers.0.self_attn.rotary_emb.inv_freq"

    def add(weights):
        weights[table] = mx.full((8,), 1e-7)

    base = write_base(tmp_path / "base", bits=None, change=add)
    assert run(job_for(base, tmp_path / "out"), "mlx")["half_type"]["chosen"] == "float16"
    assert Checkpoint(tmp_path / "out").tensors[table].dtype == "BF16"


@pytest.mark.parametrize("bits", [4, None])
def test_a_base_in_float16_stays_in_it(tmp_path, bits):
    base = write_base(tmp_path / "base", "float16", bits=bits)
    document = run(job_for(base, tmp_path / "out"), "mlx")
    assert document["half_type"]["chosen"] == "float16" and types_in(tmp_path / "out") == {"F16"}


@pytest.mark.parametrize("dtype", HALVES)
def test_without_an_update_a_model_that_is_not_quantized_stays_as_it_is(tmp_path, dtype):
    base = write_base(tmp_path / "base", dtype, bits=None)
    half = choose_half_type(Checkpoint(base), {}, SCALE)
    assert half.document()["chosen"] == dtype


@pytest.mark.parametrize(("change", "kind"), [(None, "F16"), ([1e6], "BF16")])
@pytest.mark.parametrize("target", ["gguf", "ollama", "lmstudio"])
def test_gguf_files_have_the_same_type_as_folders(tmp_path, target, change, kind):
    base = write_base(tmp_path / "base", bits=None, change=set_weight(DOWN, change or []))
    job = job_for(base, tmp_path / "out", size=0.2)
    folder, file = run(replace(job, out=tmp_path / "folder"), "mlx"), run(job, target)
    assert file["half_type"] == folder["half_type"]
    assert set(file["types"]) == {"F32", kind}  # norms are float32 in GGUF
    assert file["error"] == pytest.approx(folder["error"], rel=1e-5)
    if target == "gguf":
        assert any(line.startswith("llama-quantize") for line in file["next"])


def test_lm_studios_mlx_engine_gets_the_same_type(tmp_path):
    base = write_base(tmp_path / "base")
    assert run(job_for(base, tmp_path / "out", kind="mlx"), "lmstudio")["half_type"]["chosen"] == "float16"
    assert types_in(tmp_path / "out" / "mbf" / "out") == {"F16"}


def overflowing(weights):
    """Make what a block multiplies go beyond float16, though no weight does, and what it gives does not."""
    for name, factor in (("up_proj", 3e3), ("gate_proj", 30.0), ("down_proj", 0.01)):
        weights[f"model.layers.0.mlp.{name}.weight"] *= factor


@pytest.mark.parametrize("target", ["mlx", "gguf"])
@pytest.mark.parametrize("allow_loss", [False, True])
def test_activations_beyond_float16_make_it_bfloat16_which_is_said(tmp_path, target, allow_loss):
    base = write_base(tmp_path / "base", bits=None, change=overflowing)
    assert choose_half_type(Checkpoint(base), make_factors(base, size=0.2), SCALE).dtype == "F16"
    document = run(job_for(base, tmp_path / "out", size=0.2, allow_loss=allow_loss), target)
    half = document["half_type"]
    assert half["chosen"] == "bfloat16" and set(half["errors"]) == set(HALVES)
    assert half["why_not_float16"] == "the export in float16 was refused, because its logits are not finite"
    assert document["quality"]["agreement"] >= 0.95 and document["lost"] == []


def test_where_neither_type_passes_the_refusal_is_about_float16(tmp_path):
    base = write_base(tmp_path / "base", bits=None)
    job = job_for(base, tmp_path / "out", size=1e-5, read_rows=ExportRows)
    with pytest.raises(InputError, match=r"it keeps 0\.\d+ of the update; expected at least 0.8"):
        run(job, "mlx")
    assert not job.out.exists()
    document = run(replace(job, allow_loss=True), "mlx")
    assert document["half_type"]["chosen"] == "float16" and document["lost"]


@pytest.mark.parametrize("keys", [("torch_dtype",), ("dtype",), ("torch_dtype", "dtype"), ()])
@pytest.mark.parametrize(("bits", "name"), [(16, "float16"), (32, "float32")])
def test_config_states_the_type_wherever_it_states_one(tmp_path, keys, bits, name):
    base = write_base(tmp_path / "base")
    config = json.loads((base / "config.json").read_text())
    del config["torch_dtype"]
    (base / "config.json").write_text(json.dumps({**config, **dict.fromkeys(keys, "bfloat16")}))
    run(job_for(base, tmp_path / "out", bits=bits), "mlx")
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    stated = {key: config[key] for key in ("torch_dtype", "dtype") if key in config}
    assert stated == dict.fromkeys(keys or ("torch_dtype",), name)
    assert types_in(tmp_path / "out") == {"F16" if bits == 16 else "F32"}


TORCH = """
import sys
import numpy as np, torch, transformers
model = transformers.AutoModelForCausalLM.from_pretrained(sys.argv[1], dtype="auto").eval()
assert model.dtype == getattr(torch, sys.argv[2]), model.dtype
with torch.no_grad():
    logits = model.float()(torch.tensor([[5, 17, 200, 31, 8, 99, 250, 12]])).logits[0]
np.save(sys.argv[3], logits.numpy())
"""


@pytest.mark.slow
@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("dtype", HALVES)
def test_transformers_and_mlx_lm_compute_the_same_from_the_folder(tmp_path, dtype, tied):
    import mlx_lm.utils

    pytest.importorskip("torch", reason="torch is not installed: the comparison with transformers needs it")
    change = set_weight("model.norm.weight", [7e4] if dtype == "bfloat16" else [])
    base = write_base(tmp_path / "base", bits=None, change=change, tie_word_embeddings=tied)
    document = run(job_for(base, tmp_path / "out", read_rows=ExportRows, allow_loss=True), "mlx")
    assert document["half_type"]["chosen"] == dtype
    assert str(mlx_lm.utils.load_model(tmp_path / "out")[0].model.norm.weight.dtype) == f"mlx.core.{dtype}"
    command = [sys.executable, "-c", TORCH, str(tmp_path / "out"), dtype, str(tmp_path / "logits.npy")]
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "HF_HUB_OFFLINE": "1"}, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    expected, found = np.load(tmp_path / "logits.npy"), logits(tmp_path / "out")
    np.testing.assert_allclose(found, expected, atol=2e-4 * np.abs(expected).max())
