"""Tasks trained by other tools, PEFT on SmolLM2 and mlx-lm itself, merged without mlx and torch."""

import json
import os
import shutil
import subprocess
import sys

import numpy as np
import pytest
import safetensors.numpy

from mbf_mlx.adapters import mlx_lm as adapter
from mbf_mlx.stream.folder import StreamFolder
from mbf_mlx.stream.repair import verify_all
from tests.conftest import ROOT

pytestmark = pytest.mark.slow

RANK, SCALE, KEYS = 8, 2.0, ("q_proj", "v_proj")
TASKS = {"home": "float32", "inbox": "bfloat16", "bins": "float16"}  # name -> the type that its adapter is saved in
STEPS, ROWS = 4, 4
QUICKSTART = ROOT / "mbf_mlx" / "quickstart"
# Runs `mbf` as in the plain install, where neither is there.
BLOCKED = (
    "import sys\n"
    "class Gone:\n"
    "    def find_spec(self, name, path=None, target=None):\n"
    "        if name.partition('.')[0] in ('mlx', 'mlx_lm', 'torch', 'peft', 'transformers'):\n"
    "            raise ModuleNotFoundError(name)\n"
    "sys.meta_path.insert(0, Gone())\n"
    "from mbf_mlx.commands import main\n"
    "main()\n"
)


def run(*command, **options):
    """Run a command and return what it printed."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run([str(word) for word in command], capture_output=True, text=True, env=environment, **options)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def merged_elsewhere(*words):
    """`mbf ...` with mlx and torch blocked."""
    return run(sys.executable, "-c", BLOCKED, *words)


@pytest.fixture(scope="module")
def torch():
    return pytest.importorskip("torch", reason="not run: torch is not installed: make install-all")


@pytest.fixture(scope="module")
def peft():
    return pytest.importorskip("peft", reason="not run: peft is not installed: make install-all")


@pytest.fixture(scope="module")
def unpacked(smollm2, tmp_path_factory):
    """SmolLM2 without quantization, as PEFT trains on it: the same numbers in float32."""
    import mlx.core as mx
    from mlx.utils import tree_flatten
    from mlx_lm.utils import dequantize_model, load_model

    folder = tmp_path_factory.mktemp("unpacked")
    model, config = load_model(smollm2)
    tensors = {name: value.astype(mx.float32) for name, value in tree_flatten(dequantize_model(model).parameters())}
    mx.save_safetensors(str(folder / "model.safetensors"), tensors, {"format": "pt"})
    config = {name: value for name, value in config.items() if not name.startswith("quantization")}
    (folder / "config.json").write_text(json.dumps(config | {"torch_dtype": "float32"}))
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (folder / name).write_bytes((smollm2 / name).read_bytes())
    return folder


def examples(name):
    lines = (QUICKSTART / name / "train.jsonl").read_text(encoding="utf-8").splitlines()
    return [json.loads(line) for line in lines[: STEPS * ROWS]]


def train_with_peft(torch, peft, base, start, out, rows, dtype):
    """Do what a user of PEFT does: load, train, save. Return the losses."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    torch.manual_seed(0)
    tokenizer = AutoTokenizer.from_pretrained(base)
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    model = peft.PeftModel.from_pretrained(model, start, is_trainable=True)
    optimizer = torch.optim.AdamW([each for each in model.parameters() if each.requires_grad], lr=1e-3)
    losses = []
    for step in range(STEPS):
        batch = [f"{row['prompt']}\n{row['completion']}" for row in rows[step * ROWS : (step + 1) * ROWS]]
        tokens = [tokenizer(text)["input_ids"] for text in batch]
        longest = max(map(len, tokens))
        inputs = torch.tensor([each + [0] * (longest - len(each)) for each in tokens])
        labels = torch.tensor([each + [-100] * (longest - len(each)) for each in tokens])
        loss = model(input_ids=inputs, labels=labels).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            parameter.data = parameter.data.to(getattr(torch, dtype))
    model.save_pretrained(out)
    return losses


def factors_of(torch, folder):
    """A and B of each layer in float64, by PEFT's own names; read without any code of ours."""
    from safetensors.torch import load_file

    tensors = {
        name: each.to(torch.float64).numpy() for name, each in load_file(folder / "adapter_model.safetensors").items()
    }
    layers = sorted({name.rpartition(".lora_")[0] for name in tensors})
    return {layer: tuple(tensors[f"{layer}.lora_{half}.weight"] for half in "AB") for layer in layers}


def start_by_hand(a, b):
    """Algorithm 1: a task starts from an orthonormal basis of the tuned A, signed by R's diagonal, and the tuned B."""
    q, r = np.linalg.qr(a.T)
    return (q * np.where(np.diag(r) < 0, -1.0, 1.0)).T, b


def near(found, expected):
    """Return whether two arrays are equal up to float32 rounding."""
    assert found.shape == expected.shape
    np.testing.assert_allclose(found, expected, rtol=0, atol=2e-7 * max(1.0, np.abs(expected).max()))


def test_three_tasks_that_peft_trained_are_merged_without_mlx_and_one_more_is_learned_here(
    torch, peft, smollm2, unpacked, write_jsonl, tmp_path, mx
):
    stream, merged, tuned = tmp_path / "stream", {}, {}
    new = ["--model", smollm2, "--rank", RANK, "--scale", SCALE, "--keys", ",".join(KEYS)]
    for t, (name, dtype) in enumerate(TASKS.items(), start=1):
        start, out = tmp_path / f"start-{name}", tmp_path / f"tuned-{name}"
        merged_elsewhere("next", stream, start, "--format", "peft", *(new if t == 1 else []))
        handed = factors_of(torch, start)
        assert len(handed) == 2 * 30
        for layer, (a, b) in handed.items():
            if t == 1:
                assert not b.any() and np.abs(a).max() > 0
            else:
                expected = start_by_hand(*tuned[layer])
                near(a, expected[0])
                near(b, expected[1])
        losses = train_with_peft(torch, peft, unpacked, start, out, examples(name), dtype)
        assert all(np.isfinite(losses))
        tuned = factors_of(torch, out)
        assert any(np.abs(tuned[layer][1] - handed[layer][1]).max() > 1e-4 for layer in tuned), "it trained nothing"
        task = ["--task", QUICKSTART / name]
        assert f"absorbed {name} as task {t}" in merged_elsewhere("absorb", stream, out, "--name", name, *task)
        # By hand: A is the tuned one; B moves by 1/sqrt(t) towards the tuned one.
        for layer, (a, b) in tuned.items():
            before = merged[layer][1] if t > 1 else 0.0
            merged[layer] = a, before + (b - before) / np.sqrt(t)

    deployed = adapter.read_adapter(stream / "adapter")
    assert (deployed.rank, deployed.scale) == (RANK, SCALE)
    for layer, (a, b) in merged.items():
        pair = deployed.factors[layer.removeprefix("base_model.model.")]
        near(pair.a, a)
        near(pair.b, b)

    # A copy without links, as a cloud folder makes it, continues where mlx is installed and scores what it absorbed.
    shutil.copytree(stream, tmp_path / "copied")
    stream = tmp_path / "copied"
    here = [row | {"prompt": row["prompt"].upper()} for row in examples("home")]
    desk = write_jsonl("desk.jsonl", here)
    words = ["--iters", 3, "--batch-size", 4, "--learning-rate", 1e-3, "--score-rows", 4, "--json"]
    document = json.loads(run(sys.executable, ROOT / "cli.py", "learn", stream, desk, *words))
    assert [task["name"] for task in document["tasks"]] == [*TASKS, "desk"]
    assert all(score is not None for score in document["scores"][-1])
    folder = StreamFolder.open(stream)
    verify_all(folder)
    state = folder.state()
    for layer, (a, _) in merged.items():
        short = layer.removeprefix("base_model.model.")
        start = start_by_hand(a, None)[0]
        cosine = np.einsum("ri,ri->r", start, state.deployed[short].a) / np.linalg.norm(state.deployed[short].a, axis=1)
        assert cosine.mean() > 0.9, "it did not start from the last absorbed A"
        near(state.deployed[short].b, merged[layer][1] + (state.kept["tuned_b"][short] - merged[layer][1]) / 2)

    same_logits(torch, peft, unpacked, stream, tmp_path, mx)


def same_logits(torch, peft, base, stream, tmp_path, mx):
    """Compare the deployed adapter on the same weights: in mlx-lm from the stream, in PEFT from its export."""
    from mlx_lm.utils import load_adapters, load_model
    from transformers import AutoModelForCausalLM

    run(sys.executable, ROOT / "cli.py", "export", stream, "peft", tmp_path / "peft")
    tokens = [[1, 4093, 198, 2683, 359, 4, 28, 1000, 338, 216]]
    plain = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    before = plain(torch.tensor(tokens)).logits.detach().numpy()
    theirs = peft.PeftModel.from_pretrained(plain, tmp_path / "peft")(torch.tensor(tokens)).logits.detach().numpy()
    ours = np.array(load_adapters(load_model(base)[0], str(stream / "adapter"))(mx.array(tokens)))
    assert np.abs(theirs - before).max() > 0.1
    np.testing.assert_allclose(ours, theirs, rtol=0, atol=1e-4 * np.abs(theirs).max())


def test_mlx_lm_trains_on_from_the_start_that_is_handed_out(tiny_llama, write_jsonl, tmp_path):
    rows = [{"prompt": f"yes or no, {i}?", "completion": "yes" if i % 2 else "no"} for i in range(12)]
    write_jsonl("data/valid.jsonl", rows)
    data = write_jsonl("data/train.jsonl", rows).parent
    stream, start, tuned = tmp_path / "stream", tmp_path / "start", tmp_path / "tuned"
    for t in (1, 2):
        merged_elsewhere("next", stream, start, "--format", "mlx", "--force", "--model", tiny_llama, "--rank", 4)
        config = ["-c", start / "adapter_config.json", "--resume-adapter-file", start / "adapters.safetensors"]
        words = ["--model", tiny_llama, "--data", data, "--adapter-path", tuned, "--iters", 3, "--batch-size", 4]
        run(sys.executable, "-m", "mlx_lm", "lora", "--train", *config, *words, "--val-batches", 1)
        first, last = (safetensors.numpy.load_file(each / adapter.WEIGHTS) for each in (start, tuned))
        assert any((first[name] != last[name]).any() for name in first), "it trained nothing"
        assert f"absorbed task{t} as task {t}" in merged_elsewhere("absorb", stream, tuned, "--name", f"task{t}")
    verify_all(StreamFolder.open(stream))
