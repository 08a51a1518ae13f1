import shutil
import subprocess
import sys
from contextlib import ExitStack

import numpy as np
import pytest

from mbf_mlx.errors import InputError
from mbf_mlx.files.storage import Files
from mbf_mlx.stream.folder import StreamFolder
from mbf_mlx.stream.saves import Working
from tests.support.failing import WAYS, Crash, failing
from tests.support.streams import contents, learn, new_stream, record


def test_an_empty_stream_opens_as_generation_0(quick_path):
    new_stream(quick_path / "s")
    stream = StreamFolder.open(quick_path / "s")
    assert stream.current().number == 0
    assert stream.state().t == 0
    assert stream.history() == []


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


def test_undo_goes_one_step_back_and_not_two(quick_path):
    stream = learn(new_stream(quick_path / "s"), 3)
    with stream.writer():
        assert stream.undo().name == "task3"
    assert stream.current().number == 2
    with stream.writer(), pytest.raises(InputError, match="cannot undo task 2 .'task2'.: only one step back is kept"):
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


@pytest.mark.parametrize("mine", ["adapter/adapters.safetensors", "current/x", "generations/x", "generations/000003/x"])
def test_a_folder_of_the_user_s_is_no_place_for_a_stream_whatever_its_names(quick_path, mine):
    file = quick_path / "s" / mine
    file.parent.mkdir(parents=True)
    file.write_text("mine")
    with pytest.raises(InputError, match="expected a new or empty folder for a stream, got something else"):
        new_stream(quick_path / "s")
    assert contents(quick_path / "s") == {mine: b"mine"}


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


def test_nothing_is_committed_on_a_generation_that_does_not_count_any_more(quick_path):
    """As when somebody has removed the lock of a running command."""
    stream = learn(new_stream(quick_path / "s"), 2)
    started, state = stream.current(), stream.state()
    StreamFolder.open(quick_path / "s").undo()
    before = contents(quick_path / "s")
    message = (
        r"expected to go on from generation 2, but another process has .* \(it has learned 1 tasks now\); nothing was"
    )
    with pytest.raises(InputError, match=message):
        stream.commit(started, state, record(3), "models/tiny", {})
    assert contents(quick_path / "s") == before
    again = StreamFolder.open(quick_path / "s")  # the number of the undone generation is used again, by another one
    again.commit(again.current(), state, record(2, "another"), "models/tiny", {})
    with pytest.raises(InputError, match="expected to go on from generation 2"):
        stream.commit(started, state, record(3), "models/tiny", {})


def test_a_commit_that_is_overtaken_while_it_is_written_does_not_count(quick_path):
    class Overtaken(Files):
        def rename(self, source, target):
            super().rename(source, target)
            if target.name == "000003":
                StreamFolder.open(quick_path / "s").undo()

    learn(new_stream(quick_path / "s"), 2)
    stream = StreamFolder.open(quick_path / "s", Overtaken())
    with pytest.raises(InputError, match="nothing was committed"):
        stream.commit(stream.current(), stream.state(), record(3), "models/tiny", {})
    again = StreamFolder.open(quick_path / "s")
    assert again.current().number == 1 and not again.generations.folder(3).exists()
