"""The one place that knows devices: Metal, CUDA or CPU, compute dtype, memory limits, and a real BLAS for CPUs.

`setup()` comes before the first `import mlx.core`: on a CPU mlx calls whichever BLAS the process has loaded by then,
and the one in its Linux wheel runs at 4 GFLOP/s where OpenBLAS runs at 250. Everything else here may be called later.
Sizes are bytes. Importing this file imports no mlx.
"""

import ctypes
import ctypes.util
import importlib.metadata
import importlib.util
import os
import platform
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil

from mbf_mlx.errors import InputError, MissingPackageError

KINDS = ("auto", "cpu", "gpu", "metal", "cuda")
# mlx's own limit is 1.5 times what a Mac recommends, and more than the recommended freezes or panics it. (The wired
# limit, which makes that worse, stays as it is.)
MEMORY_SHARE = 0.8
BLAS_PACKAGE = "cmeel-openblas"
FORTRAN = "libgfortran.so.5"
_THREAD_VARIABLES = ("OPENBLAS_NUM_THREADS", "GOTO_NUM_THREADS", "OMP_NUM_THREADS")  # in OpenBLAS's own order


@dataclass(frozen=True, kw_only=True)
class Device:
    """Where mlx computes in this process, and why there."""

    kind: str  # "cpu", "metal" or "cuda"
    name: str  # the processor or GPU, as its maker calls it
    dtype: str | None  # what to compute in: "float32", or None for the model's own
    blas: str  # what multiplies matrices on the CPU
    threads: int  # of that BLAS; with another number the last bits of a sum differ
    memory_bytes: int  # what the device has, or what this process's control group may take of it
    memory_limit: int  # what we let mlx take
    reasons: tuple[str, ...]  # one sentence for each choice, for `mbf doctor`


_device: Device | None = None
_blas: tuple[str, int, str] | None = None


def setup(device: str | None = None) -> Device:
    """Load the BLAS, pick the device and set mlx's limits; the same answer again when it is called again.

    Args:
        device: One of KINDS; None takes $MBF_DEVICE, or "auto": a GPU where mlx can use one, else the CPU.

    Raises:
        MissingPackageError: mlx is not installed.
        InputError: no such kind of device, or this machine has none.
    """
    global _device
    wanted = device or os.environ.get("MBF_DEVICE") or "auto"
    if wanted not in KINDS:
        raise InputError(f"device: expected one of {', '.join(KINDS)}, got {wanted!r} (from the flag or $MBF_DEVICE)")
    if _device is not None and device is None:
        return _device
    require_mlx()
    blas, threads, blas_reason = load_blas()
    import mlx.core as mx

    kind, reason = _pick(mx, wanted)
    mx.set_default_device(mx.cpu if kind == "cpu" else mx.gpu)
    memory = _memory(mx, kind)
    limit = int(MEMORY_SHARE * memory)
    mx.set_memory_limit(limit)
    _device = Device(
        kind=kind,
        name=processor_name() if kind == "cpu" else str(mx.device_info().get("device_name", "GPU")),
        # mlx's CPU kernels are 30 to 100 times slower in 16 bits, and slower still on packed weights.
        dtype="float32" if kind == "cpu" else None,
        blas=blas,
        threads=threads,
        memory_bytes=memory,
        memory_limit=limit,
        reasons=(reason, blas_reason),
    )
    return _device


def require_mlx() -> None:
    """Raise MissingPackageError where mlx or mlx-lm is missing, naming the extra that brings it to this machine."""
    missing = [name for name in ("mlx.core", "mlx_lm") if not _installed(name)]
    if missing:
        names = " and ".join({"mlx.core": "mlx", "mlx_lm": "mlx-lm"}[name] for name in missing)
        raise MissingPackageError(f"this needs {names}, which this installation lacks; {install_hint()}")


def install_hint() -> str:
    """Return the sentence that says how mlx comes onto this machine."""
    if sys.platform == "darwin":
        if platform.machine() == "arm64":
            return "pip install --upgrade mbf-mlx brings it"
        return "mlx runs on Apple silicon only, or on Linux"
    if sys.platform != "linux":
        return "mlx runs on macOS and Linux; on Windows use WSL"
    if _has_nvidia():
        return "pip install 'mbf-mlx[cuda13]' brings it (or [cuda12], by your driver; [cpu] without the GPU)"
    return "pip install 'mbf-mlx[cpu]' brings it"


def _installed(module: str) -> bool:
    try:
        return importlib.util.find_spec(module) is not None
    except ImportError:  # the parent package is missing, or its import is blocked
        return False


def _has_nvidia() -> bool:
    return Path("/proc/driver/nvidia/version").exists() or Path("/dev/nvidiactl").exists()


def load_blas() -> tuple[str, int, str]:
    """Load a real BLAS for mlx's CPU kernels, once; has to come before `import mlx.core`.

    Returns:
        Its name, its number of threads, and the reason for the choice. Threads are $OPENBLAS_NUM_THREADS where it is
        set, else the CPUs that this process may use.
    """
    global _blas
    if _blas is None:
        _blas = _load_blas()
    return _blas


def _load_blas() -> tuple[str, int, str]:
    if sys.platform == "darwin":
        return "Accelerate", cpu_count(), "Accelerate: part of macOS, and mlx is built against it"
    own = "mlx's own reference BLAS"
    if "mlx.core" in sys.modules:
        return own, 1, f"{own}: mlx was imported before mbf_mlx could load a faster one"
    found = _find_openblas()
    if found is None:
        return own, 1, f"{own}, some 60 times slower than OpenBLAS: pip install {BLAS_PACKAGE} brings that"
    path, origin = found
    if not any(os.environ.get(name) for name in _THREAD_VARIABLES):
        # OpenBLAS counts the machine's cores, not those that a container may use.
        os.environ["OPENBLAS_NUM_THREADS"] = str(cpu_count())
    try:
        _load_fortran()
        library = ctypes.CDLL(path, mode=ctypes.RTLD_GLOBAL)
    except OSError as error:
        return own, 1, f"{own}: {origin} does not load ({error})"
    try:
        library.openblas_get_config.restype = ctypes.c_char_p
        name = " ".join(library.openblas_get_config().decode().split()[:2])
        threads = int(library.openblas_get_num_threads())
    except AttributeError:
        name, threads = "OpenBLAS", cpu_count()
    return name, threads, f"{name} with {threads} threads, from {origin}"


def _load_fortran() -> None:
    """Load the Fortran runtime that OpenBLAS asks for by its plain name, where the system has none.

    mlx's wheel brings one under a name of its own, which the loader does not take for the other. A copy in memory that
    says the plain name does; it is gone with the process.
    """
    try:
        ctypes.CDLL(FORTRAN)
        return
    except OSError:
        pass
    try:
        files = {file.name: str(file.locate()) for file in importlib.metadata.files("mlx-cpu") or []}
    except importlib.metadata.PackageNotFoundError:
        return
    for name, path in files.items():
        if name.startswith("libquadmath"):
            ctypes.CDLL(path)  # found by its name from now on
    for name, path in files.items():
        if name.startswith("libgfortran"):
            old, new = name.encode() + b"\0", FORTRAN.encode() + b"\0"
            content = Path(path).read_bytes().replace(old, new.ljust(len(old), b"\0"))
            copy = os.memfd_create(FORTRAN)
            with open(copy, "wb") as file:
                file.write(content)
                file.flush()
                ctypes.CDLL(f"/proc/self/fd/{copy}")
            return


def _find_openblas() -> tuple[str, str] | None:
    """Return the path of libopenblas and where it comes from, or None."""
    try:
        files = importlib.metadata.distribution(BLAS_PACKAGE).files or []
    except importlib.metadata.PackageNotFoundError:
        files = []
    for file in files:
        if file.name == "libopenblas.so.0" and Path(str(file.locate())).exists():
            return str(file.locate()), f"the package {BLAS_PACKAGE}"
    system = ctypes.util.find_library("openblas")
    return (system, "the system") if system else None


def _pick(mx: Any, wanted: str) -> tuple[str, str]:
    """Return the kind of device to use, and the reason."""
    gpu = None
    if mx.metal.is_available():
        gpu = "metal"
    elif hasattr(mx, "cuda") and mx.cuda.is_available():
        gpu = "cuda"
    if wanted == "cpu":
        return "cpu", "CPU: it was asked for"
    if wanted == "auto":
        if gpu:
            return gpu, f"{gpu}: mlx can use this machine's GPU"
        why = "this machine shows no GPU"
        if _has_nvidia():
            why = "there is an NVIDIA GPU, but this mlx has no CUDA: pip install 'mbf-mlx[cuda13]' or [cuda12]"
        return "cpu", f"CPU: {why}"
    if gpu is None or wanted not in ("gpu", gpu):
        have = f"cpu and {gpu}" if gpu else "cpu alone"
        raise InputError(f"device: expected one that mlx has on this machine ({have}), got {wanted!r}")
    return gpu, f"{gpu}: it was asked for"


@contextmanager
def linalg_device() -> Iterator[None]:
    """Make the CPU the default for what runs inside: MLX has QR and SVD nowhere else. Without mlx it does nothing."""
    mx = sys.modules.get("mlx.core")
    if mx is None:
        yield
        return
    with mx.stream(mx.cpu):
        yield


def keep_quantized(float32_bytes: int) -> bool:
    """Return whether weights that would take `float32_bytes` unpacked are to stay packed on this device.

    GPUs compute on packed weights. A CPU does so at a hundredth of its speed: there they are unpacked once, as long as
    that takes at most half of the free memory.
    """
    return setup().kind != "cpu" or float32_bytes > free_memory() / 2


def free_memory() -> int:
    """Return how many bytes this process can still take on its device."""
    free = int(psutil.virtual_memory().available)
    group = _control_group_memory()
    if group is not None:
        free = min(free, max(0, group[0] - group[1]))
    if _device is None or _device.kind == "cpu":
        return free
    import mlx.core as mx

    left = max(0, _device.memory_limit - int(mx.get_active_memory()))
    return left if _device.kind == "cuda" else min(left, free + int(mx.get_cache_memory()))


def peak_memory() -> int:
    """Return the most bytes held since `reset_peak_memory`.

    On CUDA the GPU's, as mlx counts. Elsewhere what the process held as a whole, and at least what mlx counts; macOS
    gives no peak that can be reset, so there it is the larger of mlx's peak and what the process holds now.
    """
    mx = sys.modules.get("mlx.core")
    counted = int(mx.get_peak_memory()) if mx else 0
    if _device is not None and _device.kind == "cuda":
        return counted
    return max(counted, _resident_peak())


def reset_peak_memory() -> None:
    """Begin to count `peak_memory` anew."""
    mx = sys.modules.get("mlx.core")
    if mx:
        mx.reset_peak_memory()
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        pass  # not Linux, or not allowed: the peak is then the process's since it began


def _resident_peak() -> int:
    try:
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    except OSError:
        pass
    return int(psutil.Process().memory_info().rss)


def cpu_count() -> int:
    """Return how many CPUs this process may use: of the machine's, its affinity's and its control group's share."""
    # Hyper-threads bring a matrix product nothing.
    count = psutil.cpu_count(logical=False) or os.cpu_count() or 1
    if hasattr(os, "sched_getaffinity"):
        count = min(count, len(os.sched_getaffinity(0)))
    for folder in _control_groups(""):
        try:
            quota, period = (folder / "cpu.max").read_text().split()
            if quota != "max":
                count = min(count, max(1, int(quota) // int(period)))
        except (OSError, ValueError):
            pass
    for folder in _control_groups("cpu"):
        try:
            quota_us = int((folder / "cpu.cfs_quota_us").read_text())
            if quota_us > 0:
                count = min(count, max(1, quota_us // int((folder / "cpu.cfs_period_us").read_text())))
        except (OSError, ValueError):
            pass
    return count


def total_memory() -> int:
    """Return the machine's memory, or the part of it that this process's control group may take."""
    total = int(psutil.virtual_memory().total)
    group = _control_group_memory()
    return total if group is None else min(total, group[0])


def _memory(mx: Any, kind: str) -> int:
    if kind == "cpu":
        return total_memory()
    info = mx.device_info()
    if kind == "metal":
        return int(info.get("max_recommended_working_set_size") or 0.75 * total_memory())
    return int(info.get("total_memory") or info.get("memory_size") or total_memory())


def _control_group_memory() -> tuple[int, int] | None:
    """Return (limit, used) of the tightest control group above this process, or None where none has a limit."""
    found = []
    for controller, limit_name, used_name in (
        ("", "memory.max", "memory.current"),
        ("memory", "memory.limit_in_bytes", "memory.usage_in_bytes"),
    ):
        for folder in _control_groups(controller):
            try:
                limit, used = int((folder / limit_name).read_text()), int((folder / used_name).read_text())
                # Pages of files that the kernel drops on demand are counted as used, too.
                for line in (folder / "memory.stat").read_text().splitlines():
                    if line.split()[0] in ("inactive_file", "total_inactive_file"):
                        used -= int(line.split()[1])
                        break
            except (OSError, ValueError):
                continue  # no such file, or "max"
            if limit < 1 << 60:  # version 1 says "no limit" with a number near 2^63
                found.append((limit, max(0, used)))
    return min(found, key=lambda pair: pair[0] - pair[1], default=None)


def _control_groups(controller: str) -> list[Path]:
    """Return the folders of this process's control groups, inner to outer; "" is version 2."""
    try:
        lines = Path("/proc/self/cgroup").read_text().splitlines()
    except OSError:
        return []
    for line in lines:
        _, controllers, path = line.split(":", 2)
        if controller in controllers.split(","):
            root = Path("/sys/fs/cgroup") / controller
            inner = root / path.strip("/")
            return [folder for folder in (inner, *inner.parents) if folder == root or root in folder.parents]
    return []


def processor_name() -> str:
    """Return the CPU's name as its maker gives it."""
    if sys.platform == "darwin":
        command = ["/usr/sbin/sysctl", "-n", "machdep.cpu.brand_string"]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        return done.stdout.strip() or platform.processor()
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.lower().startswith("model name"):
                return line.split(":", 1)[1].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()
