"""Case e: a stream of many tiny tasks: what task 100 costs against task 2.

Peak memory, resident set after the task, bytes of `adapter/` and `state.safetensors`, the commit, `mbf status` in
process, and learning outside of training steps (reading, scoring the newest two tasks, committing). Bytes must be equal
to the byte; a ratio compares the median of five tasks at each end.

    python benchmarks/flatness.py [--tasks 100] [--model FOLDER] [--out FILE]
"""

import argparse
import gc
import json
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import common
import synthetic

WORDS = ("red", "green", "blue", "small", "large", "cold", "warm", "old", "new", "round")
ENDS = 5  # tasks at each end
MOST = 1.01
FIGURES = (
    "peak_bytes",
    "resident_bytes",
    "adapter_bytes",
    "state_bytes",
    "commit_seconds",
    "status_seconds",
    "other_seconds",
)


def write_task(folder: Path, number: int) -> Path:
    folder = folder / f"task{number:03}"
    folder.mkdir()
    for split, count in (("train", 8), ("test", 4)):
        rows = [
            {"prompt": f"{WORDS[(i + number) % 10]} {WORDS[(3 * i) % 10]}", "completion": "yes" if i % 2 else "no"}
            for i in range(count)
        ]
        (folder / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tasks", type=int, default=100)
    parser.add_argument("--model", type=Path, help="a model folder; else a synthetic one of two layers")
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    from mbf_mlx import backend, machine

    backend.setup("cpu" if sys.platform == "linux" else None)
    from mbf_mlx import Stream
    from mbf_mlx.config import LearnConfig, LoRAConfig, TrainConfig
    from mbf_mlx.stream import StreamFolder

    settings = LearnConfig(train=TrainConfig(iters=2, batch_size=4, save_every="0"), score_tasks=2)
    found: list[dict[str, Any]] = []
    commit, took = StreamFolder.commit, []

    def timed(self: StreamFolder, *args: Any, **named: Any) -> Any:
        started = time.perf_counter()
        result = commit(self, *args, **named)
        took.append(time.perf_counter() - started)
        return result

    StreamFolder.commit = timed  # type: ignore[method-assign]
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        model = options.model or synthetic.write_model(folder / "tiny", "tiny", quantization=QUANTIZATION)
        stream = Stream.open(folder / "s", base=str(model), lora=LoRAConfig(rank=8))
        for number in range(1, options.tasks + 1):
            task = write_task(folder, number)
            started = time.perf_counter()
            (record,) = stream.learn(task, config=settings)
            whole = time.perf_counter() - started
            gc.collect()
            status = stream.status()
            started = time.perf_counter()
            stream.status()
            found.append(
                {
                    "task": number,
                    "peak_bytes": record.peak_memory_bytes,
                    "resident_bytes": machine.resident_memory(),
                    "adapter_bytes": status["adapter_bytes"],
                    "state_bytes": status["state_bytes"],
                    "commit_seconds": took[-1],
                    "status_seconds": time.perf_counter() - started,
                    "other_seconds": whole - record.seconds,
                }
            )
    first, last = found[1 : 1 + ENDS], found[-ENDS:]
    results: dict[str, Any] = {"tasks": found}
    lines = [f"| figure | task 2 | task {options.tasks} | ratio |", "|---|---|---|---|"]
    for name in FIGURES:
        early, late = (statistics.median(each[name] for each in part) for part in (first, last))
        results[name] = {"early": early, "late": late, "ratio": late / early}
        shown = (
            (f"{early * 1000:.1f} ms", f"{late * 1000:.1f} ms")
            if "seconds" in name
            else (f"{early:,.0f}", f"{late:,.0f}")
        )
        lines.append(f"| {name.replace('_', ' ')} | {shown[0]} | {shown[1]} | {late / early:.3f} |")
    common.finish(common.document("flatness", results), lines, options.out)
    if any(len({each[name] for each in found[1:]}) > 1 for name in ("adapter_bytes", "state_bytes")):
        raise SystemExit("bytes grow")


QUANTIZATION = {"group_size": 32, "bits": 4, "mode": "affine"}

if __name__ == "__main__":
    main()
