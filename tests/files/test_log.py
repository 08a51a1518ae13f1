import json
import os
import subprocess
import sys

import pytest

from mbf_mlx.errors import InputError
from mbf_mlx.files.log import Log
from tests.conftest import ROOT


def test_a_log_gives_back_its_lines_in_order(tmp_path):
    log = Log(tmp_path / "rows.jsonl")
    assert log.read() == []
    log.add({"name": "Zürich", "score": 0.5})
    log.add({"name": "b"})
    assert log.read() == Log(log.path).read() == [{"name": "Zürich", "score": 0.5}, {"name": "b"}]
    assert "Zürich" in log.path.read_text(encoding="utf-8")


def test_a_line_that_a_killed_run_left_half_written_is_passed_over_and_stays_alone(tmp_path):
    log = Log(tmp_path / "rows.jsonl")
    log.add({"at": 1})
    with open(log.path, "ab") as file:
        file.write(b'{"at": 2, "sco')
    assert log.read() == [{"at": 1}]
    log.add({"at": 3})
    assert log.read() == [{"at": 1}, {"at": 3}]
    assert len(log.path.read_bytes().splitlines()) == 3


@pytest.mark.parametrize(
    "line", [b"[1, 2]", b"3", b"null", b"{", b"\xff\xfe", b"[" * 100_000], ids=lambda line: line[:6].hex()
)
def test_lines_that_are_no_json_objects_are_passed_over(tmp_path, line):
    log = Log(tmp_path / "rows.jsonl")
    log.path.write_bytes(b'{"at": 1}\n' + line + b'\n{"at": 2}\n')
    assert log.read() == [{"at": 1}, {"at": 2}]


def test_a_line_is_on_the_disk_when_add_returns(tmp_path, monkeypatch):
    synced, fsync = [], os.fsync
    monkeypatch.setattr(os, "fsync", lambda handle: (synced.append(os.fstat(handle).st_size), fsync(handle)))
    log = Log(tmp_path / "rows.jsonl")
    log.add({"at": 1})
    assert synced == [log.path.stat().st_size] and synced[0] > 0


def test_what_keeps_a_log_from_being_written_is_named(tmp_path):
    (tmp_path / "rows.jsonl").mkdir()
    with pytest.raises(InputError, match="rows.jsonl: cannot write: a folder is there\nhint: choose another path"):
        Log(tmp_path / "rows.jsonl").add({})


def test_processes_that_add_at_once_lose_no_line(tmp_path):
    code = (
        "import sys\nfrom pathlib import Path\nfrom mbf_mlx.files.log import Log\n"
        "for i in range(20): Log(Path(sys.argv[1])).add({'who': sys.argv[2], 'at': i, 'text': 'x' * 5000})\n"
    )
    path = tmp_path / "rows.jsonl"
    running = [subprocess.Popen([sys.executable, "-c", code, str(path), who], cwd=ROOT) for who in "abc"]
    assert [process.wait(60) for process in running] == [0, 0, 0]
    rows = [json.loads(line) for line in path.read_bytes().splitlines()]
    assert len(rows) == 60
    for who in "abc":
        assert [row["at"] for row in rows if row["who"] == who] == list(range(20))
