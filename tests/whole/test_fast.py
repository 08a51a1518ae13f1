"""`make test-fast` leaves out what it says, and its tests cannot start processes."""

import subprocess
import sys

import pytest

from tests.conftest import ROOT
from tests.support.fast import SLOW_FILES, SLOW_FOLDERS, SLOW_TESTS, no_processes


def test_a_fast_test_cannot_start_a_process():
    with no_processes("a test"), pytest.raises(RuntimeError, match="a test starts a process"):
        subprocess.run([sys.executable, "--version"])
    subprocess.run([sys.executable, "--version"], check=True, capture_output=True)


def test_what_is_left_out_is_there():
    files = list((ROOT / "tests").rglob("test_*.py"))
    assert {file.parent.name for file in files} >= SLOW_FOLDERS
    assert {file.name for file in files} >= SLOW_FILES
    source = "".join(file.read_text(encoding="utf-8") for file in files)
    assert [name for name in SLOW_TESTS if f"def {name}(" not in source] == []


def test_what_starts_processes_is_not_marked_as_fast(request):
    fast = {item.path.name for item in request.session.items if item.get_closest_marker("fast")}
    assert not fast & {"test_fast.py", "test_kills.py", "test_commands.py", "test_awake.py", "test_run.py"}
