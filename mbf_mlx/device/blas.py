"""A real BLAS for mlx's CPU kernels, loaded before mlx is.

mlx's Linux wheel brings the reference BLAS: some 4 GFLOP/s where OpenBLAS makes 250. Its library leaves the names of
BLAS and LAPACK open until it is loaded, and takes them from whatever the process has made global by then. So the order
is all: `load_blas()`, then the first `import mlx.core`.
"""

import ctypes
import ctypes.util
import importlib.metadata
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from mbf_mlx.device.machine import cpu_count, cpu_flags

PACKAGE = "cmeel-openblas"
FORTRAN = "libgfortran.so.5"  # what that package's library asks the system for
THREAD_VARIABLES = ("OPENBLAS_NUM_THREADS", "GOTO_NUM_THREADS", "OMP_NUM_THREADS")  # in OpenBLAS's own order
AVX512 = ("SKYLAKEX", "COOPERLAKE", "SAPPHIRERAPIDS")  # OpenBLAS's names of processors whose code needs it
REFERENCE = "mlx's own reference BLAS"


@dataclass(frozen=True)
class Blas:
    """What multiplies matrices on the CPU."""

    name: str
    threads: int  # with another number of them the last bits of a sum differ
    fast: bool
    reason: str  # why this one, a sentence for `mbf doctor`


_loaded: Blas | None = None
_openblas: ctypes.CDLL | None = None


def load_blas() -> Blas:
    """Load the best BLAS of this machine, once, and return it; the same answer again when it is called again.

    Its threads are $OPENBLAS_NUM_THREADS where that is set, else the CPUs that this process may use. Nothing is raised:
    without a real BLAS all works, slowly, and the reason says so.
    """
    global _loaded
    if _loaded is None:
        _loaded = _load()
    return _loaded


@contextmanager
def one_thread() -> Iterator[None]:
    """Let a product take one thread, so that several run side by side; of one user at a time."""
    if _openblas is None:
        yield
        return
    before = _openblas.openblas_get_num_threads()
    _openblas.openblas_set_num_threads(1)
    try:
        yield
    finally:
        _openblas.openblas_set_num_threads(before)


def _load() -> Blas:
    global _openblas
    if sys.platform == "darwin":
        return Blas("Accelerate", cpu_count(), True, "Accelerate, part of macOS")
    if "mlx.core" in sys.modules:
        return _reference("mlx was imported before mbf_mlx could load a faster one")
    if not any(os.environ.get(name) for name in THREAD_VARIABLES):
        # OpenBLAS would count the machine's cores, not those that a container may use.
        os.environ["OPENBLAS_NUM_THREADS"] = str(cpu_count())
    # After a product its threads would spin for 2^26 clock ticks, on the cores that what follows the product needs:
    # that cost 6 % of a training step.
    os.environ.setdefault("OPENBLAS_THREAD_TIMEOUT", "16")
    why = f"pip install {PACKAGE} brings one that is some 60 times faster"
    for path, origin in _find_openblas():
        try:
            _load_fortran()
            if lacking := _lacking(path):
                why = f"{origin} needs {lacking}; install the system's OpenBLAS (Debian and Ubuntu: libopenblas0)"
                continue
            library = ctypes.CDLL(path, mode=ctypes.RTLD_GLOBAL)
            library.openblas_get_config.restype = ctypes.c_char_p
            name = " ".join(library.openblas_get_config().decode().split()[:2])
            threads = int(library.openblas_get_num_threads())
        except (OSError, AttributeError) as error:
            why = f"{origin} does not load: {error}"
            continue
        _openblas = library
        return Blas(name, threads, True, f"{name} with {threads} threads, from {origin}")
    return _reference(why)


def _reference(why: str) -> Blas:
    return Blas(REFERENCE, 1, False, f"{REFERENCE}, slow: {why}")


def _find_openblas() -> Iterator[tuple[str, str]]:
    """Yield the path of each libopenblas and where it comes from."""
    for name, path in _files_of(PACKAGE).items():
        if name == "libopenblas.so.0":
            yield path, f"the package {PACKAGE}"
    if system := ctypes.util.find_library("openblas"):
        yield system, "the system"


def _lacking(path: str) -> str | None:
    """Return what a libopenblas needs and this CPU has not; None where it runs here.

    One that was built for several processors picks its code when it is loaded. One built for a single kind ends the
    process with an illegal instruction on another.
    """
    library = ctypes.CDLL(path)
    library.openblas_get_config.restype = ctypes.c_char_p
    config = library.openblas_get_config().decode().upper()
    flags = cpu_flags()
    if "DYNAMIC_ARCH" not in config and any(kind in config for kind in AVX512) and flags and "avx512f" not in flags:
        return "a CPU with AVX-512"
    return None


def _load_fortran() -> None:
    """Load the Fortran runtime that OpenBLAS asks for, where the system has none.

    mlx's wheel brings one under a name of its own, and by that name the loader does not find it for others. A copy in
    memory that bears the plain name serves them; it is gone with the process.
    """
    try:
        ctypes.CDLL(FORTRAN)
        return
    except OSError:
        pass
    files = _files_of("mlx-cpu")
    for name in sorted(files, reverse=True):  # libquadmath, which the runtime itself needs, before libgfortran
        if name.startswith("libquadmath"):
            ctypes.CDLL(files[name])
        if name.startswith("libgfortran"):
            own, plain = name.encode() + b"\0", FORTRAN.encode() + b"\0"
            content = Path(files[name]).read_bytes().replace(own, plain.ljust(len(own), b"\0"))
            with open(os.memfd_create(FORTRAN), "wb") as copy:
                copy.write(content)
                copy.flush()
                ctypes.CDLL(f"/proc/self/fd/{copy.fileno()}")


def _files_of(package: str) -> dict[str, str]:
    """Return name -> path of the files that an installed package says it has, those that are there."""
    try:
        files = importlib.metadata.files(package) or []
    except importlib.metadata.PackageNotFoundError:
        return {}
    return {file.name: str(file.locate()) for file in files if Path(str(file.locate())).is_file()}
