"""Fixtures for all tests, and the one table of tolerances."""

import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
from pathlib import Path

# Set before mlx is imported: no TF32 in matrix products, or float32 would have a mantissa of 10 bits.
os.environ["MLX_ENABLE_TF32"] = "0"
# No test uses a hub.
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
if "PYTEST_XDIST_WORKER" in os.environ:
    # Two workers with two BLAS threads each are several times slower than with one thread each.
    os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")

import pytest
from filelock import FileLock

from mbf_mlx.base import first_try
from mbf_mlx.device.blas import load_blas
from tests.support.fast import is_fast, no_processes

load_blas()  # before any test imports mlx
# In the background of a script, or under nohup, Python ignores signals, and processes that tests start would, too.
for _signal, _default in ((signal.SIGINT, signal.default_int_handler), (signal.SIGHUP, signal.SIG_DFL)):
    if signal.getsignal(_signal) == signal.SIG_IGN:
        signal.signal(_signal, _default)
ROOT = Path(__file__).resolve().parents[1]


def pytest_collection_modifyitems(items):
    """Mark the tests that `make test-fast` runs."""
    for item in items:
        if is_fast(item):
            item.add_marker("fast")


@pytest.fixture(autouse=True)
def _no_first_try(request, monkeypatch):
    """Tests of this process make hundreds of tokenizers of their own: only its own test tries them in a process."""
    if request.path.name != "test_first_try.py":
        monkeypatch.setattr(first_try, "try_tokenizer", lambda folder: None)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call(item):
    """Make a test fail that is marked as fast and starts a process."""
    if not item.get_closest_marker("fast"):
        return (yield)
    with no_processes(item.nodeid):
        return (yield)


# name -> (relative tolerance, absolute tolerance), as numpy.testing takes them
TOLERANCES = {
    # golden values have 60 digits; what is left is QR and some hundred roundings on matrices below 100 x 100
    "float64": (1e-12, 1e-12),
    # the same in float32: some hundred roundings of 6e-8, and each library's own order of summation
    "float32": (1e-5, 2e-6),
    # two forward passes of one model in float32 with different orders of summation
    "logits": (1e-5, 1e-5),
    "loss": (1e-5, 1e-6),
    # gradients sum over all tokens of a batch and pass through every layer twice
    "gradients": (1e-4, 1e-6),
    # a mantissa of 8 bits
    "bfloat16": (1e-2, 1e-2),
}


@pytest.fixture(scope="session")
def tolerance():
    """`tolerance("float32")` gives the keyword arguments of numpy.testing.assert_allclose."""
    return lambda name: dict(zip(("rtol", "atol"), TOLERANCES[name], strict=True))


def import_mlx():
    """Return mlx.core, or skip: a plain install on Linux has none."""
    return pytest.importorskip("mlx.core", reason="mlx is not installed: pip install 'mbf-mlx[cpu]'")


@pytest.fixture
def mx():
    """mlx.core, for tests that need no other array library."""
    return import_mlx()


@pytest.fixture
def compiler():
    """Skip the test if mlx cannot compile: on a CPU it calls g++."""
    mx = import_mlx()
    if mx.default_device() == mx.Device(mx.cpu) and not shutil.which("g++"):
        pytest.skip("mlx compiles for a CPU with g++, which is not installed")


@pytest.fixture(scope="session")
def tiny_llama(tmp_path_factory):
    """The folder of a complete MLX model: a random two-layer Llama in 4 bits, with a tokenizer trained for it.

    Hidden size 64, 4 heads, 2 key-value heads, intermediate size 128, vocabulary 300, group size 32, ChatML template.
    It is made once in a run.
    """
    import_mlx()
    folder = _temporary(tmp_path_factory) / "tiny-llama"
    with FileLock(f"{folder}.lock"):
        if not (folder / "config.json").exists():
            from tests.support.tiny_llama import write_tiny_llama

            write_tiny_llama(folder)
    return folder


@pytest.fixture(scope="session")
def smollm2(tmp_path_factory):
    """The folder of SmolLM2-135M-Instruct as `mbf fetch` leaves it; it is fetched if it is missing."""
    import_mlx()
    models = Path(os.environ.get("MBF_MODELS") or ROOT / "models")
    folder = models / "smollm2-135m-instruct"
    with FileLock(_temporary(tmp_path_factory) / "smollm2.lock"):
        if not (folder / "config.json").exists():
            command = [sys.executable, str(ROOT / "cli.py"), "fetch", "smollm2-135m-instruct"]
            done = subprocess.run(
                command, env={**os.environ, "MBF_MODELS": str(models)}, capture_output=True, text=True, cwd=ROOT
            )
            if done.returncode:
                reason = (done.stderr.strip().splitlines() or ["no message"])[-1]
                pytest.skip(f"SmolLM2 is not in {models} and could not be fetched: {reason}")
    return folder


@pytest.fixture(scope="session")
def task_data():
    """The folder of published text tasks (tasks/, superni/, cl_benchmark/), which the project does not ship."""
    folder = Path(os.environ.get("MBF_TASK_DATA") or ROOT.parent / "shared" / "data")
    if not (folder / "tasks").is_dir():
        pytest.skip(f"no text tasks in {folder}; MBF_TASK_DATA names their folder")
    return folder


@pytest.fixture
def quick_path(tmp_path):
    """A new folder, in memory if possible: on a disk, hundreds of flushes take seconds."""
    memory = Path("/dev/shm")
    if not os.access(memory, os.W_OK):
        yield tmp_path
        return
    with tempfile.TemporaryDirectory(dir=memory, prefix="mbf-test-") as folder:
        yield Path(folder)


@pytest.fixture
def write_jsonl(tmp_path):
    """`write_jsonl("mail/train.jsonl", rows)` writes rows below tmp_path and returns the file's path."""

    def write(name, rows):
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
        return path

    return write


def _temporary(tmp_path_factory):
    """Return a temporary folder that all workers of a parallel run share."""
    base = tmp_path_factory.getbasetemp()
    return base.parent if os.environ.get("PYTEST_XDIST_WORKER") else base
