"""Many commands on one stream at the same time, and what each of them says."""

import json
import os
import re
import socket
import subprocess
import sys

import pytest

from mbf_mlx.errors import InputError
from mbf_mlx.stream.folder import StreamFolder
from mbf_mlx.stream.repair import verify_all
from tests.conftest import ROOT
from tests.support.elsewhere import trained
from tests.support.streams import learn, new_stream

# What a command may answer while others write: one line, and what to do.
REFUSALS = re.compile(
    r"error: \S+: (in use by (process \d+ on \S+ since [-\d]+ [:\d]+|another process)\nhint: wait for it to finish"
    r"|nothing to undo: it has learned no task"
    r"|cannot undo task \d+ \('(mail|task)\d*'\): only one step back is kept, and it is used up\nhint: to go back)"
)


def run_crowd(folder, count, seed):
    command = [sys.executable, str(ROOT / "tests/support/crowd.py"), str(folder), str(count), str(seed)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, timeout=300)  # a deadlock ends here
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.mark.parametrize(
    ("count", "seeds"), [pytest.param(12, 1, id="12"), pytest.param(50, 4, id="4x50", marks=pytest.mark.slow)]
)
def test_mixed_commands_at_once_leave_a_whole_stream_and_wait_for_nobody(quick_path, count, seeds):
    stream = learn(new_stream(quick_path / "s"), 2)
    trained(stream, quick_path / "tuned", "mlx")
    answers = []
    for seed in range(seeds):
        answers += run_crowd(quick_path, count, seed)
        stream = StreamFolder.open(quick_path / "s")
        verify_all(stream)
        assert stream.state().t == len(stream.history())
        left = {path.name for path in quick_path.joinpath("s").iterdir()}
        assert left == {"adapter", "current", "generations", "lock", "stream.json"}
        assert len(list((quick_path / "s/generations").iterdir())) <= 2
        for start in quick_path.glob("start*"):
            for file in start.iterdir():
                file.unlink()
            start.rmdir()
    for words, code, error in answers:
        assert code in (0, 1), (words, code, error)
        if words[0] in ("status", "next"):
            assert code == 0, (words, error)  # readers are never blocked
        if code == 1:
            assert REFUSALS.match(error), (words, error)
    done = {words[0] for words, code, _ in answers if code == 0}
    assert done & {"absorb", "undo"} and done & {"status", "next"}
    learn(stream)


def test_the_note_of_a_dead_holder_names_nobody(quick_path):
    """A killed process leaves its note. The next command finds it, and nobody is told to wait for a dead process."""
    dead = subprocess.Popen([sys.executable, "-c", ""])
    dead.wait()
    stream = new_stream(quick_path / "s")
    with stream.writer():
        owner = {"process": dead.pid, "host": socket.gethostname(), "since": "2026-01-01 00:00:00"}
        (quick_path / "s/lock.json").write_text(json.dumps(owner))
        with pytest.raises(InputError, match="s: in use by another process\nhint: wait for it to finish"):
            stream.writer().__enter__()
        (quick_path / "s/lock.json").write_text("{")
        with pytest.raises(InputError, match="s: in use by another process\nhint: wait for it to finish"):
            stream.writer().__enter__()
        (quick_path / "s/lock.json").write_text(json.dumps(owner | {"host": "elsewhere"}))
        with pytest.raises(InputError, match=f"in use by process {dead.pid} on elsewhere since 2026-01-01 00:00:00"):
            stream.writer().__enter__()
    assert not (quick_path / "s/lock.json").exists()


def test_readers_see_whole_generations_while_a_writer_commits_and_undoes(quick_path):
    """Another process writes as fast as it can. We find every file, and no state mixes two generations."""
    learn(new_stream(quick_path / "s"), 1)
    code = (
        "import sys\n"
        "from pathlib import Path\n"
        "from mbf_mlx.stream.folder import StreamFolder\n"
        "from tests.support.streams import learn\n"
        "stream = StreamFolder.open(Path(sys.argv[1]))\n"
        "for _ in range(8):\n"
        "    learn(stream, 2)\n"
        "    with stream.writer(): stream.undo()\n"
    )
    writer = subprocess.Popen([sys.executable, "-c", code, str(quick_path / "s")], cwd=ROOT, env=os.environ)
    seen, reads = set(), 0
    while writer.poll() is None:
        stream = StreamFolder.open(quick_path / "s")
        state, history = stream.state(), stream.history()
        verify_all(stream)
        assert [record.t for record in history] == list(range(1, len(history) + 1))
        assert state.kept_bytes() > 0
        seen.add(state.t)
        reads += 1
    assert writer.returncode == 0
    assert reads > 2 and len(seen) > 1
