"""What mlx-lm computes of a folder is what the folder says, as transformers reads it."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from mbf_mlx.base.config_translation import translation
from mbf_mlx.errors import InputError
from tests.conftest import ROOT, import_mlx
from tests.support.command_line import mbf

LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
LLAMA3 |= {"original_max_position_embeddings": 64}
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64}
ROPES = {
    "default": {"rope_type": "default"},
    "linear": {"rope_type": "linear", "factor": 4.0},
    "dynamic": {"rope_type": "dynamic", "factor": 4.0},
    "llama3": LLAMA3,
    "yarn": YARN,
    "longrope": {
        "rope_type": "longrope",
        "factor": 4.0,
        "short_factor": [1.5] * 8,
        "long_factor": [1.5] * 8,
        "original_max_position_embeddings": 64,
    },
    "proportional": {"rope_type": "proportional", "partial_rotary_factor": 0.5},
    "yarn with its betas": YARN | {"beta_fast": 16.0, "beta_slow": 2.0},
}
SIZES = {"vocab_size": 300, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2}
SIZES |= {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16, "max_position_embeddings": 256}

# In a process of its own: mlx and torch bring thread pools of their own.
SAVE = """
import json, sys
import numpy as np, torch, transformers
kind, changes, folder = sys.argv[1], json.loads(sys.argv[2]), sys.argv[3]
torch.manual_seed(0)
config = transformers.AutoConfig.for_model(kind, **changes)
model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
with torch.no_grad():
    for name, array in model.named_parameters():
        if array.ndim == 2: array.mul_(8)
        if name.endswith(".bias"): array.normal_()
    tokens = torch.arange(1, 201)[None] * 7 % 300
    np.save(folder + "/expected.npy", model(tokens).logits[0].numpy())
model.save_pretrained(folder)
"""


def saved(folder, kind, **changes):
    """Return the logits of a random model of transformers, which is then in `folder`."""
    pytest.importorskip("torch", reason="torch is not installed: the comparison with transformers needs it")
    folder.mkdir()
    command = [sys.executable, "-c", SAVE, kind, json.dumps({**SIZES, **changes}), str(folder)]
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "HF_HUB_OFFLINE": "1"}, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    from tests.support.tiny_llama import write_tokenizer

    write_tokenizer(folder)
    return np.load(folder / "expected.npy")


def logits(folder):
    """Return the logits of our two ways to load a folder: for training, and for answers."""
    mx = import_mlx()
    from mbf_mlx.base.load import load_base, load_to_answer

    tokens = (mx.arange(1, 201) * 7 % 300)[None]
    models = load_base(folder, dtype="float32").model, load_to_answer(folder)[0]
    return [np.array(model(tokens)[0].astype(mx.float32)) for model in models]


def agree(folder, expected):
    for found in logits(folder):
        np.testing.assert_allclose(found, expected, atol=2e-3 * np.abs(expected).max())
        assert (found.argmax(-1) == expected.argmax(-1)).mean() > 0.99


@pytest.mark.slow
@pytest.mark.parametrize("rope", ROPES)
@pytest.mark.parametrize("kind", ["llama", "mistral", "qwen2", "qwen3"])
def test_every_rope_that_transformers_saves_is_computed(tmp_path, kind, rope):
    folder = tmp_path / "model"
    expected = saved(folder, kind, rope_parameters={**ROPES[rope], "rope_theta": 500000.0})
    config = json.loads((folder / "config.json").read_text())
    assert "rope_theta" not in config  # as version 5 writes it
    agree(folder, expected)
    # as version 4 wrote it
    rope_parameters = config.pop("rope_parameters")
    config |= {"rope_theta": rope_parameters.pop("rope_theta")}
    config |= {"rope_scaling": None if rope == "default" else rope_parameters}
    (folder / "config.json").write_text(json.dumps(config))
    agree(folder, expected)


OTHERS = {
    "tied": ("llama", {"tie_word_embeddings": True}),
    "not tied": ("llama", {"tie_word_embeddings": False}),
    "biases": ("llama", {"attention_bias": True, "mlp_bias": True}),
    "another norm": ("llama", {"rms_norm_eps": 0.1}),
    "other heads": ("llama", {"head_dim": 32}),
    "a window that is wide enough": ("mistral", {"sliding_window": 200}),
    "qwen2 with its defaults": ("qwen2", {}),
    "qwen3 tied": ("qwen3", {"tie_word_embeddings": True}),
}


@pytest.mark.slow
@pytest.mark.parametrize("left_out", [False, True])
@pytest.mark.parametrize("case", OTHERS)
def test_other_fields_and_what_is_left_out_are_computed(tmp_path, case, left_out):
    kind, changes = OTHERS[case]
    folder = tmp_path / "model"
    expected = saved(folder, kind, **changes)
    if left_out:  # as older versions did with what is the family's default
        config = json.loads((folder / "config.json").read_text())
        for name in ("tie_word_embeddings", "rope_parameters"):
            config.pop(name, None)
        (folder / "config.json").write_text(json.dumps(config))
    agree(folder, expected)


def translated(config, has_head=True):
    config = {"model_type": "llama", "tie_word_embeddings": False, "rope_theta": 10000.0, **config}
    return translation(config, Path("config.json"), has_head)


def test_a_folder_as_mlx_lm_reads_it_is_not_translated():
    assert translated({}) == {}
    assert translated({"rope_scaling": LLAMA3, "rope_theta": 500000.0}) == {}
    assert translated({"rope_scaling": {"type": "linear", "factor": 2.0, "rope_type": "linear"}}) == {}


def test_rope_parameters_become_rope_theta_and_rope_scaling():
    found = translated({"rope_theta": None, "rope_parameters": {**LLAMA3, "rope_theta": 500000.0}})
    assert found == {"rope_theta": 500000.0, "rope_scaling": LLAMA3}
    assert translated({"rope_parameters": {"rope_type": "default", "rope_theta": 5e5}}) == {"rope_theta": 5e5}
    both = {"rope_scaling": LLAMA3, "rope_parameters": {**LLAMA3, "rope_theta": 500000.0}, "rope_theta": 500000.0}
    assert translated(both) == {}


def test_an_output_layer_decides_where_config_does_not_say():
    assert translated({"tie_word_embeddings": None}, has_head=True) == {"tie_word_embeddings": False}
    assert translated({"tie_word_embeddings": None}, has_head=False) == {"tie_word_embeddings": True}


def test_a_window_bounds_the_length_of_texts():
    mistral = {"model_type": "mistral", "max_position_embeddings": 32768}
    assert translated(mistral) == {"max_position_embeddings": 4096}
    assert translated({**mistral, "sliding_window": None}) == {}
    assert translated({**mistral, "sliding_window": 64}) == {"max_position_embeddings": 64}
    qwen = {"model_type": "qwen2", "max_position_embeddings": 32768, "sliding_window": 64}
    assert translated({**qwen, "use_sliding_window": False}) == {}
    assert translated({**qwen, "use_sliding_window": True}) == {"max_position_embeddings": 64}


REFUSED = {
    "another activation": ({"hidden_act": "gelu"}, "hidden_act: .* with silu alone, got 'gelu'"),
    "an unknown rope": ({"rope_parameters": {"rope_type": "su"}}, "expected one of default, .* 'su'"),
    "part of a head": ({"rope_parameters": {"partial_rotary_factor": 0.5}}, "partial_rotary_factor: .* expected 1"),
    "several ropes": ({"rope_parameters": {"full_attention": {"rope_theta": 1.0}}}, "one rotary embedding"),
    "two that differ": ({"rope_scaling": YARN, "rope_parameters": LLAMA3}, "contradict each other"),
    "yarn in another way": ({"rope_parameters": YARN | {"attention_factor": 2.0}}, "attention_factor: "),
    "two factors": (
        {"rope_parameters": {"rope_type": "longrope", "short_factor": [1.0], "long_factor": [2.0]}},
        "mlx-lm takes long_factor for every text",
    ),
    "no factor": ({"rope_parameters": {"rope_type": "linear"}}, "factor: expected a number above 0, got None"),
    "a theta in words": ({"rope_parameters": {"rope_theta": "big"}}, "rope_theta: expected .* got 'big'"),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_what_mlx_lm_would_compute_in_another_way_is_refused(case):
    config, message = REFUSED[case]
    with pytest.raises(InputError, match=message):
        translated(config)


def test_a_folder_of_version_5_is_learned_and_exported_as_it_says(tmp_path):
    """From the command line: the export's config.json says it in the words of mlx-lm."""
    import_mlx()
    from tests.support.tiny_llama import write_tiny_llama

    base = write_tiny_llama(tmp_path / "base", rope_theta=500000.0)
    config = json.loads((base / "config.json").read_text())
    theta = config.pop("rope_theta")
    config["rope_parameters"] = {"rope_type": "default", "rope_theta": theta}
    (base / "config.json").write_text(json.dumps(config))
    task = tmp_path / "task.jsonl"
    task.write_text("".join(f'{{"prompt": "what is {i}?", "completion": "{i}"}}\n' for i in range(8)))
    done = mbf("learn", tmp_path / "s", task, "--model", base, "--iters", 3, "--learning-rate", "1e-3")
    assert done.returncode == 0, done.stderr
    done = mbf("export", tmp_path / "s", "mlx", tmp_path / "out", "--allow-loss")
    assert done.returncode == 0, done.stderr
    assert json.loads((tmp_path / "out" / "config.json").read_text())["rope_theta"] == 500000.0
    done = mbf("generate", tmp_path / "s", "what is 1?", "--max-tokens", 3)
    assert done.returncode == 0, done.stderr
