"""The one place that decides where mlx computes: Metal, CUDA or CPU, in which dtype, with how much memory.

Call `setup()` before the first `import mlx.core`, because a CPU's BLAS has to be loaded before mlx (blas.py). Sizes are
bytes. Importing this file does not import mlx. What the machine has, with or without mlx, is in machine.py.
"""

import importlib.util
import os
import platform
import resource
import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

from mbf_mlx.device import machine
from mbf_mlx.device.blas import load_blas
from mbf_mlx.device.lighter_imports import import_mlx_lm
from mbf_mlx.errors import InputError, MissingPackageError

OPEN_FILES = 4096  # the hard limit that mlx-lm sets
KINDS = ("auto", "cpu", "gpu", "metal", "cuda")
# mlx's own limit is 1.5 times what a Mac recommends, but above the recommended size machines froze or panicked. Wired
# memory makes that worse, so its limit stays at mlx's own: nothing is wired.
MEMORY_SHARE = 0.8
# Freed buffers that mlx keeps for the next batch. Without a limit of their own they grow with every new batch length,
# up to the limit above, and take memory from a Mac's other programs.
CACHE_SHARE = 0.2


@dataclass(frozen=True, kw_only=True)
class Device:
    """Where mlx computes in this process, and why there."""

    kind: str  # "cpu", "metal" or "cuda"
    name: str  # the maker's name of the processor or GPU
    dtype: str | None  # the dtype to compute in: "float32", or None for the model's own
    blas: str  # the library that multiplies matrices on the CPU
    threads: int  # how many that BLAS uses; with another number the last bits of a sum differ
    memory_bytes: int  # the device's memory, or the part of it that this process may take
    memory_limit: int  # how much of it we let mlx take
    reasons: tuple[str, ...]  # one sentence for each choice, for `mbf doctor`


_device: Device | None = None


def setup(device: str | None = None) -> Device:
    """Load the BLAS, pick the device and set mlx's limits. Later calls return the same answer.

    Args:
        device: One of KINDS. None means $MBF_DEVICE, or else "auto": a GPU if mlx can use one, else the CPU.

    Raises:
        MissingPackageError: mlx or mlx-lm is not installed.
        InputError: there is no such kind of device, or this machine does not have it.
    """
    global _device
    if _device is not None and device is None:
        return _device
    wanted = device or os.environ.get("MBF_DEVICE") or "auto"
    if wanted not in KINDS:
        source = "device" if device else "$MBF_DEVICE"
        raise InputError(f"{source}: expected one of {', '.join(KINDS)}, got {wanted!r}")
    require_mlx()
    blas = load_blas()
    try:
        import mlx.core as mx
    except ImportError as error:  # `pip install mlx` on Linux installs mlx without its library
        raise MissingPackageError(f"mlx does not load: {error}; {install_hint()}") from error

    kind, reason = _pick(wanted)
    mx.set_default_device(mx.cpu if kind == "cpu" else mx.gpu)
    import_mlx_lm()  # it takes the default device as its own
    memory = _memory(kind)
    mx.set_memory_limit(int(MEMORY_SHARE * memory))
    if kind == "metal":
        mx.set_cache_limit(int(CACHE_SHARE * memory))
    _device = Device(
        kind=kind,
        name=str(mx.device_info().get("device_name", "GPU")) if kind == "cuda" else machine.processor_name(),
        # mlx's CPU kernels are 30 to 100 times slower in 16 bits, and slower still on packed weights.
        dtype="float32" if kind == "cpu" else None,
        blas=blas.name,
        threads=blas.threads,
        memory_bytes=memory,
        memory_limit=int(MEMORY_SHARE * memory),
        reasons=(reason, blas.reason),
    )
    return _device


def require_mlx() -> None:
    """Check that mlx and mlx-lm can be imported here.

    Raises:
        MissingPackageError: one of them is missing; the message says how to install it on this machine.
        InputError: this process may not open as many files as mlx-lm sets as its limit when it is imported.
    """
    missing = [name for name, module in (("mlx", "mlx.core"), ("mlx-lm", "mlx_lm")) if not has_module(module)]
    if missing:
        raise MissingPackageError(f"this needs {' and '.join(missing)}, which is not installed here; {install_hint()}")
    most = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    if most != resource.RLIM_INFINITY and most < OPEN_FILES:
        raise InputError(
            f"mlx-lm needs to be allowed {OPEN_FILES:,} open files; this process may open {most:,}"
            f"\nhint: raise the hard limit: ulimit -n {OPEN_FILES}, or LimitNOFILE={OPEN_FILES} for a service"
        )


def has_module(module: str) -> bool:
    """Return whether `module` can be found, without importing it."""
    try:
        return importlib.util.find_spec(module) is not None
    except (ImportError, ValueError):  # its parent package is missing
        return False


def install_hint() -> str:
    """Return a sentence that says how to install mlx on this machine."""
    if sys.platform == "darwin":
        if platform.machine() == "arm64":
            return "pip install --upgrade mbf-mlx brings it"
        if machine.processor_name().startswith("Apple"):
            return "this Python is built for Intel: mlx needs one for arm64"
        return "mlx needs Apple silicon, or Linux"
    if sys.platform != "linux":
        return "mlx runs on macOS and Linux (on Windows: in WSL)"
    if machine.has_nvidia():
        return "pip install 'mbf-mlx[cuda13]' brings it for the GPU (or [cuda12], by your driver), [cpu] for the CPU"
    return "pip install 'mbf-mlx[cpu]' brings it"


def _pick(wanted: str) -> tuple[str, str]:
    """Return the kind of device to use, and the reason."""
    import mlx.core as mx

    gpu = "metal" if mx.metal.is_available() else None
    if gpu is None and mx.cuda.is_available():
        gpu = "cuda"
    if wanted == "cpu":
        return "cpu", "CPU: you asked for it"
    if wanted == "auto" and gpu is None:
        if machine.has_nvidia():
            return "cpu", f"CPU: there is an NVIDIA GPU, but this mlx cannot use it; {install_hint()}"
        return "cpu", "CPU: mlx sees no GPU on this machine"
    if gpu is None or wanted not in ("auto", "gpu", gpu):
        have = f"cpu and {gpu}" if gpu else "cpu alone"
        raise InputError(f"device: expected one that mlx has on this machine ({have}), got {wanted!r}")
    return gpu, f"{gpu}: {'mlx can use this GPU' if wanted == 'auto' else 'you asked for it'}"


def _memory(kind: str) -> int:
    if kind == "cpu":
        return machine.total_memory()
    import mlx.core as mx

    info = mx.device_info()
    if kind == "metal":
        return int(info.get("max_recommended_working_set_size") or 0.75 * machine.total_memory())
    return int(info.get("total_memory") or info.get("memory_size") or machine.total_memory())


def is_on_cpu() -> bool:
    """Return whether mlx computes on the CPU in this thread."""
    import mlx.core as mx

    return bool(mx.default_device() == mx.Device(mx.cpu))


def stay_on_cpu() -> None:
    """Make the CPU mlx's default device in this thread; each thread has its own."""
    import mlx.core as mx

    mx.set_default_device(mx.cpu)


def same_device() -> Callable[[], None]:
    """Return what makes another thread compute where this one does: each thread has its own default device."""
    import mlx.core as mx

    return partial(mx.set_default_device, mx.default_device())


def keep_quantized(float32_bytes: int) -> bool:
    """Return whether weights should stay packed on this device.

    GPUs compute on packed weights. A CPU does that at a hundredth of its speed, so there weights are unpacked once, if
    that takes at most half of the free memory.

    Args:
        float32_bytes: How much memory the weights would take unpacked.
    """
    return setup().kind != "cpu" or float32_bytes > free_memory() / 2


def free_memory() -> int:
    """Return how many more bytes this process can take on its device; before `setup`, on the CPU."""
    free = machine.available_memory()
    if _device is None or _device.kind == "cpu":
        return free
    import mlx.core as mx

    left = max(0, _device.memory_limit - int(mx.get_active_memory()))
    # A Mac's GPU uses the memory that all share. What mlx has cached is free for mlx to use again.
    return left if _device.kind == "cuda" else min(left, free + int(mx.get_cache_memory()))


def held_memory() -> int:
    """Return how many bytes this process holds on its device now."""
    if setup().kind == "cpu":
        return machine.resident_memory()
    import mlx.core as mx

    return int(mx.get_active_memory())


def peak_memory() -> int:
    """Return the most bytes held since `reset_peak_memory`.

    On CUDA these are the GPU's bytes, as mlx counts them. Elsewhere they are the whole process's, with weights and
    Python, and at least what mlx counts. macOS has no peak that can be reset, so there it is the larger of mlx's peak
    and what is held now.
    """
    mx = sys.modules.get("mlx.core")
    counted = int(mx.get_peak_memory()) if mx else 0
    on_cuda = _device is not None and _device.kind == "cuda"
    return counted if on_cuda else max(counted, machine.resident_peak())


def reset_peak_memory() -> None:
    """Start to count `peak_memory` again."""
    mx = sys.modules.get("mlx.core")
    if mx is not None:
        mx.reset_peak_memory()
    machine.reset_resident_peak()
