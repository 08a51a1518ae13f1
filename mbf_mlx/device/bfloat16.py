"""Matrix products in bfloat16 on a CPU, through Intel's MKL, where the extra `[bf16]` has installed it.

mlx and OpenBLAS multiply in float32 on a CPU. Many x86 processors multiply bfloat16 numbers faster (AMX, AVX512-BF16):
factors of 16 bits, sums in float32. MKL offers that product, and a layout in which a matrix is packed once for many
products. Whether it is faster here is found out by a short trial.

Bfloat16 numbers are held as uint16: the upper 16 bits of a float32. This file does not import mlx.
"""

import ctypes
import functools
import importlib.metadata
import mmap
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from mbf_mlx.device.blas import files_of
from mbf_mlx.device.machine import cpu_flags

PACKAGE, EXTRA = "mkl", "bf16"
UNITS = ("amx_bf16", "avx512_bf16")  # Linux's names of the units of an x86 CPU that multiply bfloat16 numbers
_RUNTIME = "libmkl_rt.so"
_SEQUENTIAL = 1  # MKL's number of the layer that starts no threads: ours run side by side
_ROWS, _PLAIN, _TURNED, _PACKED, _RIGHT = 101, 111, 112, 151, 162  # of CBLAS: layout, transposes, the second matrix
_ALIGNMENT = 64  # bytes
TRIAL_SHAPE = (256, 1536, 576)  # rows, outputs and inputs of the trial's product
_REPEATS = 9
MARGIN = 1.5  # bfloat16 has to be so much faster: a busy machine must not decide otherwise from run to run


class Packed:
    """A matrix W (out, in) in MKL's own layout, for many products.

    Attributes:
        shape: Its (out, in).
    """

    def __init__(self, mkl: ctypes.CDLL, weight: np.ndarray, *, turned: bool) -> None:
        """Pack bfloat16 numbers, uint16 (out, in), for x W^T, or with `turned` for d_y W."""
        weight = np.ascontiguousarray(weight)
        self.shape = weight.shape
        out, inner = weight.shape
        self._wide, self._long = (inner, out) if turned else (out, inner)
        size = mkl.cblas_gemm_bf16bf16f32_pack_get_size(_RIGHT, 1, self._wide, self._long)
        self._memory = mmap.mmap(-1, size + _ALIGNMENT)  # pages that nobody touches take no memory
        self._start = ctypes.addressof(ctypes.c_char.from_buffer(self._memory))
        self._start += -self._start % _ALIGNMENT
        order = _PLAIN if turned else _TURNED
        mkl.cblas_gemm_bf16bf16f32_pack(
            _ROWS, _RIGHT, order, 1, self._wide, self._long, _address(weight), inner, ctypes.c_void_p(self._start)
        )
        self._compute = mkl.cblas_gemm_bf16bf16f32_compute

    def multiply(self, x: np.ndarray, out_: np.ndarray, *, add: bool = False) -> None:
        """Write the product into `out_`, or add it.

        Args:
            x: Bfloat16 numbers, uint16 (T, in), or (T, out) for a turned matrix; rows stand one after another.
            out_: float32 (T, out), or (T, in) for a turned matrix; rows stand one after another.
            add: Add to `out_` instead of writing over it.
        """
        if x.shape != (len(out_), self._long) or out_.shape[1] != self._wide:
            raise ValueError(f"expected (T, {self._long}) and (T, {self._wide}), got {x.shape} and {out_.shape}")
        if not (x.flags.c_contiguous and out_.flags.c_contiguous and x.dtype == np.uint16 and out_.dtype == np.float32):
            raise ValueError(f"expected uint16 and float32, row after row, got {x.dtype} and {out_.dtype}")
        self._compute(
            _ROWS, _PLAIN, _PACKED, len(x), self._wide, self._long, ctypes.c_float(1), _address(x), self._long,
            ctypes.c_void_p(self._start), self._wide, ctypes.c_float(add), _address(out_), self._wide,
        )  # fmt: skip


@dataclass(frozen=True)
class Library:
    """A library that multiplies bfloat16 numbers."""

    name: str  # with its version
    mkl: ctypes.CDLL

    def pack(self, weight: np.ndarray, *, turned: bool = False) -> Packed:
        """Return bfloat16 numbers, uint16 (out, in), packed for x W^T, or with `turned` for d_y W."""
        return Packed(self.mkl, weight, turned=turned)


@dataclass(frozen=True)
class Trial:
    """How fast one core multiplies, in 10^9 operations a second."""

    bfloat16: float
    float32: float

    @property
    def is_faster(self) -> bool:
        """Whether bfloat16 is clearly faster, rounding of the inputs included."""
        return self.bfloat16 > MARGIN * self.float32


def library() -> Library | None:
    """Return the library, loaded; None where there is none. `reason` says why."""
    return _load()[0]


def reason() -> str:
    """Return a sentence that says what multiplies in bfloat16 here, or why nothing does."""
    return _load()[1]


def has_units() -> bool:
    """Return whether this CPU has units for bfloat16."""
    return bool(cpu_flags() & set(UNITS))


@functools.cache
def is_faster() -> bool:
    """Return whether products in bfloat16 are faster than in float32 on this CPU; found out once, in milliseconds."""
    return has_units() and library() is not None and trial().is_faster


@functools.cache
def trial() -> Trial:
    """Multiply in both precisions on one core, in turns, and return the best of each.

    Raises:
        ValueError: there is no library.
    """
    from threadpoolctl import threadpool_limits

    found = library()
    if found is None:
        raise ValueError(reason())
    rows, out, inner = TRIAL_SHAPE
    draw = np.random.default_rng(0)
    x, weight = (draw.standard_normal((count, inner), np.float32) for count in (rows, out))
    packed, product = found.pack(_upper(weight)), np.empty((rows, out), np.float32)
    halves, other = _upper(x), np.empty_like(x)

    def in_bfloat16() -> None:
        np.copyto(other, x)  # takes as long as rounding the inputs does
        packed.multiply(halves, product)

    def in_float32() -> None:
        np.matmul(x, weight.T, out=product)

    with threadpool_limits(1, "blas"):
        taken = [(_seconds(in_bfloat16), _seconds(in_float32)) for _ in range(_REPEATS)]
    operations = 2 * rows * out * inner / 1e9
    return Trial(*(operations / min(seconds) for seconds in zip(*taken, strict=True)))


def _upper(values: np.ndarray) -> np.ndarray:
    """Return the upper 16 bits of float32 numbers, uint16: bfloat16 numbers near them."""
    return (values.view(np.uint32) >> 16).astype(np.uint16)


@functools.cache
def _load() -> tuple[Library | None, str]:
    if not sys.platform.startswith("linux"):
        return None, "products in bfloat16 need Linux on an x86 CPU"
    hint = f"pip install 'mbf-mlx[{EXTRA}]' brings it"
    path = next((path for name, path in files_of(PACKAGE).items() if name.startswith(_RUNTIME)), None)
    if path is None:
        return None, f"MKL, which multiplies in bfloat16, is not installed; {hint}"
    name = f"MKL {importlib.metadata.version(PACKAGE)}"
    try:
        mkl = ctypes.CDLL(path)
        size = mkl.cblas_gemm_bf16bf16f32_pack_get_size
        size.restype = ctypes.c_size_t
        for each in (mkl.cblas_gemm_bf16bf16f32_pack, mkl.cblas_gemm_bf16bf16f32_compute):
            each.restype = None
        mkl.MKL_Set_Threading_Layer(_SEQUENTIAL)
    except (OSError, AttributeError) as error:
        return None, f"{name} does not load: {error}"
    found = Library(name, mkl)
    if not _is_right(found):
        return None, f"{name} multiplies bfloat16 numbers wrongly on this CPU"
    return found, name


def _is_right(found: Library) -> bool:
    """Return whether small products come out right, both ways."""
    draw = np.random.default_rng(0)
    weight, x, d_y = (draw.standard_normal(shape, np.float32) for shape in ((24, 40), (5, 40), (5, 24)))
    wanted = []
    for each in (weight, x, d_y):
        wanted.append((_upper(each).astype(np.uint32) << 16).view(np.float32))
    y, d_x = np.ones((5, 24), np.float32), np.empty((5, 40), np.float32)
    found.pack(_upper(weight)).multiply(_upper(x), y, add=True)
    found.pack(_upper(weight), turned=True).multiply(_upper(d_y), d_x)
    right = np.allclose(y, 1 + wanted[1] @ wanted[0].T, atol=1e-3)
    return bool(right and np.allclose(d_x, wanted[2] @ wanted[0], atol=1e-3))


def _address(array: np.ndarray) -> ctypes.c_void_p:
    return ctypes.c_void_p(array.ctypes.data)


def _seconds(work: Callable[[], Any]) -> float:
    started = time.perf_counter()
    work()
    return time.perf_counter() - started
