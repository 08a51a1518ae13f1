"""Case g: seconds and peak memory of each export target, each in a process of its own.

python benchmarks/export.py [--targets mlx peft gguf gguf-adapter adapter] [--repeats 5] [--model FOLDER] [--out FILE]
"""

import argparse
import json
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import common
import flatness

WORK = """
import json, sys, time
sys.path.insert(0, {root!r})
from mbf_mlx.device import machine
from mbf_mlx.api import Stream
started = time.perf_counter()
document = Stream.open({stream!r}).export({target!r}, {out!r}, allow_loss=True)
print(json.dumps({{"seconds": time.perf_counter() - started, "peak_bytes": machine.resident_peak()}}))
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--targets", nargs="+", default=["adapter", "peft", "gguf-adapter", "mlx", "gguf"])
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--model", type=Path, default=common.SMOLLM2)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    kept, lines = common.Kept("export", options.out), ["| target | seconds | peak |", "|---|---|---|"]
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        task = flatness.write_task(folder, 0)
        command = common.mbf("learn", folder / "s", task, "--iters", 4, "--model", options.model)
        common.command_seconds(command)
        for target in options.targets:
            found = kept.once(target, lambda target=target: measured(folder, target, options.repeats))
            peak = max(found["peak_bytes"])
            lines.append(f"| {target} | {common.spread(found['seconds'])} | {peak / 1e6:.0f} MB |")
            print(lines[-1], file=sys.stderr)
    common.finish(common.document("export", kept.results), lines, options.out)


def measured(folder: Path, target: str, repeats: int) -> dict[str, list[float]]:
    """Export the stream to `target` again and again, each time in a process of its own."""
    runs = [exported(folder, target) for _ in range(repeats)]
    return {name: [run[name] for run in runs] for name in runs[0]}


def exported(folder: Path, target: str) -> dict[str, float]:
    """Export the stream to `target` and delete what was written."""
    out = folder / (f"{target}.gguf" if target.startswith("gguf") else target)
    code = WORK.format(root=str(common.ROOT), stream=str(folder / "s"), target=target, out=str(out))
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(done.stderr)
    out.unlink() if out.is_file() else shutil.rmtree(out)
    return json.loads(done.stdout.splitlines()[-1])


if __name__ == "__main__":
    main()
