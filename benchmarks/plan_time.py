"""What `mbf plan` says against what `mbf learn` then takes: seconds and peak memory.

Each pair is a plan and, right after it, the same task learned, both in processes of their own; the learning is timed
from the loaded model to the commit, scoring included, which is what the plan's seconds are about. Goals: 30 % of the
time, 15 % of the memory. Timings swing with whatever else the machine does; the median of the pairs counts.

    python benchmarks/plan_time.py [--repeats 3] [--only NAME...] [--out FILE]
"""

import argparse
import json
import random
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import common
import synthetic

GOAL_TIME, GOAL_MEMORY = 0.3, 0.15
WORDS = "the red small cat sat under an old tree and saw two green birds fly over a cold blue lake at dawn".split()
# name -> model, words of a prompt, words of an answer (0: plain text), training rows, flags
CASES: dict[str, tuple[str, int, int, int, dict[str, Any]]] = {
    "SmolLM2-135M, 8 rows of 70 tokens, answers of one word": ("smollm2", 45, 1, 96, {"batch_size": 8}),
    "SmolLM2-135M, 4 rows of 150 tokens, answers of 60": ("smollm2", 60, 60, 40, {"batch_size": 4}),
    "SmolLM2-135M, the same, --grad-checkpoint": ("smollm2", 60, 60, 24, {"batch_size": 4, "grad_checkpoint": True}),
    "8 blocks of 512, 4 rows of 250 tokens, all": ("small", 60, 0, 160, {"batch_size": 4}),
}


def write_task(folder: Path, prompt: int, answer: int, count: int) -> Path:
    dice = random.Random(prompt + answer)

    def text(words: int) -> str:
        return " ".join(dice.choices(WORDS, k=words))

    folder.mkdir()
    for split, rows in (("train", count), ("test", max(8, count // 8))):
        lines = [
            {"prompt": text(dice.randint(prompt * 3 // 4, prompt)), "completion": text(answer)}
            if answer
            else {"text": text(dice.randint(prompt * 3 // 4, prompt))}
            for _ in range(rows)
        ]
        (folder / f"{split}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return folder


def learned(model: Path, task: Path, flags: dict[str, Any]) -> dict[str, float]:
    """Learn the task once and return seconds and peak bytes; for a process of its own."""
    from mbf_mlx import Stream, backend, machine
    from mbf_mlx.config import LearnConfig, TrainConfig

    backend.setup("cpu" if sys.platform == "linux" else None)
    with tempfile.TemporaryDirectory() as folder:
        stream = Stream.open(Path(folder) / "s", base=str(model))
        stream._load()
        started = time.perf_counter()
        stream.learn(task, config=LearnConfig(train=TrainConfig(epochs=1, **flags)))
        return {"seconds": time.perf_counter() - started, "peak_bytes": machine.resident_peak()}


def planned(model: Path, task: Path, flags: dict[str, Any]) -> dict[str, float]:
    words = ["--epochs", 1, "--batch-size", flags["batch_size"]] + ["--grad-checkpoint"] * ("grad_checkpoint" in flags)
    device = ["--device", "cpu"] if sys.platform == "linux" else []
    with tempfile.TemporaryDirectory() as folder:
        command = common.mbf("plan", Path(folder) / "s", task, "--model", model, *device, *words, "--json")
        done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(done.stderr)
    document = json.loads(done.stdout)
    return {name: document[name] for name in ("seconds", "peak_bytes")}


def apart(*given: Any) -> dict[str, float]:
    command = [
        sys.executable,
        __file__,
        "--one",
        json.dumps([str(each) if isinstance(each, Path) else each for each in given]),
    ]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(done.stderr)
    return json.loads(done.stdout.splitlines()[-1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--only", nargs="*", help="parts of names")
    parser.add_argument("--out", type=Path)
    parser.add_argument("--one", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.one:
        model, task, flags = json.loads(options.one)
        print(json.dumps(learned(Path(model), Path(task), flags)))
        return
    results: dict[str, Any] = {}
    lines = ["| task | time, planned | taken | planned / taken | memory, planned | taken | planned / taken |"]
    lines += ["|---" * 7 + "|"]
    with tempfile.TemporaryDirectory() as place:
        for name, (shape, prompt, answer, count, flags) in CASES.items():
            if options.only and not any(part in name for part in options.only):
                continue
            folder = Path(place) / f"case-{len(results)}"
            folder.mkdir()
            model = common.SMOLLM2 if shape == "smollm2" else synthetic.write_model(folder / shape, shape)
            task = write_task(folder / "task", prompt, answer, count)
            pairs = [(planned(model, task, flags), apart(model, task, flags)) for _ in range(options.repeats)]
            middle = {
                key: [statistics.median(each[side][key] for each in pairs) for side in (0, 1)]
                for key in ("seconds", "peak_bytes")
            }
            ratios = {key: statistics.median(said[key] / took[key] for said, took in pairs) for key in middle}
            results[name] = {"pairs": pairs, "ratios": ratios}
            (said, took), (peak, held) = middle["seconds"], middle["peak_bytes"]
            lines.append(
                f"| {name} | {said:.1f} s | {took:.1f} s | {ratios['seconds']:.2f} | {peak / 1e6:.0f} MB |"
                f" {held / 1e6:.0f} MB | {ratios['peak_bytes']:.2f} |"
            )
            print(lines[-1], file=sys.stderr)
    common.finish(common.document("plan", results), lines, options.out)
    for key, goal in (("seconds", GOAL_TIME), ("peak_bytes", GOAL_MEMORY)):
        if far := [name for name, each in results.items() if abs(each["ratios"][key] - 1) > goal]:
            raise SystemExit(f"{key}: more than {goal:.0%} off: {'; '.join(far)}")


if __name__ == "__main__":
    main()
