import ctypes
import resource
import sys

import pytest

from mbf_mlx.machine import freed_memory_kept

SIZE = 20 * 2**20
PAGES = SIZE // resource.getpagesize()


@pytest.mark.skipif(sys.platform != "linux", reason="of the Linux C library")
def test_memory_that_is_freed_is_taken_again_without_page_faults():
    libc = ctypes.CDLL(None)
    libc.malloc.restype = ctypes.c_void_p
    libc.free.argtypes = [ctypes.c_void_p]

    def faults() -> int:
        """Return the page faults of taking, writing and freeing some memory."""
        before = resource.getrusage(resource.RUSAGE_THREAD).ru_minflt
        place = libc.malloc(SIZE)
        ctypes.memset(place, 1, SIZE)
        libc.free(place)
        return resource.getrusage(resource.RUSAGE_THREAD).ru_minflt - before

    with freed_memory_kept():
        assert faults() > PAGES // 2  # it comes from the system first
        assert faults() < PAGES // 10
    with freed_memory_kept():
        assert faults() > PAGES // 2  # in between it went back
