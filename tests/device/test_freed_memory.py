import subprocess
import sys

import pytest

# Page faults of taking, writing and freeing some memory: the first time, the second, and in another such block.
CODE = """
import ctypes, resource
from mbf_mlx.device.machine import freed_memory_kept

SIZE = 20 * 2**20
libc = ctypes.CDLL(None)
libc.malloc.restype = ctypes.c_void_p
libc.free.argtypes = [ctypes.c_void_p]

def faults():
    before = resource.getrusage(resource.RUSAGE_THREAD).ru_minflt
    place = libc.malloc(SIZE)
    ctypes.memset(place, 1, SIZE)
    libc.free(place)
    return (resource.getrusage(resource.RUSAGE_THREAD).ru_minflt - before) * resource.getpagesize() / SIZE

with freed_memory_kept():
    first, second = faults(), faults()
with freed_memory_kept():
    print(first, second, faults())
"""


@pytest.mark.skipif(sys.platform != "linux", reason="of the Linux C library")
def test_memory_that_is_freed_is_taken_again_without_page_faults():
    done = subprocess.run([sys.executable, "-c", CODE], capture_output=True, text=True, check=True)
    first, second, later = map(float, done.stdout.split())
    assert first > 0.5, "it comes from the system"
    assert second < 0.1
    assert later > 0.5, "in between it went back"
