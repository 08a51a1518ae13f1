"""A fast BLAS for mlx's CPU kernels, loaded before mlx.

mlx's Linux wheel comes with the reference BLAS, which makes some 4 GFLOP/s where OpenBLAS makes 250. When mlx's library
is loaded, it looks up the functions of BLAS and LAPACK in the libraries that the process has made global by then. So
the order matters: first `load_blas()`, then the first `import mlx.core`.
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
FORTRAN = "libgfortran.so.5"  # the system library that this package's library needs
THREAD_VARIABLES = ("OPENBLAS_NUM_THREADS", "GOTO_NUM_THREADS", "OMP_NUM_THREADS")  # in OpenBLAS's own order
AVX512 = ("SKYLAKEX", "COOPERLAKE", "SAPPHIRERAPIDS")  # OpenBLAS's names of processors whose code needs it
REFERENCE = "mlx's own reference BLAS"


@dataclass(frozen=True)
class Blas:
    """The library that multiplies matrices on the CPU."""

    name: str
    threads: int  # how many it uses; with another number the last bits of a sum differ
    fast: bool
    reason: str  # why it was chosen, a sentence for `mbf doctor`


_loaded: Blas | None = None
_openblas: ctypes.CDLL | None = None


def load_blas() -> Blas:
    """Load the best BLAS of this machine, once, and return it. Later calls return the same answer.

    It uses $OPENBLAS_NUM_THREADS threads, or one for each CPU that this process may use. This never raises: without a
    fast BLAS everything works, slowly, and `reason` says why.
    """
    global _loaded
    if _loaded is None:
        _loaded = _load()
    return _loaded


@contextmanager
def one_thread() -> Iterator[None]:
    """Inside this context a product uses one thread, so that several can run side by side. Not for nesting."""
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
    # After a product its threads would spin for 2^26 clock ticks, on cores that the next operation needs. That cost 6 %
    # of a training step.
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
    for name, path in files_of(PACKAGE).items():
        if name == "libopenblas.so.0":
            yield path, f"the package {PACKAGE}"
    if system := ctypes.util.find_library("openblas"):
        yield system, "the system"


def _lacking(path: str) -> str | None:
    """Return what a libopenblas needs that this CPU does not have, or None if it runs here.

    A library built for several processors picks its code when it is loaded. A library built for one kind ends the
    process with an illegal instruction on any other.
    """
    library = ctypes.CDLL(path)
    library.openblas_get_config.restype = ctypes.c_char_p
    config = library.openblas_get_config().decode().upper()
    flags = cpu_flags()
    if "DYNAMIC_ARCH" not in config and any(kind in config for kind in AVX512) and flags and "avx512f" not in flags:
        return "a CPU with AVX-512"
    return None


def _load_fortran() -> None:
    """Load the Fortran runtime that OpenBLAS needs, if the system has none.

    mlx's wheel contains one, but under another name, by which the loader does not find it. A copy in memory gets the
    plain name; it disappears with the process.
    """
    try:
        ctypes.CDLL(FORTRAN)
        return
    except OSError:
        pass
    files = files_of("mlx-cpu")
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


def files_of(package: str) -> dict[str, str]:
    """Return name -> path of the files that an installed package lists and that exist."""
    try:
        files = importlib.metadata.files(package) or []
    except importlib.metadata.PackageNotFoundError:
        return {}
    return {file.name: str(file.locate()) for file in files if Path(str(file.locate())).is_file()}
