"""A full disk, a read-only disk, missing permission, a quota: one sentence, an unchanged stream, nothing left behind.

The disk is a real tmpfs of 20 MB, mounted for the test."""

import gc
import json
import re
import resource
import shutil
import subprocess
import sys
import warnings

import numpy as np
import pytest

from mbf_mlx import exchange
from mbf_mlx.errors import InputError
from mbf_mlx.export import place
from mbf_mlx.export.adapter_folder import write_files
from mbf_mlx.files import storage
from mbf_mlx.stream import folder as stream_module
from mbf_mlx.stream import generations
from mbf_mlx.stream.folder import StreamFolder
from mbf_mlx.stream.repair import repair, verify_all
from mbf_mlx.stream.saves import Working
from tests.conftest import ROOT
from tests.support.elsewhere import trained
from tests.support.failing import failing
from tests.support.streams import contents, identity, learn, new_stream
from tests.support.taught import taught

MB = 1 << 20
# A generation of about 1.5 MB.
LARGE = {f"model.layers.{block}.mlp.up_proj": (8000, 4000) for block in range(4)}


@pytest.fixture
def disk(tmp_path):
    """A folder on a file system of 20 MB, which `remount` makes read-only."""
    folder = tmp_path / "disk"
    folder.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=20m", "tmpfs", str(folder)]
    if sys.platform != "linux" or shutil.which("mount") is None:
        pytest.skip("mounting a tmpfs needs Linux's mount")
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        pytest.skip(f"mounting a tmpfs is not allowed here: {done.stderr.strip()}")
    yield folder
    subprocess.run(["umount", "-l", str(folder)], check=True)  # whatever a test's traceback still holds open


def fill(disk, left):
    """Fill the disk up to `left` free bytes."""
    filler = disk / "filler"
    filler.unlink(missing_ok=True)
    with open(filler, "wb") as file:
        file.write(b"x" * (shutil.disk_usage(disk).free - left))
    assert shutil.disk_usage(disk).free == left


def large_stream(folder):
    return learn(new_stream(folder, layers=LARGE, keys=["mlp.up_proj"]), 2)


def never_ask(monkeypatch):
    """The disk fills up after the look ahead: that one sees space enough."""
    for module in (storage, stream_module, generations, place):
        monkeypatch.setattr(module, "require_space", lambda *_: None)


def refused(action, *words):
    with pytest.raises(InputError) as caught:
        action()
    lines = str(caught.value).splitlines()
    assert len(lines) == 2 and lines[1].startswith("hint: ")
    for word in words:
        assert word in lines[0] + lines[1], lines


FULL = ("cannot write: the disk is full (", " bytes needed, ", " free)", "nothing was lost")


@pytest.mark.parametrize("left", [0, 64 * 1024, MB])
@pytest.mark.parametrize("asked", [True, False])
def test_a_commit_that_does_not_fit_leaves_everything_as_it_was(disk, monkeypatch, left, asked):
    stream = large_stream(disk / "s")
    before = contents(stream.path)
    if not asked:
        never_ask(monkeypatch)
    fill(disk, left)
    refused(lambda: learn(stream), *(("a commit needs ", " bytes of disk space, ", " free") if asked else FULL))
    assert contents(stream.path) == before
    (disk / "filler").unlink()
    assert learn(StreamFolder.open(stream.path)).state().t == 3


def test_learning_is_refused_before_it_starts_where_its_result_would_not_fit(disk):
    stream = large_stream(disk / "s")
    stream.require_space()
    fill(disk, 5 * MB)
    refused(stream.require_space, "learning a task needs ", " bytes of disk space, 5,242,880 are free", "free some")


def test_undo_works_on_a_disk_without_one_free_byte(disk):
    stream = large_stream(disk / "s")
    fill(disk, 0)
    with stream.writer():
        assert stream.undo().name == "task2"
    assert StreamFolder.open(stream.path).state().t == 1
    assert not (stream.path / "lock.json").exists()


@pytest.mark.parametrize("left", [0, 8192, 300 * 1024])
def test_a_save_that_does_not_fit_leaves_the_one_before(disk, left):
    stream = large_stream(disk / "s")
    working = Working(stream.working, stream.files)
    working.save(1, {}, {}, {"step": 1}, {"factor.x": np.zeros(1000, np.float32)})
    before = contents(stream.path)
    fill(disk, left)
    tensors = {"factor.x": np.zeros(100_000, np.float32)}
    refused(lambda: working.save(2, {}, {}, {"step": 2}, tensors), *FULL)
    assert contents(stream.path) == before
    assert working.load().progress == {"step": 1}


@pytest.mark.parametrize("left", [0, 16384])
def test_a_stream_that_cannot_be_made_leaves_no_trace(disk, monkeypatch, left):
    never_ask(monkeypatch)
    fill(disk, left)
    refused(lambda: new_stream(disk / "s", layers=LARGE | {f"l.{i}.x" * 9: (4, 4) for i in range(400)}), *FULL)
    assert [path.name for path in disk.iterdir()] == ["filler"]


@pytest.mark.parametrize("asked", [True, False])
def test_an_export_that_does_not_fit_leaves_the_earlier_one(disk, monkeypatch, asked):
    write_files({"a": b"old"}, disk / "out") if asked else (disk / "out").mkdir()
    if not asked:
        never_ask(monkeypatch)
        (disk / "out").rmdir()
    before = contents(disk / "out")
    fill(disk, MB)
    words = ("the export needs ", " free") if asked else FULL[:3]
    refused(lambda: write_files({"a": b"new", "b": b"x" * 2 * MB}, disk / "out", force=asked), *words)
    assert contents(disk / "out") == before
    assert sorted(path.name for path in disk.iterdir()) == (["filler", "out"] if asked else ["filler"])


@pytest.mark.parametrize("target", ["adapter", "mlx", "gguf", "gguf-adapter", "ollama"])
def test_an_export_that_fills_the_disk_anywhere_leaves_nothing(disk, tiny_llama, quick_path, monkeypatch, target):
    """Real exports fail at the real write that does not fit: of a header, a tensor, a tokenizer or a card."""
    pytest.importorskip("mlx.core", reason="mlx is not installed: pip install 'mbf-mlx[cpu]'")
    stream = taught(quick_path / "s", tiny_llama)
    never_ask(monkeypatch)
    out = disk / ("out.gguf" if target.startswith("gguf") else "out")
    free = shutil.disk_usage(disk).free
    stream.export(target, out)
    takes = free - shutil.disk_usage(disk).free
    shutil.rmtree(out) if out.is_dir() else out.unlink()
    for share in (0, 0.2, 0.5, 0.9):
        fill(disk, int(takes * share) // 4096 * 4096)
        with warnings.catch_warnings(record=True) as warned:
            warnings.simplefilter("always", ResourceWarning)
            refused(lambda: stream.export(target, out), *FULL)
            gc.collect()
        assert [path.name for path in disk.iterdir()] == ["filler"]
        assert not [str(warning.message) for warning in warned if str(disk) in str(warning.message)]  # unclosed files
    (disk / "filler").unlink()
    stream.export(target, out)


def test_an_adapter_that_cannot_be_absorbed_for_want_of_space_is_not(disk, tmp_path):
    stream = large_stream(disk / "s")
    folder, _ = trained(stream, tmp_path / "tuned", "mlx")
    before = contents(stream.path)
    fill(disk, MB)
    with stream.writer():
        refused(lambda: exchange.absorb(stream, folder, "mail", force=True), "a commit needs ", " are free")
    assert contents(stream.path) == before


QUOTA = r": cannot write: the disk quota is used up \([\d,]+ bytes needed, [\d,]+ free\)\nhint: free some space and run"


def commit(stream, place):
    learn(stream)


def undo(stream, place):
    with stream.writer():
        stream.undo()


def absorb(stream, place):
    with stream.writer():
        exchange.absorb(stream, place / "tuned", "mail")


def save(stream, place):
    Working(stream.working, stream.files).save(2, {}, {}, {"step": 2}, {"factor.x": np.zeros(9, np.float32)})


def export(stream, place):
    write_files({"a": b"new", "c": b"new"}, place / "out", force=True)


@pytest.mark.parametrize("number", ["EDQUOT", pytest.param("ENOSPC", marks=pytest.mark.slow)])
@pytest.mark.parametrize("action", [commit, undo, absorb, save, export])
def test_a_quota_used_up_at_any_operation_is_one_sentence_and_leaves_the_old_or_the_new(quick_path, action, number):
    """Each of our own calls is refused in turn: fsync, mkdir, rename, symlink."""
    trained(learn(new_stream(quick_path / "base/s"), 2), quick_path / "base/tuned", "mlx")
    write_files({"a": b"old"}, quick_path / "base/out")
    before = contents(quick_path / "base")
    shutil.copytree(quick_path / "base", quick_path / "new", symlinks=True)
    with failing() as count:
        action(StreamFolder.open(quick_path / "new/s"), quick_path / "new")
    after = contents(quick_path / "new")
    full = QUOTA if number == "EDQUOT" else QUOTA.replace("disk quota is used up", "disk is full")
    outcomes = set()
    for at in range(1, count.done + 1):
        place = quick_path / f"at{at}"
        shutil.copytree(quick_path / "base", place, symlinks=True)
        with failing(at, number):
            try:
                action(StreamFolder.open(place / "s"), place)
            except InputError as error:
                assert re.search(full, str(error))
                outcomes.add("told")
        stream = StreamFolder.open(place / "s")
        verify_all(stream)
        assert not [n for n in contents(place) if "building" in n or n.endswith(".new") or ".mbf-" in n], at
        with stream.writer():
            pass  # tidies up what could not be pruned
        found = contents(place).keys()
        assert found in (before.keys(), after.keys()), at
        outcomes.add(found == before.keys())
        shutil.rmtree(place)
    assert outcomes >= {"told", True}


def test_a_read_only_disk_is_read_and_not_written(disk):
    stream = large_stream(disk / "s")
    before = contents(stream.path)
    subprocess.run(["mount", "-o", "remount,ro", str(disk)], check=True)
    stream = StreamFolder.open(stream.path)
    verify_all(stream)
    assert stream.state().t == 2 and len(stream.history()) == 2
    for action in (
        lambda: learn(stream),
        lambda: stream.writer().__enter__(),
        lambda: repair(stream.path),
    ):
        refused(action, f"{stream.path}/lock: cannot write: the file system is read-only", "copy the folder to a place")
    refused(lambda: new_stream(disk / "new"), "cannot write: the file system is read-only")
    refused(lambda: write_files({"a": b""}, disk / "out"), "cannot write: the file system is read-only")
    assert contents(stream.path) == before


def test_a_limit_on_the_size_of_files_is_named(quick_path):
    stream = large_stream(quick_path / "s")
    before = contents(stream.path)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, hard))
    try:
        refused(lambda: learn(stream), "cannot write: the file would be larger than is allowed here", "ulimit -f")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert contents(stream.path) == before


PERMISSIONS = """
import json, os, sys
from pathlib import Path
from mbf_mlx.errors import InputError
from mbf_mlx.stream.folder import StreamFolder
from mbf_mlx.export.adapter_folder import write_files
from tests.support.streams import learn, new_stream
from tests.support.unprivileged import give_up_root
give_up_root()
path, found = Path(sys.argv[1]), {"process": os.getpid()}
for name, action in {
    "read": lambda: StreamFolder.open(path / "s").state().t,
    "learn": lambda: learn(StreamFolder.open(path / "s")),
    "hidden": lambda: StreamFolder.open(path / "hidden"),
    "inside": lambda: StreamFolder.open(path / "hidden/deep"),
    "new": lambda: new_stream(path / "new"),
    "deep": lambda: new_stream(path / "hidden/new"),
    "export": lambda: write_files({"a": b""}, path / "out"),
    "unreadable": lambda: StreamFolder.open(path / "unreadable").state(),
}.items():
    try: found[name] = action()
    except InputError as error: found[name] = str(error)
print(json.dumps(found))
"""


def test_what_permission_forbids_is_one_sentence(quick_path):
    """Not as root: a read-only folder, a folder that may not be entered, a file that may not be read."""
    learn(new_stream(quick_path / "s"), 1)
    learn(new_stream(quick_path / "unreadable"), 1)
    (quick_path / "unreadable/generations/000001/history.jsonl").chmod(0)
    (quick_path / "hidden").mkdir(0)
    (quick_path / "s/lock").unlink()
    for folder in [quick_path, *[f for name in ("s", "unreadable") for f in (quick_path / name).rglob("*")]]:
        if folder.is_dir() and not folder.is_symlink():
            folder.chmod(0o555)
    (quick_path / "s").chmod(0o555)
    command = [sys.executable, "-c", PERMISSIONS, str(quick_path)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, timeout=100)
    for folder in [quick_path, *(f for f in quick_path.rglob("*") if f.is_dir() and not f.is_symlink())]:
        folder.chmod(0o755)
    assert done.returncode == 0, done.stderr
    said = json.loads(done.stdout)
    assert said.pop("read") == 1
    missing = (
        "permission is missing\nhint: change the permissions of the folder, or copy it to a place you can write to"
    )
    assert said == {
        "process": said["process"],
        "learn": f"{quick_path}/s/lock: cannot write: {missing}",
        "hidden": f"{quick_path}/hidden/stream.json: cannot read: {missing}",
        "inside": f"{quick_path}/hidden/deep/stream.json: cannot read: {missing}",
        "new": f"{quick_path}/new: cannot write: {missing}",
        "deep": f"{quick_path}/hidden/new: cannot write: {missing}",
        "export": f"{quick_path}/.out.mbf-{said['process']}: cannot write: {missing}",
        "unreadable": f"{quick_path}/unreadable/generations/000001/history.jsonl: cannot read: {missing}",
    }


def test_the_identity_of_these_streams_is_large_enough_to_matter():
    assert sum(4 * 4 * (out + inner) for out, inner in LARGE.values()) > 700_000
    assert identity(layers=LARGE).layers == LARGE
