"""A JSONL file of 1 GB through `mbf check`, and through the reading of `mbf learn`: seconds and peak resident memory.

Rows of about 100 bytes, one in a hundred a repeat: the many short rows are what costs memory. The file is made in a
temporary folder and removed.

    python benchmarks/large_file.py [--bytes 1000000000] [--out benchmarks/results/large_file.json]
"""

import argparse
import os
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import common

LIMIT_BYTES = 500_000_000
READ = """
import resource, sys, time
sys.path.insert(0, {root!r})
from pathlib import Path
from mbf_mlx.data.task import read_task
task = read_task(Path({file!r}))
print(len(task.train), len(task.test))
"""


def write(path: Path, size: int) -> int:
    """Write rows until the file has `size` bytes; return how many."""
    rows = written = 0
    with open(path, "w", encoding="utf-8") as file:
        while written < size:
            number = rows - rows % 100 if rows % 100 == 1 else rows
            prompt = f"Which label fits mail number {number:010d} of the archive?"
            written += file.write(f'{{"prompt": "{prompt}", "completion": "{number % 7}"}}\n')
            rows += 1
    return rows


def measured(command: list[str]) -> dict[str, float]:
    """Run a command; return its seconds and the peak of its resident memory in bytes."""
    started = time.perf_counter()
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    _, said = process.communicate()
    if process.returncode:
        raise SystemExit(said)
    peak = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    return {"seconds": round(time.perf_counter() - started, 1), "peak_bytes": peak}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--bytes", type=int, default=10**9)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "large.jsonl"
        rows = write(file, options.bytes)
        kept = common.Kept("large_file", options.out)
        size = os.path.getsize(file)
        kept.save("file", {"bytes": size, "rows": rows, "limit_bytes": LIMIT_BYTES})
        # The peak of children is the largest of all so far, so the smaller one comes first.
        code = READ.format(root=str(common.ROOT), file=str(file))
        read = kept.once("read", lambda: measured([sys.executable, "-c", code]))
        check = kept.once("check", lambda: measured(common.mbf("check", file)))
    lines = ["| what | seconds | peak resident |", "|---|---|---|"]
    for name, found in (("read_task, as in mbf learn", read), ("mbf check", check)):
        lines.append(
            f"| {name}, {rows:,} rows, {size / 1e9:.2f} GB | {found['seconds']:.0f} |"
            f" {found['peak_bytes'] / 1e6:.0f} MB |"
        )
    common.finish(common.document("large_file", kept.results), lines, options.out)
    if check["peak_bytes"] > LIMIT_BYTES and size >= 10**9:
        raise SystemExit("over 500 MB")


if __name__ == "__main__":
    main()
