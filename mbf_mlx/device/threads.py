"""The same work on many layers, on all cores."""

from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, nullcontext
from typing import Any, TypeVar

from mbf_mlx.device.machine import cpu_count

Item = TypeVar("Item")
Result = TypeVar("Result")


def side_by_side(function: Callable[[Item], Result], items: Iterable[Item], *, products: bool = True) -> list[Result]:
    """Return what `function` makes of every item, in order: one thread a core, and NumPy's BLAS has one in each.

    Left to itself OpenBLAS takes all cores for every matrix. Those of LoRA are too thin for that: QR of 16 x 4096 took
    10 ms instead of 1.2 on two cores, and over 60 where another program wanted them, too.

    Args:
        function: Works in NumPy, which lets other threads go on meanwhile.
        items: One call each.
        products: Whether it multiplies; where it only copies and compares, BLAS is left alone, which takes less time.
    """
    with one_thread_each() if products else nullcontext(), ThreadPoolExecutor(cpu_count()) as pool:
        return list(pool.map(function, items))


def one_thread_each() -> AbstractContextManager[Any]:
    """Return a context in which NumPy's BLAS has one thread for each thread of ours."""
    from threadpoolctl import threadpool_limits

    return threadpool_limits(1, "blas")
