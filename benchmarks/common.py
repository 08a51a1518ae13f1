"""What the benchmarks share: alternating runs, medians and ratios, and results with where they come from.

A ratio is taken between neighbouring runs, so that whatever else the machine does falls on both; its spread is the
smallest and the largest.
"""

import contextlib
import json
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from datetime import date
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
RESULTS = ROOT / "benchmarks" / "results"
PACKAGES = ("mlx", "mlx-lm", "numpy", "torch", "peft", "transformers", "cmeel-openblas")
MODELS = Path(os.environ.get("MBF_MODELS") or ROOT / "models")
SMOLLM2 = MODELS / "smollm2-135m-instruct"


class Kept:
    """What a run has measured so far, written after every case: the same command goes on where one was interrupted.

    Args:
        case: What is measured.
        out: Where `finish` will write; without it nothing is kept.
    """

    def __init__(self, case: str, out: Path | None):
        self.case, self.out = case, out
        self.results: dict[str, Any] = {}
        if out and out.exists():
            before, now = json.loads(out.read_text(encoding="utf-8")), document(case, {})
            same = all(before[key] == now[key] for key in ("command", "versions"))
            same &= before["machine"] | {"load": 0} == now["machine"] | {"load": 0}
            if same and not before.get("complete", True):
                self.results = before["results"]
                print(f"goes on after {', '.join(self.results)}", file=sys.stderr)

    def once(self, name: str, work: Callable[[], Any]) -> Any:
        """Return a case's result: as it was kept, or what `work()` gives, which is kept."""
        if name not in self.results:
            self.save(name, work())
        return self.results[name]

    def save(self, name: str, result: Any) -> None:
        """Keep a case's result."""
        self.results[name] = result
        if self.out:
            self.out.parent.mkdir(parents=True, exist_ok=True)
            self.out.write_text(json.dumps(document(self.case, self.results) | {"complete": False}, indent=1) + "\n")


def alternating(ways: dict[str, Callable[[], float]], repeats: int, kept: Kept) -> dict[str, list[float]]:
    """Return what each way gave in each of `repeats` rounds, kept as "rounds"; one before them is thrown away."""
    found: dict[str, list[float]] = kept.results.get("rounds") or {name: [] for name in ways}
    done = len(found[next(iter(ways))])
    for number in range(done, repeats + 1 if done < repeats else done):
        values = {name: way() for name, way in ways.items()}
        print(f"{number}: " + ", ".join(f"{name} {value:.3f}" for name, value in values.items()), file=sys.stderr)
        if number > done:
            found = {name: [*found[name], value] for name, value in values.items()}
            kept.save("rounds", found)
    return found


def compared(found: dict[str, list[float]], ours: str) -> dict[str, Any]:
    """Return medians, and the ratio of every other way to ours with its smallest and largest."""
    summary: dict[str, Any] = {}
    for name, values in found.items():
        ratios = [theirs / own for theirs, own in zip(values, found[ours], strict=True)]
        summary[name] = {
            "values": values,
            "median": statistics.median(values),
            "ratio": statistics.median(ratios),
            "ratio_spread": [min(ratios), max(ratios)],
        }
    return summary


def table(summary: dict[str, Any], unit: str, names: dict[str, str] | None = None) -> list[str]:
    """Return a comparison as lines of Markdown."""
    lines = [f"| who | {unit} | times ours |", "|---|---|---|"]
    for name, found in summary.items():
        low, high = found["ratio_spread"]
        ratio = "1" if found["ratio"] == 1 and low == high else f"{found['ratio']:.2f} ({low:.2f} to {high:.2f})"
        lines.append(f"| {(names or {}).get(name, name)} | {found['median']:.3g} | {ratio} |")
    return lines


def seconds(work: Callable[[], Any]) -> float:
    """Return the seconds that `work()` takes."""
    started = time.perf_counter()
    work()
    return time.perf_counter() - started


def command_seconds(command: Sequence[str | Path], **environment: str) -> float:
    """Return the seconds that a process takes from its start to its end.

    Raises:
        SystemExit: with what it said, where it fails.
    """
    started = time.perf_counter()
    done = subprocess.run(
        [str(word) for word in command], capture_output=True, text=True, cwd=ROOT, env={**os.environ, **environment}
    )
    if done.returncode:
        raise SystemExit(f"{' '.join(map(str, command))}:\n{done.stderr}")
    return time.perf_counter() - started


def seconds_until(command: Sequence[str | Path], said: bytes, **environment: str) -> float:
    """Return the seconds from a process's start until it has printed `said`, on stdout or stderr; then it is ended.

    Args:
        command: The command.
        said: The bytes to wait for; b"" is anything on stdout, whatever stderr says.

    Raises:
        SystemExit: with what it printed, where it ends before.
    """
    started = time.perf_counter()
    words, other = [str(word) for word in command], subprocess.STDOUT if said else subprocess.DEVNULL
    env = {**os.environ, "PYTHONUNBUFFERED": "1", **environment}
    with subprocess.Popen(
        words, stdout=subprocess.PIPE, stderr=other, stdin=subprocess.DEVNULL, cwd=ROOT, env=env
    ) as run:
        assert run.stdout is not None
        printed = b""
        while not printed or said not in printed:
            part = os.read(run.stdout.fileno(), 1 << 16)
            if not part:
                raise SystemExit(f"{' '.join(words)}: ended before it printed {said!r}:\n{printed.decode()}")
            printed += part
        found = time.perf_counter() - started
        run.kill()
    return found


def mbf(*words: Any) -> list[str]:
    """Return the command line of this checkout."""
    return [sys.executable, str(ROOT / "cli.py"), *map(str, words)]


def spread(values: Sequence[float], digits: int = 2) -> str:
    """Return a median with the smallest and the largest, for a table."""
    return f"{statistics.median(values):.{digits}f} ({min(values):.{digits}f} to {max(values):.{digits}f})"


def document(case: str, results: Any) -> dict[str, Any]:
    """Return results with the date, the machine and the versions that made them."""
    from mbf_mlx.device import machine

    return {
        "case": case,
        "date": str(date.today()),
        "command": " ".join(["python", "benchmarks/" + Path(sys.argv[0]).name, *sys.argv[1:]]),
        "machine": {
            "system": platform.system(),
            "processor": machine.processor_name(),
            "cpus": machine.cpu_count(),
            "memory_bytes": machine.total_memory(),
            "load": os.getloadavg()[0],
        },
        "versions": versions(),
        "results": results,
    }


def versions() -> dict[str, str]:
    """Return the versions of what is compared."""
    found = {"python": platform.python_version()}
    for name in PACKAGES:
        with contextlib.suppress(PackageNotFoundError):
            found[name] = version(name)
    return found


def finish(document: dict[str, Any], lines: Iterable[str], out: Path | None) -> None:
    """Print a Markdown table, and write it and the JSON document beside each other where `out` says."""
    where = document["machine"]
    text = "\n".join(
        [
            *lines,
            "",
            f"{document['date']}, {where['processor']}, {where['cpus']} cores, load {where['load']:.1f};"
            f" {', '.join(f'{name} {number}' for name, number in document['versions'].items())};"
            f" `{document['command']}`",
        ]
    )
    print(text)
    if out:
        out.parent.mkdir(parents=True, exist_ok=True)
        out.write_text(json.dumps(document | {"complete": True}, indent=1) + "\n", encoding="utf-8")
        out.with_suffix(".md").write_text(text + "\n", encoding="utf-8")
