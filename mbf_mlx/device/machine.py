"""What this machine has: processors and memory, and how much of them this process may use.

Sizes are bytes. A process may be limited by its CPU affinity and by its control groups (versions 1 and 2), which is how
the kernel implements containers. This file does not know mlx; backend.py decides what mlx uses.
"""

import ctypes
import os
import platform
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import psutil

NO_LIMIT = 1 << 60  # version 1 of control groups says "no limit" with a number near 2^63
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3  # of malloc.h
_MOST_MMAP_THRESHOLD = 32 * 2**20  # larger arrays always come from the system, and go back when they are freed
_MEMORY_FILES = {"": ("memory.max", "memory.current"), "memory": ("memory.limit_in_bytes", "memory.usage_in_bytes")}


def cpu_count() -> int:
    """Return how many CPUs this process may use."""
    # Physical cores: two threads of one core do not make a matrix product faster.
    count = psutil.cpu_count(logical=False) or os.cpu_count() or 1
    if hasattr(os, "sched_getaffinity"):
        count = min(count, len(os.sched_getaffinity(0)))
    return min([count, *_cpu_quotas()])


def total_memory() -> int:
    """Return the machine's memory, or the part of it that this process's control groups allow."""
    group = _tightest_group()
    total = int(psutil.virtual_memory().total)
    return total if group is None else min(total, group[0])


def available_memory() -> int:
    """Return how much more memory this process can take without pushing other processes out."""
    group = _tightest_group()
    free = int(psutil.virtual_memory().available)
    return free if group is None else min(free, max(0, group[0] - group[1]))


def resident_memory() -> int:
    """Return how much memory this process holds now."""
    return int(psutil.Process().memory_info().rss)


def resident_peak() -> int:
    """Return the most memory that this process held since `reset_resident_peak`; not on Linux: what it holds now."""
    try:
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    except OSError:
        pass
    return resident_memory()


def reset_resident_peak() -> None:
    """Start to count `resident_peak` again, if the system allows it."""
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        pass  # not Linux, or not allowed: then the peak is counted from the start of the process


@contextmanager
def freed_memory_kept() -> Iterator[None]:
    """Inside this context the process keeps the memory that it frees; afterwards free memory goes back to the system.

    By default glibc returns the large arrays of each block to the system and gets them back page by page, zeroed. That
    makes 160,000 page faults and takes a tenth of a training step of SmolLM2. Without glibc this does nothing.
    """
    try:
        libc = ctypes.CDLL(None)
        mallopt, malloc_trim = libc.mallopt, libc.malloc_trim
    except (OSError, AttributeError):
        yield
        return
    mallopt(_M_MMAP_THRESHOLD, _MOST_MMAP_THRESHOLD)
    mallopt(_M_TRIM_THRESHOLD, 2**31 - 1)
    try:
        yield
    finally:
        mallopt(_M_TRIM_THRESHOLD, 2 * _MOST_MMAP_THRESHOLD)  # the value that glibc itself arrives at
        malloc_trim(0)


def processor_name() -> str:
    """Return the maker's name of the CPU."""
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


def cpu_flags() -> frozenset[str]:
    """Return the instruction sets that Linux lists for an x86 CPU; an empty set elsewhere."""
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("flags"):
                return frozenset(line.split(":", 1)[1].split())
    except OSError:
        pass
    return frozenset()


def system_name() -> str:
    """Return the operating system with its version: "macOS 15.3 arm64", "Linux 6.1.0 x86_64"."""
    if sys.platform == "darwin":
        return f"macOS {platform.mac_ver()[0]} {platform.machine()}"
    return f"{platform.system()} {platform.release()} {platform.machine()}"


def has_nvidia() -> bool:
    """Return whether the driver of an NVIDIA GPU is loaded."""
    return Path("/proc/driver/nvidia/version").exists() or Path("/dev/nvidiactl").exists()


def _cpu_quotas() -> Iterator[int]:
    """Yield how many whole CPUs each control group of this process allows, at least 1."""
    for folder in _control_groups(""):
        try:
            quota, period = (folder / "cpu.max").read_text().split()
            yield max(1, int(quota) // int(period))
        except (OSError, ValueError):
            continue  # no such file, or "max"
    for folder in _control_groups("cpu"):
        try:
            quota_us = int((folder / "cpu.cfs_quota_us").read_text())
            period_us = int((folder / "cpu.cfs_period_us").read_text())
        except (OSError, ValueError):
            continue
        if quota_us > 0:
            yield max(1, quota_us // period_us)


def _tightest_group() -> tuple[int, int] | None:
    """Return (limit, used) of the control group that leaves least, or None if no group has a limit."""
    found = []
    for controller, (limit_name, used_name) in _MEMORY_FILES.items():
        for folder in _control_groups(controller):
            try:
                limit, used = int((folder / limit_name).read_text()), int((folder / used_name).read_text())
                statistics = dict(line.split() for line in (folder / "memory.stat").read_text().splitlines())
            except (OSError, ValueError):
                continue  # no such file, or "max"
            # Cached files count as used, but the kernel drops them when memory is needed.
            used -= int(statistics.get("total_inactive_file") or statistics.get("inactive_file") or 0)
            if limit < NO_LIMIT:
                found.append((limit, used))
    return min(found, key=lambda pair: pair[0] - pair[1], default=None)


def _control_groups(controller: str) -> list[Path]:
    """Return the folders of this process's control groups, inner to outer; "" means version 2, which has one tree."""
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
