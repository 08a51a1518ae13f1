"""Sleep is held off while a Mac learns. `caffeinate` is macOS's own: a program of that name stands in for it here."""

import os
import time

import pytest

from mbf_mlx.device.awake import kept_awake


@pytest.fixture
def calls(tmp_path, monkeypatch):
    """The file in which the stand-in notes its process id and its arguments; it sleeps until it is ended."""
    program = tmp_path / "caffeinate"
    program.write_text(f'#!/bin/sh\necho "$$ $@" > {tmp_path}/calls.new\nmv {tmp_path}/calls.new {tmp_path}/calls\n')
    program.write_text(program.read_text() + "exec sleep 60\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    return tmp_path / "calls"


def started(calls):
    """Wait for the stand-in, and return its process id and its arguments."""
    deadline = time.monotonic() + 30
    while not calls.exists() and time.monotonic() < deadline:
        time.sleep(0.01)
    pid, *arguments = calls.read_text().split()
    return int(pid), arguments


def test_caffeinate_runs_as_long_as_the_block_and_watches_this_process(calls):
    with kept_awake(system="darwin"):
        pid, arguments = started(calls)
        assert arguments == ["-i", "-w", str(os.getpid())]
        os.kill(pid, 0)
    with pytest.raises(ProcessLookupError):
        os.kill(pid, 0)


def test_an_error_in_the_block_ends_it_too_and_is_not_hidden(calls):
    pids = []
    with pytest.raises(RuntimeError, match="in the block"), kept_awake(system="darwin"):
        pids.append(started(calls)[0])
        raise RuntimeError("in the block")
    with pytest.raises(ProcessLookupError):
        os.kill(pids[0], 0)


@pytest.mark.parametrize(("wanted", "system"), [(False, "darwin"), (True, "linux")])
def test_nothing_runs_where_nobody_asks_or_there_is_no_such_program(calls, wanted, system):
    with kept_awake(wanted, system=system):
        time.sleep(0.1)
    assert not calls.exists()


def test_a_mac_without_caffeinate_learns_all_the_same(monkeypatch):
    monkeypatch.setenv("PATH", "")
    with kept_awake(system="darwin"):
        pass
