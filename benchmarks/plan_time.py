"""What `mbf plan` says against what `mbf learn` then takes: seconds and peak memory.

Each pair is a plan and, right after it, the same task learned, both in processes of their own; the learning is timed
from the loaded model to the commit, scoring included, which is what the plan's seconds are about. Goals: 30 % of the
time, 15 % of the memory. Timings swing with whatever else the machine does; the median of the pairs counts. On a busy
machine `--cpu-time` takes the process's own seconds on both sides, with one thread (OPENBLAS_NUM_THREADS=1).

    python benchmarks/plan_time.py [--repeats 3] [--cpu-time] [--only NAME...] [--out FILE]
"""

import argparse
import json
import random
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import common
import synthetic

GOAL_TIME, GOAL_MEMORY = 0.3, 0.15
WORDS = "the red small cat sat under an old tree and saw two green birds fly over a cold blue lake at dawn".split()
# name -> model, words of a prompt, words of an answer (0: plain text), training rows, flags
CASES: dict[str, tuple[str, int, int, int, dict[str, Any]]] = {
    "SmolLM2-135M, 8 rows of 70 tokens, answers of one word": ("smollm2", 45, 1, 48, {"batch_size": 8}),
    "SmolLM2-135M, 4 rows of 150 tokens, answers of 60": ("smollm2", 60, 60, 24, {"batch_size": 4}),
    "SmolLM2-135M, the same, --grad-checkpoint": ("smollm2", 60, 60, 16, {"batch_size": 4, "grad_checkpoint": True}),
    "8 blocks of 512, 4 rows of 250 tokens, all": ("small", 60, 0, 40, {"batch_size": 4}),
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


def learned(model: Path, task: Path, flags: dict[str, Any], clock: Callable[[], float]) -> dict[str, float]:
    """Learn the task once and return seconds and peak bytes; for a process of its own."""
    from mbf_mlx import Stream
    from mbf_mlx.config import LearnConfig, TrainConfig
    from mbf_mlx.device import backend, machine

    backend.setup("cpu" if sys.platform == "linux" else None)
    with tempfile.TemporaryDirectory() as folder:
        stream = Stream.open(Path(folder) / "s", base=str(model))
        stream._load()
        started = clock()
        stream.learn(task, config=LearnConfig(train=TrainConfig(epochs=1, **flags)))
        return {"seconds": clock() - started, "peak_bytes": machine.resident_peak()}


def planned(model: Path, task: Path, flags: dict[str, Any], clock: Callable[[], float]) -> dict[str, float]:
    """Return what `mbf plan` says; for a process of its own."""
    from typer.testing import CliRunner

    from mbf_mlx.commands import app
    from mbf_mlx.device import backend

    backend.setup("cpu" if sys.platform == "linux" else None)
    from mbf_mlx.planning import timing as trial

    trial.time = SimpleNamespace(perf_counter=clock)  # type: ignore[assignment]
    words = ["--epochs", 1, "--batch-size", flags["batch_size"]] + ["--grad-checkpoint"] * ("grad_checkpoint" in flags)
    device = ["--device", "cpu"] if sys.platform == "linux" else []
    with tempfile.TemporaryDirectory() as folder:
        given = ["plan", Path(folder) / "s", task, "--model", model, *device, *words, "--json"]
        done = CliRunner().invoke(app, [str(word) for word in given], catch_exceptions=False)
    if done.exit_code:
        raise SystemExit(done.stderr)
    document = json.loads(done.stdout)
    return {name: document[name] for name in ("seconds", "peak_bytes")}


def apart(who: str, cpu_time: bool, model: Path, task: Path, flags: dict[str, Any]) -> dict[str, float]:
    """Return what `planned` or `learned` gives in a process of its own."""
    given = json.dumps([who, cpu_time, str(model), str(task), flags])
    done = subprocess.run([sys.executable, __file__, "--one", given], capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(done.stderr)
    return json.loads(done.stdout.splitlines()[-1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--cpu-time", action="store_true", help="seconds of this process, not of the clock on the wall")
    parser.add_argument("--only", nargs="*", help="parts of names")
    parser.add_argument("--out", type=Path)
    parser.add_argument("--one", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.one:
        who, cpu_time, *given, flags = json.loads(options.one)
        clock = time.process_time if cpu_time else time.perf_counter
        print(json.dumps({"plan": planned, "learn": learned}[who](*map(Path, given), flags, clock)))
        return
    kept = common.Kept("plan", options.out)
    lines = ["| task | time, planned | taken | planned / taken | memory, planned | taken | planned / taken |"]
    lines += ["|---" * 7 + "|"]
    found: dict[str, dict[str, float]] = {}
    with tempfile.TemporaryDirectory() as place:
        for name, (shape, prompt, answer, count, flags) in CASES.items():
            if options.only and not any(part in name for part in options.only):
                continue
            folder = Path(place) / f"case-{len(found)}"
            folder.mkdir()
            model = common.SMOLLM2 if shape == "smollm2" else synthetic.write_model(folder / shape, shape)
            task = write_task(folder / "task", prompt, answer, count)
            pairs = kept.once(
                name,
                lambda model=model, task=task, flags=flags: [
                    [apart(who, options.cpu_time, model, task, flags) for who in ("plan", "learn")]
                    for _ in range(options.repeats)
                ],
            )
            middle = {
                key: [statistics.median(each[side][key] for each in pairs) for side in (0, 1)]
                for key in ("seconds", "peak_bytes")
            }
            ratios = {key: statistics.median(said[key] / took[key] for said, took in pairs) for key in middle}
            found[name] = ratios
            (said, took), (peak, held) = middle["seconds"], middle["peak_bytes"]
            lines.append(
                f"| {name} | {said:.1f} s | {took:.1f} s | {ratios['seconds']:.2f} | {peak / 1e6:.0f} MB |"
                f" {held / 1e6:.0f} MB | {ratios['peak_bytes']:.2f} |"
            )
            print(lines[-1], file=sys.stderr)
    results = {name: {"pairs": kept.results[name], "ratios": ratios} for name, ratios in found.items()}
    common.finish(common.document("plan", results), lines, options.out)
    for key, goal in (("seconds", GOAL_TIME), ("peak_bytes", GOAL_MEMORY)):
        if far := [name for name, ratios in found.items() if abs(ratios[key] - 1) > goal]:
            raise SystemExit(f"{key}: more than {goal:.0%} off: {'; '.join(far)}")


if __name__ == "__main__":
    main()
