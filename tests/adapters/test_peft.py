"""PEFT folders both ways: the same update in PEFT, the same bytes on the way back, and refusals with their reason."""

import json

import numpy as np
import pytest
import safetensors.numpy
from hypothesis import given
from hypothesis import strategies as st

from mbf_mlx import exchange
from mbf_mlx.adapters.mlx_lm import adapter_files, read_adapter
from mbf_mlx.adapters.peft import CONFIG, WEIGHTS, peft_files, read_peft
from mbf_mlx.errors import InputError
from mbf_mlx.methods import Pair
from tests.support.streams import learn, new_stream
from tests.support.tiny_llama import write_tiny_llama

RANK = 4
LAYERS = [f"model.layers.{block}.self_attn.{key}" for block in (0, 1) for key in ("q_proj", "v_proj")]


def make_factors(layers=LAYERS, rank=RANK, seed=0):
    generator = np.random.default_rng(seed)
    shape = {"q_proj": (64, 64), "v_proj": (32, 64), "up_proj": (128, 64)}
    factors = {}
    for layer in layers:
        out, inner = shape.get(layer.rpartition(".")[2], (300, 64))
        a, b = generator.normal(size=(rank, inner)), generator.normal(size=(out, rank))
        factors[layer] = Pair(0.2 * a.astype(np.float32), 0.2 * b.astype(np.float32))
    return factors


def write(folder, files):
    folder.mkdir(exist_ok=True)
    for name, data in files.items():
        (folder / name).write_bytes(data)
    return folder


def export(folder, factors, scale=2.0, **changes):
    """A PEFT folder, `changes` made to its config afterwards."""
    files = peft_files(factors, scale, base="org/base", num_blocks=2)
    config = json.loads(files[CONFIG]) | changes
    return write(folder, {**files, CONFIG: json.dumps(config).encode()})


def retype(folder, dtype, rename=lambda name: name):
    """Store the tensors of a PEFT folder in another type and under other names."""
    tensors = safetensors.numpy.load_file(folder / WEIGHTS)
    tensors = {rename(name): array.astype(dtype) for name, array in tensors.items()}
    safetensors.numpy.save_file(tensors, folder / WEIGHTS)


def deltas(factors, scale):
    return {name: scale * pair.b.astype(np.float64) @ pair.a.astype(np.float64) for name, pair in factors.items()}


@pytest.mark.parametrize("scale", [0.25, 1.0, 1.5, 2.0, 20.0])
def test_mlx_to_peft_to_mlx_gives_the_same_bytes(tmp_path, scale):
    factors = make_factors()
    files = adapter_files(factors, scale=scale, num_layers=2, base="base")
    start = read_adapter(write(tmp_path / "mlx", files))
    back = read_peft(write(tmp_path / "peft", peft_files(start.factors, start.scale, base="base", num_blocks=2)))
    assert adapter_files(back.factors, scale=back.scale, num_layers=2, base="base") == files


@given(st.floats(1e-3, 1e3), st.integers(1, 16))
def test_the_update_survives_and_alpha_is_whole_for_any_scale_and_rank(scale, rank):
    factors = make_factors(rank=rank)
    files = peft_files(factors, scale, base="base", num_blocks=2)
    config = json.loads(files[CONFIG])
    assert type(config["lora_alpha"]) is int and config["lora_alpha"] >= 1
    tensors = safetensors.numpy.load(bytes(files[WEIGHTS]))
    for name, delta in deltas(factors, scale).items():
        a, b = (tensors[f"base_model.model.{name}.lora_{half}.weight"].astype(np.float64) for half in "AB")
        theirs = config["lora_alpha"] / config["r"] * b @ a
        np.testing.assert_allclose(theirs, delta, rtol=1e-5, atol=1e-6 * np.abs(delta).max())


def test_the_config_says_which_layers(tmp_path):
    def targets(layers):
        config = json.loads(peft_files(make_factors(layers), 2.0, base="b", num_blocks=2)[CONFIG])
        return config["target_modules"], config["layers_to_transform"], config["layers_pattern"]

    assert targets(LAYERS) == (["q_proj", "v_proj"], None, None)
    assert targets(LAYERS[2:]) == (["q_proj", "v_proj"], [1], "layers")
    assert targets(LAYERS[:3]) == (LAYERS[:3], None, None)
    assert targets([*LAYERS, "lm_head"]) == (["lm_head", *LAYERS], None, None)


@pytest.mark.parametrize("dtype", ["float16", "float32", "float64"])
def test_other_float_types_are_read(tmp_path, dtype):
    factors = make_factors()
    folder = export(tmp_path / "peft", factors)
    retype(folder, dtype)
    back = read_peft(folder).factors
    for name, pair in factors.items():
        assert back[name].a.dtype == np.float32
        np.testing.assert_allclose(back[name].b, pair.b, rtol=1e-3)


def test_bfloat16_is_read(tmp_path, mx):
    factors = make_factors()
    folder = export(tmp_path / "peft", factors)
    tensors = {name: array.astype(mx.bfloat16) for name, array in mx.load(str(folder / WEIGHTS)).items()}
    mx.save_safetensors(str(folder / WEIGHTS), tensors)
    for name, pair in read_peft(folder).factors.items():
        np.testing.assert_allclose(pair.a, factors[name].a, rtol=1e-2)


def test_the_adapters_name_in_a_key_is_dropped(tmp_path):
    folder = export(tmp_path / "peft", make_factors())
    retype(folder, "float32", lambda name: name.replace(".weight", ".default.weight"))
    assert list(read_peft(folder).factors) == LAYERS


def test_rslora_is_folded_into_the_scale(tmp_path):
    folder = export(tmp_path / "peft", make_factors(), use_rslora=True, lora_alpha=8)
    assert read_peft(folder).scale == 8 / np.sqrt(RANK)


def test_alpha_and_rank_patterns_are_folded_in(tmp_path):
    factors = make_factors()
    small = Pair(factors[LAYERS[1]].a[:2], factors[LAYERS[1]].b[:, :2])
    mixed = {**factors, LAYERS[1]: small}
    patterns = {"rank_pattern": {"layers.0.self_attn.v_proj": 2}, "alpha_pattern": {r"^model\.layers\.1\..*q_proj": 16}}
    folder = export(tmp_path / "peft", factors, **patterns)
    tensors = {}
    for name, pair in mixed.items():
        tensors[f"base_model.model.{name}.lora_A.weight"] = np.ascontiguousarray(pair.a)
        tensors[f"base_model.model.{name}.lora_B.weight"] = np.ascontiguousarray(pair.b)
    safetensors.numpy.save_file(tensors, folder / WEIGHTS)
    back = read_peft(folder)
    assert back.rank == RANK and back.scale == 2.0  # alpha 8, rank 4
    scales = dict.fromkeys(LAYERS, 2.0) | {LAYERS[1]: 8 / 2, LAYERS[2]: 16 / 4}
    for name, delta in deltas(back.factors, back.scale).items():
        expected = scales[name] * mixed[name].b.astype(np.float64) @ mixed[name].a
        np.testing.assert_allclose(delta, expected, rtol=1e-5, atol=1e-6)
    assert len(back.notes) == 2 and "2 layers have another alpha" in back.notes[0]


def test_an_adapter_from_anywhere_is_the_start_of_a_stream_with_its_update_unchanged(tmp_path):
    stream = new_stream(tmp_path / "s")
    generator, rank = np.random.default_rng(3), stream.identity.rank
    factors = {
        name: Pair(*(generator.normal(size=shape).astype(np.float32) for shape in ((rank, inner), (out, rank))))
        for name, (out, inner) in stream.identity.layers.items()
    }
    folder = export(tmp_path / "peft", factors, use_rslora=True, lora_alpha=6, alpha_pattern={"q_proj": 3})
    scales = {name: (3 if name.endswith("q_proj") else 6) / np.sqrt(rank) for name in factors}
    with stream.writer():
        done = exchange.absorb(stream, folder, "theirs", force=True)
    assert done.record.t == 1 and "have another alpha" in done.notes[0]
    state = stream.state()
    for name, delta in deltas(state.deployed, stream.identity.scale).items():
        expected = scales[name] * factors[name].b.astype(np.float64) @ factors[name].a
        np.testing.assert_allclose(delta, expected, rtol=1e-5, atol=1e-5)
    learn(stream)
    assert [record.name for record in stream.history()] == ["theirs", "task2"]


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"use_dora": True}, "use_dora: DoRA rescales"),
        ({"modules_to_save": ["lm_head"]}, "modules_to_save: whole modules"),
        ({"bias": "lora_only"}, "bias='lora_only'"),
        ({"init_lora_weights": "pissa_niter_4"}, "its base weights were changed before training"),
        ({"layer_replication": [[0, 2]]}, "layers are repeated"),
        ({"peft_type": "IA3"}, "peft_type: expected 'LORA', got 'IA3'"),
        ({"rank_pattern": {"q_proj": 3}}, "expected factors of rank 3"),
        ({"alpha_pattern": {"(": 3}}, "is no regular expression"),
        ({"lora_alpha": None}, "an alpha, got 4 and None"),
    ],
)
def test_what_plain_factors_cannot_hold_is_refused_with_the_reason(tmp_path, changes, reason):
    folder = export(tmp_path / "peft", make_factors(), **changes)
    with pytest.raises(InputError) as error:
        read_peft(folder)
    assert reason in str(error.value)


def test_every_reason_is_named_at_once(tmp_path):
    folder = export(tmp_path / "peft", make_factors(), use_dora=True, modules_to_save=["lm_head"], bias="all")
    with pytest.raises(InputError, match=r"(?s)use_dora.*modules_to_save.*bias"):
        read_peft(folder)


@pytest.mark.parametrize(
    ("key", "reason"),
    [
        ("base_model.model.model.embed_tokens.lora_embedding_A", "embeddings cannot be merged"),
        ("base_model.model.lm_head.weight", "holds more than factors of linear layers"),
        ("base_model.model.model.layers.0.mlp.up_proj.lora_A.weight", r"expected A \(rank, in\) and B"),
    ],
)
def test_tensors_that_are_no_pair_are_refused_by_name(tmp_path, key, reason):
    folder = export(tmp_path / "peft", make_factors())
    tensors = safetensors.numpy.load_file(folder / WEIGHTS) | {key: np.zeros((4, 64), np.float32)}
    safetensors.numpy.save_file(tensors, folder / WEIGHTS)
    with pytest.raises(InputError, match=rf"(?s){reason}"):
        read_peft(folder)


def test_nan_is_refused(tmp_path):
    factors = make_factors()
    factors[LAYERS[0]].a[0, 0] = np.nan
    with pytest.raises(InputError, match="NaN"):
        read_peft(export(tmp_path / "peft", factors))


def test_missing_files_pickles_and_damage_are_the_users_to_know(tmp_path):
    folder = export(tmp_path / "peft", make_factors())
    (folder / WEIGHTS).write_bytes(b"nonsense")
    with pytest.raises(InputError, match="not a safetensors file"):
        read_peft(folder)
    (folder / WEIGHTS).rename(folder / "adapter_model.bin")
    with pytest.raises(InputError, match="is a pickle, which can run code"):
        read_peft(folder)
    (folder / CONFIG).write_text("{")
    with pytest.raises(InputError, match="not JSON"):
        read_peft(folder)
    with pytest.raises(InputError, match="missing; expected a PEFT folder"):
        read_peft(tmp_path / "nowhere")


@pytest.mark.slow
@pytest.mark.parametrize("scale", [2.0, 1.7])
@pytest.mark.parametrize("layers", [LAYERS, LAYERS[2:], [*LAYERS, "model.layers.1.mlp.up_proj"]])
def test_peft_computes_the_logits_that_mlx_lm_computes(tmp_path, scale, layers, mx):
    torch, theirs = pytest.importorskip("torch"), pytest.importorskip("peft")
    from mlx_lm.utils import load_adapters, load_model
    from transformers import AutoModelForCausalLM

    base, factors = write_tiny_llama(tmp_path / "base", bits=None), make_factors(layers)
    tokens = [[5, 17, 200, 31, 8, 99, 250, 12]]
    mlx_folder = write(tmp_path / "mlx", adapter_files(factors, scale=scale, num_layers=2, base=str(base)))
    model = load_adapters(load_model(base)[0], str(mlx_folder))
    expected = np.array(model(mx.array(tokens)))
    plain = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    before = plain(torch.tensor(tokens)).logits.detach().numpy()
    peft_folder = write(tmp_path / "peft", peft_files(factors, scale, base=str(base), num_blocks=2))
    got = theirs.PeftModel.from_pretrained(plain, peft_folder)(torch.tensor(tokens)).logits.detach().numpy()
    assert np.abs(expected - before).max() > 0.1
    np.testing.assert_allclose(got, expected, atol=1e-4 * np.abs(expected).max())


@pytest.mark.slow
def test_an_adapter_that_peft_trained_with_patterns_is_read_as_peft_applies_it(tmp_path):
    torch, theirs = pytest.importorskip("torch"), pytest.importorskip("peft")
    from transformers import AutoModelForCausalLM

    base = write_tiny_llama(tmp_path / "base", bits=None)
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    config = theirs.LoraConfig(
        r=4,
        lora_alpha=6,
        target_modules=["q_proj", "v_proj", "up_proj"],
        rank_pattern={"layers.1.self_attn.q_proj": 2},
        alpha_pattern={"up_proj": 3},
        use_rslora=True,
        init_lora_weights=False,
        task_type="CAUSAL_LM",
    )
    tuned = theirs.get_peft_model(model, config)
    tuned.save_pretrained(tmp_path / "peft")
    ours = read_peft(tmp_path / "peft")
    for name, delta in deltas(ours.factors, ours.scale).items():
        layer = tuned.base_model.model.get_submodule(name)
        expected = layer.get_delta_weight("default").detach().numpy()
        np.testing.assert_allclose(delta, expected, rtol=1e-4, atol=1e-6)
    assert ours.rank == 4
