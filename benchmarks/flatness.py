"""Case e: a stream of many tiny tasks: what task 100 costs against task 2.

Peak memory, resident set after the task, bytes of `adapter/` and `state.safetensors`: the median of five tasks at each
end of one stream; bytes must be equal to the byte. A commit, learning outside of training steps (reading, scoring the
newest two tasks, committing) and `mbf status`, process included: in turn on that stream and on a copy of it that was
made after task 2, each of them first in every other round, medians of the rounds and of their ratios.

    python benchmarks/flatness.py [--tasks 100] [--method NAME] [--model FOLDER] [--out FILE]
"""

import argparse
import gc
import json
import shutil
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import common
import synthetic

from mbf_mlx.methods.registry import DEFAULT_METHOD

WORDS = ("red", "green", "blue", "small", "large", "cold", "warm", "old", "new", "round")
ENDS = 5  # tasks at each end
ROUNDS = 31
COUNTS = ("peak_bytes", "resident_bytes", "adapter_bytes", "state_bytes")
TIMES = ("commit_seconds", "other_seconds", "status_seconds")


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


class Timed:
    """Learns tasks, and notes what each took."""

    def __init__(self) -> None:
        from mbf_mlx.config import LearnConfig, TrainConfig
        from mbf_mlx.stream.folder import StreamFolder

        self.settings = LearnConfig(train=TrainConfig(iters=2, batch_size=4, save_every="0"), score_tasks=2)
        self.commit_seconds = 0.0
        commit = StreamFolder.commit

        def timed(folder: StreamFolder, *args: Any, **named: Any) -> Any:
            started = time.perf_counter()
            result = commit(folder, *args, **named)
            self.commit_seconds = time.perf_counter() - started
            return result

        StreamFolder.commit = timed  # type: ignore[method-assign]

    def learn(self, stream: Any, task: Path) -> dict[str, Any]:
        started = time.perf_counter()
        (record,) = stream.learn(task, config=self.settings)
        whole = time.perf_counter() - started
        return {
            "peak_bytes": record.peak_memory_bytes,
            "commit_seconds": self.commit_seconds,
            "other_seconds": whole - record.seconds,
        }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tasks", type=int, default=100)
    parser.add_argument("--method", default=DEFAULT_METHOD)
    parser.add_argument("--model", type=Path, help="a model folder; else a synthetic one of two layers")
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    from mbf_mlx.device import backend, machine

    backend.setup("cpu" if sys.platform == "linux" else None)
    from mbf_mlx import Stream
    from mbf_mlx.config import LoRAConfig

    found: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as place:
        folder, timed = Path(place), Timed()
        model = options.model or synthetic.write_model(folder / "tiny", "tiny", quantization=QUANTIZATION)
        stream = Stream.open(folder / "late", base=str(model), lora=LoRAConfig(rank=8), method=options.method)
        for number in range(1, options.tasks + 1):
            learned = timed.learn(stream, write_task(folder, number))
            gc.collect()
            status = stream.status()
            sizes = {name: status[name] for name in ("adapter_bytes", "state_bytes")}
            found.append({"task": number, **learned, **sizes, "resident_bytes": machine.resident_memory()})
            if number == 2:
                shutil.copytree(folder / "late", folder / "early", symlinks=True)
        ends = {"early": Stream.open(folder / "early", base=str(model)), "late": stream}
        rounds = []
        for number in range(options.tasks + 1, options.tasks + 2 + ROUNDS):
            task = write_task(folder, number)
            ends = dict(reversed(ends.items()))
            status = {
                name: {"status_seconds": common.command_seconds(common.mbf("status", folder / name))} for name in ends
            }
            rounds.append({name: {**timed.learn(one, task), **status[name]} for name, one in ends.items()})
    results: dict[str, Any] = {"tasks": found, "rounds": rounds[1:]}
    lines = [f"| figure | task 2 | task {options.tasks} | ratio |", "|---|---|---|---|"]
    for name in COUNTS:
        early, late = (statistics.median(each[name] for each in part) for part in (found[1 : 1 + ENDS], found[-ENDS:]))
        results[name] = {"early": early, "late": late, "ratio": late / early}
        lines.append(f"| {name.replace('_', ' ')} | {early:,.0f} | {late:,.0f} | {late / early:.3f} |")
    for name in TIMES:
        pairs = [(each["early"][name], each["late"][name]) for each in rounds[1:]]
        early, late = (statistics.median(pair[i] for pair in pairs) for i in (0, 1))
        ratios = [b / a for a, b in pairs]
        results[name] = {"early": early, "late": late, "ratio": statistics.median(ratios)}
        lines.append(
            f"| {name.replace('_', ' ')} | {1000 * early:.1f} ms | {1000 * late:.1f} ms | {common.spread(ratios, 3)} |"
        )
    common.finish(common.document("flatness", results), lines, options.out)
    if any(len({each[name] for each in found[1:]}) > 1 for name in ("adapter_bytes", "state_bytes")):
        raise SystemExit("bytes grow")


QUANTIZATION = {"group_size": 32, "bits": 4, "mode": "affine"}

if __name__ == "__main__":
    main()
