import errno
import json
import os
import shutil
import subprocess
import sys
from contextlib import ExitStack

import numpy as np
import pytest

from mbf_mlx.errors import InputError
from mbf_mlx.files.storage import Files
from mbf_mlx.stream.folder import StreamFolder
from mbf_mlx.stream.records import LINE_BYTES, parse
from mbf_mlx.stream.saves import Working
from tests.support.failing import WAYS, Crash, failing
from tests.support.streams import contents, identity, learn, new_stream, record


def test_an_empty_stream_opens_as_generation_0(quick_path):
    new_stream(quick_path / "s")
    stream = StreamFolder.open(quick_path / "s")
    assert stream.current().number == 0
    assert stream.state().t == 0
    assert stream.history() == []


def test_a_commit_makes_the_next_generation_current_and_keeps_one_before(quick_path):
    stream = learn(new_stream(quick_path / "s"), 4)
    assert stream.current().number == 4
    assert sorted(p.name for p in (quick_path / "s/generations").iterdir()) == ["000003", "000004"]
    assert os.readlink(quick_path / "s/adapter") == "current/adapter"
    assert [r.name for r in stream.history()] == ["task1", "task2", "task3", "task4"]


def test_the_state_read_back_equals_the_state_committed(quick_path):
    stream = learn(new_stream(quick_path / "s"), 2)
    again = StreamFolder.open(quick_path / "s").state()
    for name, pair in stream.state().deployed.items():
        np.testing.assert_array_equal(again.deployed[name].a, pair.a)
        np.testing.assert_array_equal(again.kept["tuned_b"][name], stream.state().kept["tuned_b"][name])


def test_state_and_adapter_keep_their_size_to_the_byte(quick_path):
    stream = learn(new_stream(quick_path / "s"), 2)

    def sizes():
        files = stream.current().manifest.files
        growing = ("history.jsonl", "adapter/adapter_config.json")
        return {name: files[name].bytes for name in files if name not in growing}

    after_two, held = sizes(), stream.state().kept_bytes()
    learn(stream, 10)
    assert sizes() == after_two
    assert stream.state().kept_bytes() == held


def test_what_is_held_between_tasks_is_counted_without_reading_it(quick_path):
    stream = new_stream(quick_path / "s")
    assert stream.kept_bytes() == stream.state().kept_bytes() == 0
    learn(stream, 2)
    assert stream.kept_bytes() == stream.state().kept_bytes() > 0


def test_status_and_help_import_neither_numpy_nor_what_trains(quick_path):
    learn(new_stream(quick_path / "s"), 2)
    for words in (["--help"], ["status", str(quick_path / "s")]):
        code = f"import atexit, sys; sys.argv = ['mbf', *{words!r}]\n"
        code += "atexit.register(lambda: print(*sys.modules, file=sys.stderr))\n"
        code += "from mbf_mlx.commands import main; main()"
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        loaded = set(done.stderr.split())
        assert "mbf_mlx.commands" in loaded and not loaded & {"numpy", "mlx", "mlx_lm", "transformers", "psutil"}


def test_history_grows_by_a_bounded_line_a_task(quick_path):
    full = record(1, labels=["x" * 60] * 64, curve=[(10**6, 12.3456)] * 24, scores=[0.123456] * 50, losses=[1.5] * 50)
    assert len(full.to_json()) <= LINE_BYTES + 50 * 32
    assert parse(type(full), full.to_json(), "here").labels.startswith("sha256:")


def test_undo_goes_one_step_back_and_not_two(quick_path):
    stream = learn(new_stream(quick_path / "s"), 3)
    with stream.writer():
        assert stream.undo().name == "task3"
    assert stream.current().number == 2
    with stream.writer(), pytest.raises(InputError, match="cannot undo task 2 .'task2'.: one step back is kept"):
        stream.undo()


def test_undo_of_the_first_task_leaves_the_empty_stream(quick_path):
    stream = learn(new_stream(quick_path / "s"))
    with stream.writer():
        stream.undo()
    assert stream.state().t == 0
    with stream.writer(), pytest.raises(InputError, match="nothing to undo: it has learned no task"):
        stream.undo()


def test_undo_then_the_same_task_again_gives_the_same_bytes(quick_path):
    stream = learn(new_stream(quick_path / "s"), 3)
    before = contents(quick_path / "s")
    with stream.writer():
        stream.undo()
    learn(stream)
    after = contents(quick_path / "s")
    assert {n: after[n] for n in after if "000003" in n} == {n: before[n] for n in before if "000003" in n}


def test_a_second_writer_is_told_who_holds_the_lock(quick_path):
    stream = new_stream(quick_path / "s")
    with stream.writer():
        with pytest.raises(InputError, match=rf"in use by process {os.getpid()} on .* since \d{{4}}-"):
            with StreamFolder.open(quick_path / "s").writer():
                pass
    with StreamFolder.open(quick_path / "s").writer():
        pass


def test_the_lock_of_a_killed_process_is_free(quick_path):
    new_stream(quick_path / "s")
    code = (
        "import os, signal, sys; from pathlib import Path; from mbf_mlx.stream.folder import StreamFolder\n"
        "with StreamFolder.open(Path(sys.argv[1])).writer(): os.kill(os.getpid(), signal.SIGKILL)"
    )
    done = subprocess.run([sys.executable, "-c", code, str(quick_path / "s")], check=False)
    assert done.returncode == -9
    with StreamFolder.open(quick_path / "s").writer():
        pass


@pytest.mark.parametrize("how", ["removed", "text", "followed"])
def test_a_copy_that_lost_its_links_is_repaired_at_opening(quick_path, how):
    stream = learn(new_stream(quick_path / "s"), 2)
    before, path = contents(quick_path / "s"), quick_path / "s"
    if how == "removed":
        (path / "current").unlink()
        (path / "adapter").unlink()
    elif how == "text":
        for name in ("current", "adapter"):
            target = os.readlink(path / name)
            (path / name).unlink()
            (path / name).write_text(target)
    else:
        shutil.copytree(path, quick_path / "copy", symlinks=False)
        path = quick_path / "copy"
        assert (path / "current").is_dir() and not (path / "current").is_symlink()
    assert StreamFolder.open(path).current().number == 2
    assert contents(path) == before
    assert stream.identity == StreamFolder.open(path).identity


def test_a_copy_without_links_is_readable_where_nothing_can_be_written(quick_path):
    learn(new_stream(quick_path / "s"), 2)
    (quick_path / "s/current").unlink()

    class ReadOnly(Files):
        def link(self, target, path):
            raise InputError("read-only")

    assert StreamFolder.open(quick_path / "s", ReadOnly()).state().t == 2


def test_a_system_without_links_gets_text_files_that_work_as_well(quick_path, monkeypatch):
    def no_links(target, path):
        raise OSError(errno.EPERM, "links are not supported here")

    monkeypatch.setattr(os, "symlink", no_links)
    stream = learn(new_stream(quick_path / "s"), 2)
    assert (quick_path / "s/current").read_text() == "generations/000002"
    assert StreamFolder.open(quick_path / "s").state().t == 2
    with stream.writer():
        stream.undo()
    assert StreamFolder.open(quick_path / "s").state().t == 1


def test_what_is_not_a_stream_is_named(quick_path):
    with pytest.raises(InputError, match="no such stream\nhint: mbf learn .* TASK --model BASE makes one"):
        StreamFolder.open(quick_path / "s")
    (quick_path / "s").mkdir()
    with pytest.raises(InputError, match=r"not a stream: stream.json is missing"):
        StreamFolder.open(quick_path / "s")
    (quick_path / "s/other").write_text("mine")
    with pytest.raises(InputError, match="expected a new or empty folder for a stream, got something else"):
        new_stream(quick_path / "s")
    assert (quick_path / "s/other").read_text() == "mine"


def test_a_stream_that_lost_its_identity_is_never_made_anew(quick_path):
    """What it has learned stands in its generations; it says what brings it back."""
    stream = learn(new_stream(quick_path / "s"), 2)
    (stream.path / "stream.json").unlink()
    before = contents(stream.path)
    with pytest.raises(InputError, match="not a stream: stream.json is missing\nhint: mbf status .* --repair makes it"):
        new_stream(stream.path, name="b")
    assert contents(stream.path) == before
    StreamFolder.repair(stream.path)
    assert StreamFolder.open(stream.path).state().t == 2


@pytest.mark.parametrize("mine", ["adapter/adapters.safetensors", "current/x", "generations/x", "generations/000003/x"])
def test_a_folder_of_the_user_s_is_no_place_for_a_stream_whatever_its_names(quick_path, mine):
    file = quick_path / "s" / mine
    file.parent.mkdir(parents=True)
    file.write_text("mine")
    with pytest.raises(InputError, match="expected a new or empty folder for a stream, got something else"):
        new_stream(quick_path / "s")
    assert contents(quick_path / "s") == {mine: b"mine"}


@pytest.mark.parametrize("mine", ["adapter/notes.txt", "adapter/adapters.safetensors", "current/notes.txt"])
def test_a_copy_that_followed_its_links_keeps_what_was_put_into_it(quick_path, mine):
    learn(new_stream(quick_path / "s"), 2)
    shutil.copytree(quick_path / "s", quick_path / "copy", symlinks=False)
    (quick_path / "copy" / mine).write_text("mine")
    assert StreamFolder.open(quick_path / "copy").state().t == 2
    assert (quick_path / "copy" / mine).read_text() == "mine"


@pytest.mark.parametrize("inside", ["current", "generations/000002"])
def test_a_generation_is_not_taken_for_the_stream(quick_path, inside):
    stream = learn(new_stream(quick_path / "s"), 2)
    before = contents(stream.path)
    for action in (StreamFolder.open, StreamFolder.repair):
        with pytest.raises(InputError) as caught:
            action(stream.path / inside)
        expected = f"{stream.path / inside}: one generation of a stream, not a stream\nhint: give the stream's folder: "
        assert str(caught.value) == expected + str(stream.path.resolve())
    assert contents(stream.path) == before


def made_in(path, there):
    if there:
        path.mkdir()
    return new_stream(path)


def fail(stream):
    with stream.kept_if_used():
        raise InputError("the rows do not fit")


@pytest.mark.parametrize("there", [False, True])
def test_a_new_stream_that_an_error_leaves_unused_is_removed_again(quick_path, there):
    """A folder that was there stays, as empty as it was; the next try is bound to nothing."""
    stream = made_in(quick_path / "s", there)
    with pytest.raises(InputError, match="the rows do not fit"):
        fail(stream)
    assert [path.name for path in quick_path.rglob("*")] == (["s"] if there else [])
    assert new_stream(quick_path / "s", name="b", rank=2).identity.rank == 2


@pytest.mark.parametrize("use", ["learn", "save", "open", "lock", "note"])
def test_a_stream_that_is_used_outlives_an_error(quick_path, use):
    """Learned into, with a run to go on with, there before, in use by another; what is not ours stays in any case."""
    stream = new_stream(quick_path / "s")
    if use == "learn":
        learn(stream)
    elif use == "save":
        Working(stream.working, stream.files).save(1, {"generation": 0}, {}, {"step": 1}, {"a": np.zeros(1, "f4")})
    elif use == "open":
        stream = StreamFolder.open(stream.path)
    elif use == "note":
        (stream.path / "note.txt").write_text("mine")
    before = contents(stream.path)
    with ExitStack() as stack:
        if use == "lock":
            stack.enter_context(StreamFolder.open(stream.path).writer())
        with pytest.raises(InputError, match="the rows do not fit"):
            fail(stream)
    assert contents(stream.path) == ({"note.txt": b"mine"} if use == "note" else before)


def test_a_new_stream_without_an_error_stays(quick_path):
    stream = new_stream(quick_path / "s")
    with stream.kept_if_used():
        pass
    assert StreamFolder.open(stream.path).state().t == 0


@pytest.mark.parametrize("how", WAYS)
def test_a_removal_that_fails_anywhere_leaves_a_stream_or_room_for_one(quick_path, how):
    stream = new_stream(quick_path / "s")
    with failing() as count, pytest.raises(InputError):
        fail(stream)
    for at in range(1, count.done + 1):
        stream = new_stream(quick_path / "s")
        with failing(at, how), pytest.raises((InputError, Crash)):
            fail(stream)
        if (quick_path / "s/stream.json").exists():
            assert StreamFolder.open(quick_path / "s").state().t == 0
            shutil.rmtree(quick_path / "s")


def test_a_newer_format_is_refused_with_what_reads_it(quick_path):
    new_stream(quick_path / "s")
    where = quick_path / "s/stream.json"
    where.write_text(json.dumps(json.loads(where.read_text()) | {"format_version": 9, "novelty": 1}))
    with pytest.raises(InputError, match="format version 9, .*reads versions up to 1\nhint: upgrade with: pip"):
        StreamFolder.open(quick_path / "s")


FILES = ["manifest.json", "history.jsonl", "state.safetensors", "adapter/adapters.safetensors"]


@pytest.mark.parametrize("name", [*FILES, "adapter/adapter_config.json"])
@pytest.mark.parametrize("damage", ["flip", "cut", "empty", "gone"])
def test_damage_is_found_and_named_and_repaired_from_the_generation_before(quick_path, name, damage):
    learn(new_stream(quick_path / "s"), 2)
    path = quick_path / "s/generations/000002" / name
    data = bytearray(path.read_bytes())
    if damage == "flip":
        data[len(data) // 2] ^= 1
        path.write_bytes(data)
    elif damage == "cut":
        path.write_bytes(data[:-1])
    elif damage == "empty":
        path.write_bytes(b"")
    else:
        path.unlink()
    with pytest.raises(InputError, match=rf"000002.*{path.name}: damaged: .*\nhint: mbf status .* --repair"):
        StreamFolder.open(quick_path / "s")
    assert "went back from generation 000002" in StreamFolder.repair(quick_path / "s")
    stream = StreamFolder.open(quick_path / "s")
    assert stream.state().t == 1
    learn(stream)
    assert StreamFolder.open(quick_path / "s").state().t == 2


def test_a_generation_of_another_stream_or_of_another_number_is_found(quick_path):
    learn(new_stream(quick_path / "s"), 2)
    learn(new_stream(quick_path / "other", name="b"), 2)
    target = quick_path / "s/generations/000002"
    shutil.rmtree(target)
    shutil.copytree(quick_path / "other/generations/000002", target)
    with pytest.raises(InputError, match="000002: damaged: it belongs to another stream"):
        StreamFolder.open(quick_path / "s")
    shutil.rmtree(target)
    shutil.copytree(quick_path / "s/generations/000001", target)
    with pytest.raises(InputError, match="000002: damaged: it holds generation 1"):
        StreamFolder.open(quick_path / "s")


def test_repair_of_a_whole_stream_changes_nothing(quick_path):
    learn(new_stream(quick_path / "s"), 2)
    before = contents(quick_path / "s")
    assert "nothing to repair" in StreamFolder.repair(quick_path / "s")
    assert contents(quick_path / "s") == before


def test_an_unknown_method_field_in_stream_json_is_an_error_with_its_place(quick_path):
    new_stream(quick_path / "s")
    where = quick_path / "s/stream.json"
    where.write_text(json.dumps(json.loads(where.read_text()) | {"rank": "four"}))
    with pytest.raises(InputError, match="stream.json: damaged: rank: input should be a valid integer"):
        StreamFolder.open(quick_path / "s")


def test_identity_round_trips_through_json():
    one = identity()
    assert parse(type(one), one.to_json(), "here") == one


def test_a_pipe_in_the_place_of_a_file_is_refused_and_not_waited_for(quick_path):
    stream = learn(new_stream(quick_path / "s"), 1)
    for name in ("stream.json", "generations/000001/manifest.json"):
        whole = (stream.path / name).read_bytes()
        (stream.path / name).unlink()
        os.mkfifo(stream.path / name)
        with pytest.raises(InputError, match=f"{name}: .*a device, pipe or socket is there"):
            StreamFolder.open(stream.path)
        (stream.path / name).unlink()
        (stream.path / name).write_bytes(whole)
    assert StreamFolder.open(stream.path).state().t == 1
