"""Each file operation fails in turn, in every way. What is left is the old state or the new one, whole."""

import json
import shutil
import subprocess
import sys

import pytest

from mbf_mlx import exchange
from mbf_mlx.errors import InputError
from mbf_mlx.export.adapter_folder import write_files
from mbf_mlx.export.place import LISTING, fresh_file
from mbf_mlx.stream.folder import StreamFolder
from mbf_mlx.stream.repair import repair, verify_all
from mbf_mlx.stream.saves import Working
from tests.conftest import ROOT
from tests.support.elsewhere import trained
from tests.support.failing import WAYS, Crash, failing
from tests.support.saves import save
from tests.support.streams import contents, learn, new_stream

SOME_WAYS = ["error", "after", *(pytest.param(how, marks=pytest.mark.slow) for how in ("short", "before"))]


def commit(folder):
    learn(StreamFolder.open(folder))


def undo(folder):
    stream = StreamFolder.open(folder)
    with stream.writer():
        stream.undo()


def absorb(folder):
    stream = StreamFolder.open(folder)
    with stream.writer():
        exchange.absorb(stream, folder.parent / "tuned", "mail")


def attempts(action, base, how):
    """Let each operation of `action` fail in turn, each on a new copy of `base`, and yield that folder."""
    folder = base.with_name("attempt")
    shutil.copytree(base, folder, symlinks=True)
    with failing() as count:
        action(folder)
    assert count.done > 3
    for at in range(1, count.done + 1):
        shutil.rmtree(folder)
        shutil.copytree(base, folder, symlinks=True)
        with failing(at, how):
            try:
                action(folder)
            except (Crash, InputError):
                pass
        yield folder


def tidy(folder):
    """Check that the folder holds one stream of one or two generations, and nothing else."""
    stream = StreamFolder.open(folder)
    number = stream.current().number
    left = sorted(path.name for path in (folder / "generations").iterdir())
    assert left == [f"{n:06d}" for n in (number - 1, number)]
    assert sorted(p.name for p in folder.iterdir()) == ["adapter", "current", "generations", "lock", "stream.json"]


@pytest.mark.parametrize("how", WAYS)
@pytest.mark.parametrize(("action", "new"), [(commit, 3), (undo, 1), (absorb, 3)])
def test_a_failing_operation_leaves_the_old_or_the_new_generation_whole(quick_path, action, new, how):
    stream = learn(new_stream(quick_path / "base"), 2)
    trained(stream, quick_path / "tuned", "mlx")
    outcomes = set()
    for folder in attempts(action, quick_path / "base", how):
        stream = StreamFolder.open(folder)
        verify_all(stream)
        assert stream.state().t in (2, new)
        outcomes.add(stream.state().t)
        learn(stream)  # the next command works and removes the traces of the crash
        tidy(folder)
    assert outcomes == {2, new}


@pytest.mark.parametrize("how", SOME_WAYS)
def test_a_repair_that_fails_can_be_repeated(quick_path, how):
    learn(new_stream(quick_path / "base"), 2)
    path = quick_path / "base/generations/000002/history.jsonl"
    path.write_bytes(path.read_bytes()[:-3])
    (quick_path / "base/stream.json").unlink()
    for folder in attempts(repair, quick_path / "base", how):
        repair(folder)
        stream = StreamFolder.open(folder)
        verify_all(stream)
        assert stream.state().t == 1
        learn(stream)
        tidy(folder)


@pytest.mark.parametrize("how", SOME_WAYS)
def test_making_a_stream_can_be_repeated_after_any_failure(quick_path, how):
    with failing() as count:
        new_stream(quick_path / "s")
    for at in range(1, count.done + 1):
        shutil.rmtree(quick_path / "s")
        with failing(at, how):
            try:
                new_stream(quick_path / "s")
            except InputError:
                # Refused, not killed: no trace is left, unless the refusal came when the stream was already complete.
                assert not (quick_path / "s").exists() or (quick_path / "s/stream.json").exists()
            except Crash:
                pass
        if not (quick_path / "s/stream.json").exists():
            new_stream(quick_path / "s")
        tidy_first(quick_path / "s")
        learn(StreamFolder.open(quick_path / "s"), 2)
        tidy(quick_path / "s")


def tidy_first(folder):
    assert StreamFolder.open(folder).state().t == 0


@pytest.mark.parametrize("how", SOME_WAYS)
def test_a_save_that_fails_leaves_the_save_before_or_the_new_one(quick_path, how):
    (quick_path / "base").mkdir()
    save(Working(quick_path / "base/working", files()), 5)
    steps = set()
    for folder in attempts(lambda folder: save(Working(folder / "working", files()), 10), quick_path / "base", how):
        working = Working(folder / "working", files())
        steps.add(working.load().progress["step"])
        assert working.problems() == []
        save(working, 15)
        assert working.load().progress["step"] == 15
        assert [path.name for path in (folder / "working").iterdir()] == ["step-00000015"]
    assert steps == {5, 10}


def files():
    from mbf_mlx.files.storage import Files

    return Files()


@pytest.mark.parametrize("how", SOME_WAYS)
@pytest.mark.parametrize("there", [False, True])
def test_an_export_that_fails_leaves_the_old_one_or_the_new_one_whole(quick_path, how, there):
    """There is no earlier export, or a folder. At the worst moment the earlier export lies beside its place; the next
    export first puts it back."""
    base = quick_path / "base"
    base.mkdir()
    old, new = {"a.txt": b"old", "b.txt": b"old"}, {"a.txt": b"new"}
    if there:
        write_files(old, base / "out")
    outcomes = set()
    for folder in attempts(lambda folder: write_files(new, folder / "out", force=True), base, how):
        out = folder / "out"
        if there and not out.exists():
            with pytest.raises(InputError, match="exists; choose another place"):
                write_files(new, out)
        held = {p.name: p.read_bytes() for p in out.iterdir() if p.name != LISTING} if out.exists() else None
        assert held in ([old, new] if there else [None, new])
        outcomes.add(str(held))
        write_files(new, out, force=True)
        assert sorted(p.name for p in folder.iterdir()) == ["out"]
        assert sorted(p.name for p in out.iterdir()) == ["a.txt", LISTING]
    assert len(outcomes) == 2


@pytest.mark.parametrize("how", SOME_WAYS)
def test_an_exported_file_that_fails_leaves_the_old_one_or_the_new_one(quick_path, how):
    base = quick_path / "base"
    base.mkdir()
    (base / "model.gguf").write_bytes(b"old")

    def export(folder):
        with fresh_file(folder / "model.gguf", force=True, is_ours=lambda path: True) as path:
            files().write(path, b"new, and longer")

    for folder in attempts(export, base, how):
        assert (folder / "model.gguf").read_bytes() in (b"old", b"new, and longer")
        export(folder)
        assert [path.name for path in folder.iterdir()] == ["model.gguf"]


SLOW_TARGETS = [pytest.param(target, marks=pytest.mark.slow) for target in ("mlx", "peft", "ollama", "lmstudio")]


@pytest.mark.parametrize("how", SOME_WAYS)
@pytest.mark.parametrize("target", ["adapter", "gguf", "gguf-adapter", *SLOW_TARGETS])
def test_an_export_of_every_target_that_fails_leaves_nothing_or_all_of_it(tiny_llama, quick_path, target, how):
    pytest.importorskip("mlx.core", reason="mlx is not installed: pip install 'mbf-mlx[cpu]'")
    from tests.support.taught import taught

    stream = taught(quick_path / "s", tiny_llama)
    out = quick_path / "place" / ("out.gguf" if target.startswith("gguf") else "out")
    out.parent.mkdir()
    with failing() as count:
        stream.export(target, out)
    whole, outcomes = held(out), set()
    for at in range(1, count.done + 1):
        shutil.rmtree(out.parent)
        out.parent.mkdir()
        with failing(at, how):
            try:
                stream.export(target, out)
            except (Crash, InputError):
                pass
        assert held(out) in ({}, whole)
        outcomes.add(len(held(out)))
        stream.export(target, out, force=True)
        assert held(out) == whole and [path.name for path in out.parent.iterdir()] == [out.name]
    assert outcomes == {0, len(whole)}


def held(out):
    """The files of an export by name, without the cache of file times; {} if there is no export."""
    files = [out] if out.is_file() else [path for path in out.rglob("[!.]*") if path.is_file()]
    return {path.relative_to(out.parent).as_posix(): path.read_bytes() for path in files}


def test_a_run_killed_between_its_commit_and_the_end_of_its_saves_counts_as_finished(quick_path):
    stream = learn(new_stream(quick_path / "s"), 1)
    last = stream.history()[-1]
    before = contents(quick_path / "s")
    run = {"task": last.name, "sha256": last.sha256, "generation": 0}
    stream.working.mkdir()
    Working(stream.working, files()).save(4, run, {}, {"step": 4}, {})
    assert StreamFolder.open(quick_path / "s").interrupted() is None
    with stream.writer():
        assert not stream.working.exists()
    Working(stream.working, files()).save(4, run | {"generation": 1}, {}, {"step": 4}, {})
    with stream.writer():
        assert stream.interrupted() == {"task": last.name, "step": 4}
    # The same if it was killed while removing them.
    (stream.working / "step-00000004/tensors.safetensors").unlink()
    Working(stream.working, files()).save(2, run, {}, {"step": 2}, {})
    assert Working(stream.working, files()).load().progress == {"step": 2}
    (stream.working / "step-00000002/progress.json").unlink()
    with stream.writer():
        assert not stream.working.exists()
    assert contents(quick_path / "s") == before


def test_what_a_crash_left_is_tidied_where_nobody_is_writing(quick_path):
    stream = learn(new_stream(quick_path / "s"), 2)
    (stream.path / "lock.json").write_text("{}")
    (stream.path / "generations/removing-000000").mkdir()
    with stream.writer():
        StreamFolder.open(stream.path).tidy()  # somebody is writing: nothing happens
    (stream.path / "lock.json").write_text("{}")
    StreamFolder.open(stream.path).tidy()
    tidy(stream.path)


def test_a_run_killed_at_random_moments_ends_equal_to_the_bit(tmp_path):
    """A small part of `make soak`: one kill in each phase of the run."""
    pytest.importorskip("mlx.core", reason="mlx is not installed: pip install 'mbf-mlx[cpu]'")
    command = [sys.executable, ROOT / "benchmarks/soak.py", "--kills", "7", "--seed", "1", "--out", tmp_path / "r.json"]
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True, cwd=ROOT, timeout=500)
    assert done.returncode == 0, done.stdout + done.stderr
    document = json.loads((tmp_path / "r.json").read_text())
    assert document["kills"] == 7 and document["problems"] == [] and document["runs_finished"] >= 1
    assert "Problems: none" in (tmp_path / "r.md").read_text()
