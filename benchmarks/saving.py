"""What saves for an exact continuation cost (`mbf learn --save-every`, by default every 60 seconds).

SmolLM2 trains for a few steps with a save after each, of its default factors and of all seven linear layers at rank 16;
the factors and moments of an 8B model are saved without the model. Every save is what a run writes: copies of the
arrays, their encoding, hashes, files flushed to the disk, the rename. The share is of a run that saves as often as it
may by default: after 60 seconds, or later where a save took long. The goal is 2 %.

    python benchmarks/saving.py [--steps 8] [--folder FOLDER] [--out FILE]
"""

import argparse
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import common
import numpy as np
import synthetic

from mbf_mlx.learning.progress import SaveClock

GOAL = 0.02
LLAMA_8B = synthetic.layers_of_block(4096, 14336, 4096, 1024)
ALL_KEYS = tuple(LLAMA_8B)


def smollm2(folder: Path, steps: int, rank: int, keys: tuple[str, ...]) -> tuple[list[float], int]:
    """Return the seconds of each save of a run, and the bytes of one."""
    from mbf_mlx import Stream
    from mbf_mlx.config import LoRAConfig, TrainConfig

    task = folder / "task" / "train.jsonl"
    task.parent.mkdir(exist_ok=True)
    task.write_text("".join(json.dumps({"prompt": f"{i} and {i + 1}", "completion": "yes"}) + "\n" for i in range(16)))
    stream = Stream.open(folder / f"rank-{rank}", base=str(common.SMOLLM2), lora=LoRAConfig(rank=rank, keys=keys))
    taken: list[float] = []
    sizes: list[int] = []
    saved: Callable[..., None] = SaveClock.saved

    def note(self: SaveClock, began: float, ended: float) -> None:
        taken.append(ended - began)
        sizes.append(sum(file.stat().st_size for file in stream.folder.working.rglob("*") if file.is_file()))
        saved(self, began, ended)

    SaveClock.saved = note  # type: ignore[method-assign]
    try:
        stream.learn(task.parent, train=TrainConfig(iters=steps, batch_size=2, save_every="1"))
    finally:
        SaveClock.saved = saved  # type: ignore[method-assign]
    return taken, max(sizes)


def eight_billion(folder: Path, steps: int, rank: int, keys: tuple[str, ...]) -> tuple[list[float], int]:
    """The same for an 8B model's arrays: factors, the best ones, two moments."""
    from mbf_mlx.files.storage import Files
    from mbf_mlx.stream.saves import Working

    dice = np.random.default_rng(0)
    tensors = {
        f"{kind}.model.layers.{block}.{key}.{half}": dice.normal(size=shape).astype(np.float32)
        for kind in ("factor", "best", "moment.m", "moment.v")
        for block in range(32)
        for key in keys
        for half, shape in (("a", (rank, LLAMA_8B[key][1])), ("b", (LLAMA_8B[key][0], rank)))
    }
    working = Working(folder / "working", Files())
    taken = []
    for step in range(1, steps + 1):
        started = time.perf_counter()
        working.save(step, {}, {}, {"losses": [1.0] * 1000}, {name: array.copy() for name, array in tensors.items()})
        taken.append(time.perf_counter() - started)
    return taken, sum(array.nbytes for array in tensors.values())


DEFAULT_KEYS = ("self_attn.q_proj", "self_attn.v_proj")
CASES: dict[str, tuple[Callable[..., tuple[list[float], int]], int, tuple[str, ...]]] = {
    "SmolLM2-135M, rank 8 on q and v": (smollm2, 8, DEFAULT_KEYS),
    "SmolLM2-135M, rank 16 on all seven": (smollm2, 16, ALL_KEYS),
    "8B, rank 8 on q and v, arrays alone": (eight_billion, 8, DEFAULT_KEYS),
    "8B, rank 16 on all seven, arrays alone": (eight_billion, 16, ALL_KEYS),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--folder", type=Path, help="on the disk to be measured; else where temporary files go")
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    from mbf_mlx.device import backend

    backend.setup("cpu" if sys.platform == "linux" else None)
    kept = common.Kept("saving", options.out)
    lines = [
        "| what is saved | bytes | a save, median | longest | share of a run, by default |",
        "|---|---|---|---|---|",
    ]
    for name, (work, rank, keys) in CASES.items():
        found = kept.once(name, lambda work=work, rank=rank, keys=keys: measured(work, options, rank, keys))
        taken, median = found["seconds"], statistics.median(found["seconds"])
        lines.append(
            f"| {name} | {found['bytes'] / 1e6:.1f} MB | {median:.3f} s | {max(taken):.3f} s |"
            f" {100 * found['share']:.2f} % |"
        )
        print(lines[-1], file=sys.stderr)
    common.finish(common.document("saving", kept.results), lines, options.out)
    if any(each["share"] > GOAL for each in kept.results.values()):
        raise SystemExit(f"a save costs more than {GOAL:.0%}")


def measured(work: Callable[..., Any], options: argparse.Namespace, rank: int, keys: tuple[str, ...]) -> dict[str, Any]:
    """Return a case's saves: the seconds of each, their bytes, and their share of a run at the default setting."""
    from mbf_mlx.config import TrainConfig
    from mbf_mlx.learning.progress import SaveClock

    with tempfile.TemporaryDirectory(dir=options.folder) as folder:
        taken, size = work(Path(folder), options.steps, rank, keys)
    clock = SaveClock(None, TrainConfig().save_seconds, 0.0)
    clock.saved(0.0, median := statistics.median(taken))
    return {"seconds": taken, "bytes": size, "share": median / (median + clock.pause)}


if __name__ == "__main__":
    main()
