"""The device, the BLAS and the memory that this process computes with."""

import itertools
import os
import re
import subprocess
import sys

import psutil
import pytest

from mbf_mlx.device import backend, blas, machine
from mbf_mlx.errors import InputError, MissingPackageError
from tests.conftest import ROOT


def python(code, **environment):
    """Run code in a fresh interpreter and return what it printed; only there can a BLAS be chosen anew."""
    done = subprocess.run(
        [sys.executable, "-c", code], env={**os.environ, **environment}, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_setup_says_where_it_computes_and_why(mx):
    device = backend.setup()
    assert device.kind in ("cpu", "metal", "cuda")
    assert device.name and device.threads >= 1
    assert len(device.reasons) == 2 and all(device.reasons)
    assert 0 < device.memory_limit <= 0.8 * device.memory_bytes
    assert mx.default_device() == (mx.cpu if device.kind == "cpu" else mx.gpu)


def test_a_cpu_computes_in_float32_and_a_gpu_in_the_models_own_dtype(mx):
    assert python("from mbf_mlx.device import backend; print(backend.setup('cpu').dtype)") == "float32"
    if backend.setup().kind != "cpu":
        assert backend.setup().dtype is None


def test_setup_keeps_its_first_answer(mx):
    assert backend.setup() is backend.setup()


def test_the_device_can_be_asked_for_by_argument_and_by_environment(mx):
    code = "from mbf_mlx.device import backend; print(backend.setup().kind, backend.setup().reasons[0])"
    assert python(code, MBF_DEVICE="cpu") == "cpu CPU: you asked for it"


def test_a_macs_gpu_has_limits_below_what_the_mac_recommends(mx):
    if backend.setup().kind != "metal":
        pytest.skip("not run: this machine has no Metal")
    recommended = mx.device_info()["max_recommended_working_set_size"]
    cache, limit = mx.set_cache_limit(0), mx.get_memory_limit()
    mx.set_cache_limit(cache)
    assert 0 < cache < limit < recommended
    wired = mx.set_wired_limit(0)
    assert wired == 0, "wired memory cannot be taken back by whom else needs it"


def test_setup_names_a_device_that_nobody_knows():
    with pytest.raises(InputError, match=r"device: expected one of auto, cpu, gpu, metal, cuda, got 'tpu'"):
        backend.setup("tpu")


def test_setup_names_what_this_machine_has_instead(mx):
    other = "metal" if backend.setup().kind != "metal" else "cuda"
    with pytest.raises(InputError, match=rf"expected one that mlx has on this machine \(cpu.*\), got '{other}'"):
        backend.setup(other)
    assert backend.setup().kind != other


def test_without_mlx_the_message_names_the_extra_for_this_platform():
    code = """
import sys
class Blocked:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] == "mlx": raise ImportError(name)
sys.meta_path.insert(0, Blocked())
from mbf_mlx.device import backend
from mbf_mlx.errors import MissingPackageError
try: backend.setup()
except MissingPackageError as error: print(error)
"""
    message = python(code)
    assert re.fullmatch(r"this needs mlx( and mlx-lm)?, which is not installed here; .*", message)
    assert message.endswith(backend.install_hint())
    assert issubclass(MissingPackageError, InputError)


def test_an_mlx_that_does_not_load_is_named_with_the_reason(tmp_path):
    (tmp_path / "mlx").mkdir()
    (tmp_path / "mlx" / "core.py").write_text("raise ImportError('libmlx.so: cannot open shared object file')")
    (tmp_path / "mlx_lm.py").write_text("")
    code = """
from mbf_mlx.device import backend
try: backend.setup()
except backend.MissingPackageError as error: print(error)
"""
    message = python(code, PYTHONPATH=os.pathsep.join([str(tmp_path), *sys.path]))
    assert message.startswith("mlx does not load: libmlx.so: cannot open shared object file; ")


@pytest.mark.skipif(sys.platform != "linux", reason="other systems bring a BLAS of their own")
def test_openblas_is_loaded_and_mlx_uses_it(mx):
    if not list(blas._find_openblas()):
        pytest.skip(f"no OpenBLAS on this machine: pip install {blas.PACKAGE}")
    code = """
import time
{setup}
import mlx.core as mx
a = mx.random.normal((768, 768)); mx.eval(a @ a)
times = []
for _ in range(3):
    start = time.perf_counter(); mx.eval(a @ a); times.append(time.perf_counter() - start)
print(min(times))
"""
    ours = float(
        python(code.format(setup="from mbf_mlx.device import backend; assert backend.setup('cpu').blas != 'reference'"))
    )
    plain = float(python(code.format(setup="")))
    # 60 times on an idle machine; a busy one still tells one from the other.
    assert ours < plain / 3


@pytest.mark.skipif(sys.platform != "linux", reason="other systems bring a BLAS of their own")
def test_the_number_of_threads_can_be_set_and_is_said():
    if not list(blas._find_openblas()):
        pytest.skip(f"no OpenBLAS on this machine: pip install {blas.PACKAGE}")
    code = "from mbf_mlx.device.blas import load_blas; b = load_blas(); print(b.threads, b.fast, b.reason)"
    threads, fast, *reason = python(code, OPENBLAS_NUM_THREADS="1").split(" ")
    assert (threads, fast) == ("1", "True")
    assert "with 1 threads, from" in " ".join(reason)
    environment = {name: "" for name in blas.THREAD_VARIABLES}
    assert python(code, **environment).startswith(f"{machine.cpu_count()} True")


def test_an_openblas_for_another_processor_is_not_loaded(monkeypatch):
    """The package's is built for AVX-512 alone: on an older CPU its first product would end the process."""
    monkeypatch.setattr(blas, "cpu_flags", lambda: frozenset({"avx2"}))
    if not any(blas._lacking(path) for path, origin in blas._find_openblas() if blas.PACKAGE in origin):
        pytest.skip(f"no {blas.PACKAGE} that is for one processor alone")
    code = """
from mbf_mlx.device import blas
blas.cpu_flags, blas.ctypes.util.find_library = lambda: {"avx2"}, lambda name: None
print(blas.load_blas().reason)
"""
    assert "needs a CPU with AVX-512; install the system's OpenBLAS" in python(code)


def test_without_a_blas_all_works_and_the_reason_is_said():
    if sys.platform != "linux":
        pytest.skip("other systems bring a BLAS of their own")
    code = """
from mbf_mlx.device import blas
blas.PACKAGE, blas.ctypes.util.find_library = "no-such-package", lambda name: None
print(blas.load_blas().reason)
"""
    assert python(code) == (
        "mlx's own reference BLAS, slow: pip install no-such-package brings one that is some 60 times faster"
    )


@pytest.mark.skipif(sys.platform != "linux", reason="other systems bring a BLAS of their own")
def test_an_mlx_that_was_there_before_us_is_said(mx):
    code = "import mlx.core; from mbf_mlx.device import backend; print(backend.setup('cpu').reasons[1])"
    assert python(code).endswith("mlx was imported before mbf_mlx could load a faster one")


def test_weights_stay_packed_where_unpacked_ones_would_take_half_of_the_free_memory(mx):
    if backend.setup().kind != "cpu":
        assert backend.keep_quantized(1)
        return
    assert not backend.keep_quantized(10 * 2**20)
    assert backend.keep_quantized(backend.free_memory())
    # A tenth on either side of the half, for what other processes do between two looks.
    assert not backend.keep_quantized(int(0.4 * backend.free_memory()))
    assert backend.keep_quantized(int(0.6 * backend.free_memory()))


def test_peak_memory_sees_what_was_held_and_forgets_it_when_reset():
    """In a process of its own: one that has kept freed memory would give it out again."""
    code = """
import sys
import numpy as np
from mbf_mlx.device import backend
backend.reset_peak_memory()
block = np.ones(30_000_000)  # 240 MB
held = backend.peak_memory()
assert held >= block.nbytes
del block
# The kernel's count may lag behind by some pages; macOS has no peak of a process that can be reset.
assert backend.peak_memory() > 0.99 * held or sys.platform == "darwin"
backend.reset_peak_memory()
assert backend.peak_memory() < held - 200_000_000
"""
    python(code)


def test_peak_memory_is_at_least_what_mlx_counts(mx):
    backend.reset_peak_memory()
    mx.eval(mx.ones((1000, 10_000)))
    assert backend.peak_memory() >= mx.get_peak_memory() >= 40_000_000


def test_memory_is_the_machines_or_the_part_that_a_container_may_take():
    assert 0 < machine.available_memory() <= machine.total_memory() <= psutil.virtual_memory().total


@pytest.fixture
def control_groups(tmp_path, monkeypatch):
    """`control_groups({"folder": {"file": "text"}})`: control groups, outer to inner, that this process is in."""

    def make(tree):
        for folder, files in tree.items():
            (tmp_path / folder).mkdir(parents=True, exist_ok=True)
            for name, text in files.items():
                (tmp_path / folder / name).write_text(text)
        folders = [tmp_path / folder for folder in reversed(tree)]
        monkeypatch.setattr(machine, "_control_groups", lambda controller: [] if controller else folders)

    return make


def test_a_containers_memory_limit_counts_and_cached_files_are_free(control_groups):
    gigabyte = 1_000_000_000
    stat = f"anon 5\ninactive_file {gigabyte // 2}\n"
    control_groups(
        {
            ".": {"memory.max": "max", "memory.current": "0", "memory.stat": "anon 0\n"},
            "box": {"memory.max": str(gigabyte), "memory.current": str(gigabyte * 3 // 4), "memory.stat": stat},
        }
    )
    assert machine.total_memory() == gigabyte
    assert machine.available_memory() == gigabyte * 3 // 4


def test_a_containers_share_of_the_processors_counts(control_groups):
    control_groups({".": {"cpu.max": "max 100000"}, "box": {"cpu.max": "150000 100000"}})
    assert machine.cpu_count() == 1
    control_groups({".": {"cpu.max": "max 100000"}, "box": {"cpu.max": "max 100000"}})
    assert machine.cpu_count() >= 1


def test_the_control_groups_of_this_process_lead_up_to_their_root():
    for controller in ("", "memory", "cpu"):
        folders = machine._control_groups(controller)
        assert all(outer in inner.parents for inner, outer in itertools.pairwise(folders))


@pytest.mark.slow
def test_the_script_for_an_nvidia_gpu_runs_with_the_cpu_in_its_place(tiny_llama, write_jsonl, tmp_path):
    """benchmarks/cuda.py waits for somebody with a GPU; until then the CPU held against itself keeps it running."""
    rows = [{"prompt": f"yes or no, {i}?", "completion": "yes" if i % 2 else "no"} for i in range(12)]
    write_jsonl("task/test.jsonl", rows[:4])
    task, script = write_jsonl("task/train.jsonl", rows).parent, ROOT / "benchmarks" / "cuda.py"
    words = ["--device", "cpu", "--model", tiny_llama, "--task", task, "--steps", 3, "--timed", 1, "--peers", "mlx_lm"]
    done = subprocess.run([sys.executable, script, *map(str, words)], capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.count("- agrees: ") == 4 and "largest relative difference 0.0e+00" in done.stdout
    assert re.search(r"\| mbf-mlx \| [\d.]+ \| \d+ \|", done.stdout)
    assert re.search(r"\| mlx_lm.lora \| [\d.]+ \| \d+ \|", done.stdout)
