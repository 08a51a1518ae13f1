"""The memory formula of `mbf plan` against the measured peak, and case h: peak training memory against mlx_lm.lora.

Every configuration is a process of its own that learns as `mbf learn` does; its peak is the largest resident set, from
its start. Case h has the same batches in mlx_lm.lora beside ours (minutes on a CPU).

    python benchmarks/memory.py [--peers mlx_lm] [--only NAME...] [--out benchmarks/results/memory.json]
"""

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import common
import numpy as np
import synthetic

from mbf_mlx.device.machine import freed_memory_kept
from mbf_mlx.memory.shapes import run_of, shape_of_folder

TOLERANCE = 0.15
# name -> model, rows, tokens of a row, supervised, checkpoint, quantized weights kept
CONFIGURATIONS = {
    "small, 8 x 64, last 8": ("small", 8, 65, 8, False, False),
    "small, 4 x 256, all": ("small", 4, 257, 256, False, False),
    "small, 4 x 256, all, checkpoint": ("small", 4, 257, 256, True, False),
    "small, 4 x 256, all, kept quantized": ("small", 4, 257, 256, False, True),
    "SmolLM2-135M, 8 x 64, last 8": ("smollm2", 8, 65, 8, False, False),
    "SmolLM2-135M, 8 x 64, last 8, checkpoint, kept quantized": ("smollm2", 8, 65, 8, True, True),
    "vocabulary 128k, 4 x 256, all": ("large-vocabulary", 4, 257, 256, False, False),
}
CASE_H = {
    "vocabulary 128k, 4 x 512, all": ("large-vocabulary", 4, 513, 512, False, False),
    "vocabulary 128k, 4 x 512, all, checkpoint": ("large-vocabulary", 4, 513, 512, True, False),
}


def rows_of(rows: int, length: int, answer: int, vocabulary: int) -> list[SimpleNamespace]:
    tokens = np.random.default_rng(0).integers(1, vocabulary, (rows, length)).astype(np.int32)
    supervised = np.arange(length) >= length - answer
    return [SimpleNamespace(tokens=line, supervised=supervised) for line in tokens]


def ours(
    model: Path, rows: int, length: int, answer: int, checkpoint: bool, packed: bool, steps: int
) -> dict[str, int]:
    """Train a few steps and return the measured and the predicted peak."""
    from mbf_mlx.device import backend, machine
    from mbf_mlx.memory import formula as memory

    backend.setup("cpu" if sys.platform == "linux" else None)
    import mlx.core as mx
    import mlx.optimizers as optim
    from mlx import nn

    from mbf_mlx.config import LoRAConfig
    from mbf_mlx.data.batches import make_batch
    from mbf_mlx.learning.learner import load_learner

    lora = LoRAConfig()
    learner = load_learner(model, lora, packed)
    learner.engine.checkpoint = checkpoint
    network, optimizer = learner.base.model, optim.AdamW(learning_rate=1e-4)
    loss_and_grad = nn.value_and_grad(network, learner.engine.loss_sum)
    shape = shape_of_folder(model)
    batch = make_batch(rows_of(rows, length, answer, shape.vocabulary), range(rows))
    with freed_memory_kept():  # as mbf learn trains
        for _ in range(steps):
            loss, gradients = loss_and_grad(batch)
            optimizer.update(network, gradients)
            mx.eval(loss, network.trainable_parameters(), optimizer.state)
    run = run_of(shape, lora, by_hand=learner.engine.by_hand, packed=learner.packed, checkpoint=checkpoint)
    predicted = memory.predict(shape, run, memory.Load.of(batch)).peak
    return {"measured": machine.resident_peak(), "predicted": predicted}


def mlx_lm_lora(
    model: Path, rows: int, length: int, answer: int, checkpoint: bool, packed: bool, steps: int
) -> dict[str, Any]:
    """The same in mlx-lm's own loss, in the dtype that is fastest here; `--packed` does not apply."""
    import mlx.core as mx
    import mlx.optimizers as optim
    import step
    from mlx import nn
    from mlx_lm.tuner.trainer import default_loss, grad_checkpoint
    from mlx_lm.tuner.utils import linear_to_lora_layers
    from mlx_lm.utils import load_model

    from mbf_mlx.device import machine

    network, config = load_model(model)
    dtype = step._fastest_dtype(mx, network)
    network.set_dtype(dtype)
    network.freeze()
    keys = {"rank": 8, "scale": 2.0, "dropout": 0.0, "keys": ["self_attn.q_proj", "self_attn.v_proj"]}
    linear_to_lora_layers(network, len(network.layers), keys)
    if checkpoint:
        grad_checkpoint(network.layers[0])
    found = rows_of(rows, length, answer, config["vocab_size"])
    tokens = mx.array(np.stack([row.tokens for row in found]))
    spans = mx.array([[length - answer, length - 1]] * rows)
    optimizer, loss_and_grad = optim.AdamW(learning_rate=1e-4), nn.value_and_grad(network, default_loss)
    for _ in range(steps):
        (loss, _), gradients = loss_and_grad(network, tokens, spans)
        optimizer.update(network, gradients)
        mx.eval(loss, network.trainable_parameters(), optimizer.state)
    return {"measured": machine.resident_peak(), "dtype": str(dtype).removeprefix("mlx.core.")}


def measured(who: str, **configuration: Any) -> dict[str, Any]:
    command = [sys.executable, __file__, "--who", who, "--one", json.dumps(configuration)]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(done.stderr)
    return json.loads(done.stdout.splitlines()[-1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="*", help="names of configurations, or parts of them")
    parser.add_argument(
        "--peers", nargs="*", default=["mlx_lm"], choices=["mlx_lm"], help="of case h; none leaves it out"
    )
    parser.add_argument("--out", type=Path)
    parser.add_argument("--one", help=argparse.SUPPRESS)
    parser.add_argument("--who", default="ours", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.one:
        given = json.loads(options.one)
        work = {"ours": ours, "mlx_lm": mlx_lm_lora}[options.who]
        print(json.dumps(work(**{**given, "model": Path(given["model"])})))
        return
    chosen = CONFIGURATIONS | (CASE_H if options.peers else {})
    if options.only:
        chosen = {name: each for name, each in chosen.items() if any(part in name for part in options.only)}
    kept = common.Kept("memory", options.out)
    lines = ["| configuration | ours | by the formula | difference | mlx_lm.lora |", "|---|---|---|---|---|"]
    with tempfile.TemporaryDirectory() as folder:
        for name, (shape, rows, length, answer, checkpoint, packed) in chosen.items():
            model = common.SMOLLM2 if shape == "smollm2" else synthetic.write_model(Path(folder) / shape, shape)
            given = {"model": str(model), "rows": rows, "length": length, "answer": answer, "checkpoint": checkpoint,
                     "packed": packed, "steps": 2}  # fmt: skip
            found = kept.once(
                name, lambda name=name, given=given: beside_peer(given, bool(options.peers) and name in CASE_H)
            )
            lines.append(line(name, found))
            print(lines[-1], file=sys.stderr)
    common.finish(common.document("memory", kept.results), lines, options.out)
    if any(abs(found["difference"]) > TOLERANCE for found in kept.results.values()):
        raise SystemExit("the formula is off by more than 15 %")


def beside_peer(given: dict[str, Any], peer: bool) -> dict[str, Any]:
    """Measure one configuration, and the peer's where it is asked for."""
    found = measured("ours", **given)
    found["difference"] = found["predicted"] / found["measured"] - 1
    if peer:
        theirs = measured("mlx_lm", **given | {"steps": 1})
        found |= {"peer": theirs["measured"], "peer_dtype": theirs["dtype"]}
    return found


def line(name: str, found: dict[str, Any]) -> str:
    """Return a configuration's line of the table."""
    peer = ""
    if "peer" in found:
        peer = (
            f"{found['peer'] / 1e6:.0f} MB in {found['peer_dtype']}, ours {found['measured'] / found['peer']:.2f} of it"
        )
    sizes = f"{found['measured'] / 1e6:.0f} MB | {found['predicted'] / 1e6:.0f} MB | {found['difference']:+.0%}"
    return f"| {name} | {sizes} | {peer} |"


if __name__ == "__main__":
    main()
