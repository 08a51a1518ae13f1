"""Case b: a synthetic Llama of one billion parameters in 4 bits, 1 x 32 tokens: ours against mlx_lm.lora, once; and the
peak memory of five steps with quantized weights kept and `--grad-checkpoint`, under a bound.

    python benchmarks/one_billion.py [--shape llama-1b] [--steps 5] [--peers mlx_lm] [--memory] [--out FILE]
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
import step
import synthetic

LENGTH, KEYS = 32, ["q_proj", "v_proj"]
BOUND = 10**9  # bytes that the process may hold beside the base's file


def batches(count: int, vocabulary: int) -> list[list[SimpleNamespace]]:
    rng = np.random.default_rng(0)
    tokens = rng.integers(1, vocabulary, (count, 1, LENGTH + 1)).astype(np.int32)
    supervised = np.arange(LENGTH + 1) > 0
    return [[SimpleNamespace(tokens=row, supervised=supervised) for row in batch] for batch in tokens]


def timed(name: str, model: Path, rows: list[list[SimpleNamespace]]) -> dict[str, Any]:
    """Return what steps take; a peer's takes minutes on a CPU, and is done once."""
    worker = step.Worker(name, model, KEYS)
    taken = [worker.ask(step=step._encoded(batch))["seconds"] for batch in (rows if name == "ours" else rows[:1])]
    worker.close()
    # Our first step is slower: threads start, memory is taken.
    return {"dtype": worker.dtype, "seconds": taken, "median": float(np.median(taken[1:] or taken))}


def held_packed(model: Path, steps: int) -> dict[str, int]:
    """Return the measured and the predicted peak of steps with quantized weights kept and `--grad-checkpoint`."""
    given = {"model": str(model), "rows": 1, "length": LENGTH + 1, "answer": LENGTH, "checkpoint": True, "packed": True}
    command = [
        sys.executable,
        str(Path(__file__).with_name("memory.py")),
        "--one",
        json.dumps(given | {"steps": steps}),
    ]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    return json.loads(done.stdout.splitlines()[-1]) | {
        "file": sum(f.stat().st_size for f in model.glob("*.safetensors"))
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", default="llama-1b", choices=list(synthetic.SHAPES))
    parser.add_argument("--steps", type=int, default=5)
    parser.add_argument("--peers", nargs="*", default=["mlx_lm"], choices=list(step.PEERS))
    parser.add_argument(
        "--memory", action="store_true", help="the memory alone: timings need an idle machine, it does not"
    )
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        model = synthetic.write_model(Path(folder) / options.shape, options.shape)
        rows = batches(options.steps + 1, synthetic.SHAPES[options.shape][6])
        kept = common.Kept("one_billion", options.out)
        who = [] if options.memory else ["ours", *options.peers]
        found = {name: kept.once(name, lambda name=name: timed(name, model, rows)) for name in who}
        held = kept.once("kept", lambda: held_packed(model, options.steps))
    lines = [] if options.memory else ["| who | dtype | s a step | times ours |", "|---|---|---|---|"]
    for name, each in found.items():
        ratio = each["median"] / found["ours"]["median"]
        lines.append(f"| {name} | {each['dtype']} | {each['median']:.2f} | {ratio:.2f} |")
    lines += [
        "",
        f"quantized weights kept, --grad-checkpoint, {options.steps} steps of 1 x {LENGTH} tokens:"
        f" {held['measured'] / 1e9:.2f} GB at the peak of the process, {held['predicted'] / 1e9:.2f} GB by the formula;"
        f" the bound is the base's file and {BOUND / 1e9:g} GB, {(held['file'] + BOUND) / 1e9:.2f} GB",
    ]
    common.finish(common.document("one_billion", kept.results), lines, options.out)
    if held["measured"] > held["file"] + BOUND:
        raise SystemExit("over the bound")


if __name__ == "__main__":
    main()
