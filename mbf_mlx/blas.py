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
from dataclasses import dataclass
from pathlib import Path

from mbf_mlx.machine import cpu_count

PACKAGE = "cmeel-openblas"
FORTRAN = "libgfortran.so.5"  # what that package's library asks the system for
THREAD_VARIABLES = ("OPENBLAS_NUM_THREADS", "GOTO_NUM_THREADS", "OMP_NUM_THREADS")  # in OpenBLAS's own order
REFERENCE = "mlx's own reference BLAS"


@dataclass(frozen=True)
class Blas:
    """What multiplies matrices on the CPU."""

    name: str
    threads: int  # with another number of them the last bits of a sum differ
    fast: bool
    reason: str  # why this one, a sentence for `mbf doctor`


_loaded: Blas | None = None


def load_blas() -> Blas:
    """Load the best BLAS of this machine, once, and return it; the same answer again when it is called again.

    Its threads are $OPENBLAS_NUM_THREADS where that is set, else the CPUs that this process may use. Nothing is raised:
    without a real BLAS all works, slowly, and the reason says so.
    """
    global _loaded
    if _loaded is None:
        _loaded = _load()
    return _loaded


def _load() -> Blas:
    if sys.platform == "darwin":
        return Blas("Accelerate", cpu_count(), True, "Accelerate, part of macOS")
    if "mlx.core" in sys.modules:
        return _reference("mlx was imported before mbf_mlx could load a faster one")
    found = _find_openblas()
    if found is None:
        return _reference(f"pip install {PACKAGE} brings one that is some 60 times faster")
    path, origin = found
    if not any(os.environ.get(name) for name in THREAD_VARIABLES):
        # OpenBLAS would count the machine's cores, not those that a container may use.
        os.environ["OPENBLAS_NUM_THREADS"] = str(cpu_count())
    # After a product its threads would spin for 2^26 clock ticks, on the cores that what follows the product needs:
    # that cost 6 % of a training step.
    os.environ.setdefault("OPENBLAS_THREAD_TIMEOUT", "16")
    try:
        _load_fortran()
        library = ctypes.CDLL(path, mode=ctypes.RTLD_GLOBAL)
        library.openblas_get_config.restype = ctypes.c_char_p
        name = " ".join(library.openblas_get_config().decode().split()[:2])
        threads = int(library.openblas_get_num_threads())
    except (OSError, AttributeError) as error:
        return _reference(f"{origin} does not load: {error}")
    return Blas(name, threads, True, f"{name} with {threads} threads, from {origin}")


def _reference(why: str) -> Blas:
    return Blas(REFERENCE, 1, False, f"{REFERENCE}, slow: {why}")


def _find_openblas() -> tuple[str, str] | None:
    """Return the path of libopenblas and where it comes from, or None."""
    for name, path in _files_of(PACKAGE).items():
        if name == "libopenblas.so.0":
            return path, f"the package {PACKAGE}"
    system = ctypes.util.find_library("openblas")
    return (system, "the system") if system else None


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
