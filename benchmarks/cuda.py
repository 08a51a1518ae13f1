"""On a machine with an NVIDIA GPU: the same numbers as on its CPU, and the speed beside mlx_lm.lora and PEFT.

1. The shared math on every array library and device that is there (tests/test_parity.py).
2. `mbf learn` for 20 steps on the CPU and on the GPU: the first A bit for bit, losses to 1e-3, the score.
3. Tokens per second and peak memory of a training step of 8 x 512 tokens, all supervised, rank 8 on q and v: ours and
   mlx_lm.lora on the quantized base, PEFT in bfloat16 on the same weights unpacked.

It prints Markdown with date and versions, and ends with 1 where something does not agree. Every measurement is a
process of its own, one after another. Without a GPU that mlx can use it says so and does nothing.

    pip install "mbf-mlx[cuda13]" pytest torch peft cupy-cuda13x
    python benchmarks/cuda.py [--model FOLDER] [--task FOLDER] [--peers mlx_lm peft] [--out FILE]
"""

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from datetime import date
from pathlib import Path
from typing import Any

import numpy as np

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "benchmarks")]

from common import MODELS, versions  # noqa: E402
from step import _dense  # noqa: E402

RANK, SCALE, RATE, KEYS = 8, 2.0, 1e-4, ["q_proj", "v_proj"]
LEARN_STEPS, LOSS_TOLERANCE, SCORE_TOLERANCE = 20, 1e-3, 0.05
ROWS, LENGTH, WARM, TIMED = 8, 512, 3, 20
NAMES = {"ours": "mbf-mlx", "mlx_lm": "mlx_lm.lora", "peft": "PEFT, bfloat16"}

Measured = tuple[list[float], int]  # the seconds of each step, the GPU's peak in bytes


def learn(options: argparse.Namespace) -> dict[str, Any]:
    """The first A, the losses and the score of a few steps of `mbf learn` on one device."""
    import hashlib

    from mbf_mlx import Stream
    from mbf_mlx.device import backend
    from mbf_mlx.learning.events import Events, Step
    from mbf_mlx.methods import make

    losses: list[float] = []

    class Losses(Events):
        def step(self, name: str, step: Step, peak_memory: int) -> None:
            losses.append(step.loss)

    device = backend.setup(options.device)
    with tempfile.TemporaryDirectory() as folder:
        stream = Stream.open(Path(folder) / "stream", base=str(options.model))
        identity = stream.folder.identity
        start = make(identity.method, identity.method_options).start(stream.folder.state())
        first_a = hashlib.sha256(b"".join(np.asarray(pair.a).tobytes() for _, pair in sorted(start.items())))
        stream.learn(options.task, iters=options.steps, save_every="0", events=Losses())
        task, scores = stream.status()["tasks"][0], stream.status()["scores"]
    return {
        "device": f"{device.kind} ({device.name})",
        "first_a": first_a.hexdigest(),
        "losses": losses,
        "score": scores[0][0],
        "tokens_per_second": task["tokens_per_second"],
        "peak": task["peak_memory_bytes"],
    }


def batches(vocabulary: int, count: int) -> Iterator[np.ndarray]:
    """Yield batches of random tokens, (rows, length + 1): the same for every peer."""
    rng = np.random.default_rng(0)
    for _ in range(count):
        yield rng.integers(1, vocabulary, (ROWS, LENGTH + 1)).astype(np.int32)


def ours(options: argparse.Namespace) -> Measured:
    """Steps of our own engine."""
    from mbf_mlx.device import backend

    backend.setup(options.device)
    import mlx.core as mx
    import mlx.optimizers as optim

    from mbf_mlx.config import LoRAConfig
    from mbf_mlx.data.batches import make_batch
    from mbf_mlx.learning.learner import load_learner
    from mbf_mlx.learning.tuning import Tuning

    learner = load_learner(options.model, LoRAConfig(rank=RANK, scale=SCALE, keys=tuple(KEYS)))
    model, engine, optimizer = learner.base.model, learner.engine, optim.AdamW(learning_rate=RATE)
    tuning = Tuning(model)
    loss_and_grad = engine.loss_and_grad(tuning.apply)
    model.train()

    def step(tokens: np.ndarray) -> None:
        rows = [argparse.Namespace(tokens=row, supervised=np.ones(len(row), bool)) for row in tokens]
        batch = make_batch(rows, range(len(rows)))
        loss, gradients = loss_and_grad(tuning.trained, batch)
        gradients = {name: g / len(batch.targets) for name, g in gradients.items()}
        tuning.update(optimizer.apply_gradients(gradients, tuning.trained))
        mx.eval(loss, tuning.arrays, optimizer.state)

    mx.reset_peak_memory()
    return _timed(step, options), backend.peak_memory()


def mlx_lm(options: argparse.Namespace) -> Measured:
    """mlx-lm's own training loop, which says how long each step took."""
    import mlx.core as mx
    import mlx.optimizers as optim
    from mlx_lm.tuner.trainer import TrainingArgs, default_loss, train
    from mlx_lm.tuner.utils import linear_to_lora_layers
    from mlx_lm.utils import load_model

    mx.set_default_device(mx.cpu if options.device == "cpu" else mx.gpu)
    network, config = load_model(options.model)
    network.freeze()
    paths = [f"self_attn.{key}" for key in KEYS]
    linear_to_lora_layers(network, len(network.layers), {"rank": RANK, "scale": SCALE, "dropout": 0.0, "keys": paths})
    seconds: list[float] = []

    def iterate(**_: Any) -> Iterator[tuple[Any, Any]]:
        for tokens in batches(config["vocab_size"], WARM + options.timed):
            yield mx.array(tokens), mx.array([[0, LENGTH]] * ROWS)

    class Reports:
        def on_train_loss_report(self, info: dict[str, Any]) -> None:
            seconds.append(1 / info["iterations_per_second"])

        def on_val_loss_report(self, info: dict[str, Any]) -> None:
            pass

    mx.reset_peak_memory()
    with tempfile.TemporaryDirectory() as folder:
        settings = TrainingArgs(
            iters=WARM + options.timed, steps_per_report=1, steps_per_save=10**9, adapter_file=f"{folder}/a.safetensors"
        )
        train(network, optim.AdamW(learning_rate=RATE), [None], None, settings, default_loss, iterate, Reports())
    return seconds[WARM:], int(mx.get_peak_memory())


def peft(options: argparse.Namespace) -> Measured:
    """PEFT on the same weights, unpacked to bfloat16."""
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM, LlamaConfig

    on_gpu = options.device != "cpu"
    config = json.loads((options.model / "config.json").read_text())
    config = {name: value for name, value in config.items() if not name.startswith("quant")}
    network = AutoModelForCausalLM.from_config(LlamaConfig(**config), attn_implementation="sdpa")
    left = network.load_state_dict(_dense(torch, options.model), strict=False)
    assert not left.unexpected_keys and set(left.missing_keys) <= {"lm_head.weight"}, left
    network.tie_weights()
    network = network.to(torch.bfloat16).to("cuda" if on_gpu else "cpu")
    network = get_peft_model(network, LoraConfig(r=RANK, lora_alpha=RANK * SCALE, target_modules=KEYS, lora_dropout=0))
    network.train()
    optimizer = torch.optim.AdamW([p for p in network.parameters() if p.requires_grad], lr=RATE)

    def step(tokens: np.ndarray) -> None:
        rows = torch.from_numpy(tokens.astype(np.int64)).to(network.device)
        loss = network(input_ids=rows, labels=rows).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        float(loss.detach())  # waits for the GPU

    if on_gpu:
        torch.cuda.reset_peak_memory_stats()
    seconds = _timed(step, options)
    return seconds, torch.cuda.max_memory_allocated() if on_gpu else 0


def _timed(step: Callable[[np.ndarray], None], options: argparse.Namespace) -> list[float]:
    seconds = []
    vocabulary = json.loads((options.model / "config.json").read_text())["vocab_size"]
    for tokens in batches(vocabulary, WARM + options.timed):
        started = time.perf_counter()
        step(tokens)
        seconds.append(time.perf_counter() - started)
    return seconds[WARM:]


# -- the report --------------------------------------------------------------------------------------------------------


def child(what: str, options: argparse.Namespace, device: str) -> dict[str, Any]:
    """Measure one thing in a process of its own."""
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "out.json"
        command = [sys.executable, __file__, "--worker", what, "--device", device, "--model", str(options.model)]
        command += ["--task", str(options.task), "--steps", str(options.steps), "--timed", str(options.timed)]
        done = subprocess.run([*command, "--out", str(out)], stdout=sys.stderr)
        if done.returncode or not out.exists():
            return {"failed": f"ended with {done.returncode}"}
        return json.loads(out.read_text())


def compare(options: argparse.Namespace, other: str) -> tuple[dict[str, Any], list[str], bool]:
    """Learn on both devices; return the numbers, the lines about them and whether they agree."""
    one, two = child("learn", options, "cpu"), child("learn", options, other)
    if failed := [each["failed"] for each in (one, two) if "failed" in each]:
        return {"cpu": one, "other": two}, [f"- **DIFFERS**: learning {failed[0]}"], False
    losses = np.array(one["losses"]), np.array(two["losses"])
    off = float((np.abs(losses[0] - losses[1]) / np.abs(losses[0])).max())
    agree = [
        (
            f"the first A, bit for bit, on {one['device']} and {two['device']}",
            one["first_a"] == two["first_a"],
        ),
        (
            f"losses of {len(losses[0])} steps: largest relative difference {off:.1e} (at most {LOSS_TOLERANCE:g})",
            off <= LOSS_TOLERANCE,
        ),
        (
            f"scores: {one['score']} and {two['score']}",
            one["score"] is None or abs(one["score"] - two["score"]) <= SCORE_TOLERANCE,
        ),
    ]
    lines = [f"- {'agrees' if fine else '**DIFFERS**'}: {line}" for line, fine in agree]
    return {"cpu": one, "other": two}, lines, all(fine for _, fine in agree)


def speed(options: argparse.Namespace, device: str) -> tuple[dict[str, Any], list[str]]:
    """Time the peers; return the numbers and a table."""
    found = {name: child(name, options, device) for name in ["ours", *options.peers]}
    lines = ["| who | s a step | tokens/s | peak GB |", "|---|---|---|---|"]
    for name, each in found.items():
        if "failed" in each:
            lines.append(f"| {NAMES[name]} | not run: {each['failed']} | | |")
            continue
        median = statistics.median(each["seconds"])
        lines.append(f"| {NAMES[name]} | {median:.4f} | {ROWS * LENGTH / median:.0f} | {each['peak'] / 1e9:.2f} |")
    return found, lines


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, default=MODELS / "smollm2-135m-instruct")
    parser.add_argument("--task", type=Path, default=ROOT / "mbf_mlx" / "quickstart" / "home")
    parser.add_argument("--peers", nargs="*", default=["mlx_lm", "peft"], choices=["mlx_lm", "peft"])
    parser.add_argument("--steps", type=int, default=LEARN_STEPS, help="of learning")
    parser.add_argument("--timed", type=int, default=TIMED, help="steps that are timed")
    parser.add_argument("--device", default="cuda", help="what to hold against the CPU; cpu tries this script")
    parser.add_argument("--out", type=Path, help="a JSON file for the numbers")
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.worker == "learn":
        options.out.write_text(json.dumps(learn(options)))
        return 0
    if options.worker:
        seconds, peak = {"ours": ours, "mlx_lm": mlx_lm, "peft": peft}[options.worker](options)
        options.out.write_text(json.dumps({"seconds": seconds, "peak": peak}))
        return 0
    if options.device == "cuda" and not _has_cuda():
        print("not run: this machine has no NVIDIA GPU that mlx can use")
        return 0
    parity = subprocess.run([sys.executable, "-m", "pytest", "-q", "-rs", "tests/test_parity.py"], cwd=ROOT)
    learned, lines, agree = compare(options, options.device)
    timed, table = speed(options, options.device)
    of = ", ".join(f"{name} {version}" for name, version in versions().items())
    device = learned["other"].get("device", options.device)
    print(f"\n{date.today()}, {device}, {options.model.name}; {of}\n")
    print(f"- {'agrees' if parity.returncode == 0 else '**DIFFERS**'}: the shared math, against NumPy in float64")
    print("\n".join([*lines, "", *table]))
    if options.out:
        options.out.write_text(json.dumps({"learned": learned, "timed": timed}, indent=1) + "\n")
    return 0 if agree and parity.returncode == 0 else 1


def _has_cuda() -> bool:
    import mlx.core as mx

    return bool(mx.cuda.is_available())


if __name__ == "__main__":
    sys.exit(main())
