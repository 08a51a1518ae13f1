"""`mbf doctor`: what this machine has, what would run where, and what is missing.

Users paste its output into issues, so it names no user, no host and no path.
"""

import importlib.metadata
import os
import platform
import shutil
import sys
import time
from pathlib import Path
from typing import Any

from mbf_mlx import __version__, units
from mbf_mlx.commands import console
from mbf_mlx.commands.options import Json
from mbf_mlx.device import backend, bfloat16, machine
from mbf_mlx.device.blas import PACKAGE
from mbf_mlx.errors import InputError

PACKAGES = ("mlx", "mlx-lm", "transformers", "tokenizers", "numpy", "safetensors", "gguf", "rouge-score")
VARIABLES = ("MBF_DEVICE", "OPENBLAS_NUM_THREADS", "OMP_NUM_THREADS", "MLX_ENABLE_TF32", "HF_HUB_OFFLINE")
MATMUL_SIZE = 1024
MATMUL_SECONDS = 0.5


def doctor(json: Json = False) -> None:
    """Show what this machine has, what would run where, and what is missing. You can paste it into an issue.

    Example: mbf doctor
    """
    report = examine()
    if json:
        console.print_json(report)
        return
    for name, text in _lines(report):
        console.out.print(f"{name:<10} {text}")


def examine() -> dict[str, Any]:
    """Return what `mbf doctor --json` prints. Something that is missing raises nothing."""
    packages = {name: _version(name) for name in _wanted_packages()}
    report: dict[str, Any] = {
        "mbf": __version__,
        "python": platform.python_version(),
        "system": machine.system_name(),
        "processor": machine.processor_name(),
        "cpus": machine.cpu_count(),
        "memory_bytes": machine.total_memory(),
        "available_bytes": machine.available_memory(),
        "disk_free_bytes": shutil.disk_usage(Path.cwd()).free,
        # On a CPU mx.compile calls a compiler at run time; Metal and CUDA bring their own.
        "compiler": next((name for name in ("g++", "clang++") if shutil.which(name)), None),
        "packages": packages,
        "missing": [name for name, version in packages.items() if version is None],
        "environment": {name: os.environ[name] for name in VARIABLES if name in os.environ},
        "device": None,
        "matmul_gflops": None,
        "bfloat16": None,
        "problem": None,
    }
    try:
        device = backend.setup()
    except InputError as error:
        report["problem"] = str(error)
        return report
    report["device"] = {
        "kind": device.kind,
        "name": device.name,
        "dtype": device.dtype or "the model's own",
        "blas": device.blas,
        "threads": device.threads,
        "memory_bytes": device.memory_bytes,
        "memory_limit": device.memory_limit,
        "reasons": list(device.reasons),
    }
    report["matmul_gflops"] = round(measure_matmul(), 1)
    if device.kind == "cpu":
        report["bfloat16"] = measure_bfloat16()
    return report


def measure_matmul() -> float:
    """Return how fast the chosen device multiplies float32 matrices, in 10^9 operations a second: the best of many."""
    import mlx.core as mx

    a = mx.random.normal((MATMUL_SIZE, MATMUL_SIZE))
    mx.eval(a @ a)
    best, begin = float("inf"), time.perf_counter()
    while time.perf_counter() - begin < MATMUL_SECONDS:
        start = time.perf_counter()
        mx.eval(a @ a)
        best = min(best, time.perf_counter() - start)
    return 2 * MATMUL_SIZE**3 / best / 1e9


def measure_bfloat16() -> dict[str, Any]:
    """Return what multiplies in bfloat16 on this CPU, and how fast one core is in 10^9 operations a second."""
    found: dict[str, Any] = {"library": bfloat16.reason(), "units": bfloat16.has_units(), "is_taken": False}
    if bfloat16.library() is not None:
        trial = bfloat16.trial()
        found["gflops_of_one_core"] = {"bfloat16": round(trial.bfloat16, 1), "float32": round(trial.float32, 1)}
        found["is_taken"] = bfloat16.is_faster()
    return found


def _wanted_packages() -> tuple[str, ...]:
    return (*PACKAGES, PACKAGE) if sys.platform == "linux" and not machine.has_nvidia() else PACKAGES


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _bfloat16_line(found: dict[str, Any]) -> str:
    if "gflops_of_one_core" not in found:
        return f"no: {found['library']}"
    speeds = found["gflops_of_one_core"]
    said = f"{speeds['bfloat16']} GFLOP/s of one core with {found['library']}, {speeds['float32']} in float32"
    units = "" if found["units"] else "; this CPU has no units for it"
    return f"{said}{units}: training takes {'bfloat16' if found['is_taken'] else 'float32'}"


def _lines(report: dict[str, Any]) -> list[tuple[str, str]]:
    """Return the report as (heading, text) lines."""
    device, size = report["device"], units.size
    lines = [
        ("mbf-mlx", f"{report['mbf']}, Python {report['python']}"),
        ("system", report["system"]),
        ("processor", f"{report['processor']}, {report['cpus']} CPUs that we may use"),
        ("memory", f"{size(report['memory_bytes'])}, {size(report['available_bytes'])} of it free"),
        ("disk", f"{size(report['disk_free_bytes'])} free here"),
    ]
    if device:
        lines += [
            ("device", f"{device['kind']} ({device['name']}), computes in {device['dtype']}"),
            *(("because", reason) for reason in device["reasons"]),
            ("limit", f"mlx may take {size(device['memory_limit'])} of {size(device['memory_bytes'])}"),
            ("matmul", f"{report['matmul_gflops']} GFLOP/s in float32"),
        ]
        if device["kind"] == "cpu":
            lines.append(
                ("weights", f"unpacked to float32 up to {size(report['available_bytes'] / 2)}, else left packed")
            )
            lines.append(("bfloat16", _bfloat16_line(report["bfloat16"])))
            lines.append(("compiler", report["compiler"] or "none: mx.compile falls back silently and is slower"))
    else:
        lines.append(("device", f"none: {report['problem']}"))
        lines.append(("still", "check, merging, metrics and adapter export work without mlx"))
    have = [f"{name} {version}" for name, version in report["packages"].items() if version]
    lines.append(("packages", ", ".join(have)))
    if report["missing"]:
        lines.append(("missing", f"{', '.join(report['missing'])}; {backend.install_hint()}"))
    if report["environment"]:
        lines.append(("set", ", ".join(f"{name}={value}" for name, value in report["environment"].items())))
    return lines
