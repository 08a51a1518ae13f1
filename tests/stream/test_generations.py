import errno
import os
import shutil

import pytest

from mbf_mlx.errors import InputError
from mbf_mlx.files.storage import Files
from mbf_mlx.stream.folder import StreamFolder
from tests.support.streams import contents, learn, new_stream


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


def test_a_commit_makes_the_next_generation_current_and_keeps_one_before(quick_path):
    stream = learn(new_stream(quick_path / "s"), 4)
    assert stream.current().number == 4
    assert sorted(p.name for p in (quick_path / "s/generations").iterdir()) == ["000003", "000004"]
    assert os.readlink(quick_path / "s/adapter") == "current/adapter"
    assert [r.name for r in stream.history()] == ["task1", "task2", "task3", "task4"]


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


@pytest.mark.parametrize("mine", ["adapter/notes.txt", "adapter/adapters.safetensors", "current/notes.txt"])
def test_a_copy_that_followed_its_links_keeps_what_was_put_into_it(quick_path, mine):
    learn(new_stream(quick_path / "s"), 2)
    shutil.copytree(quick_path / "s", quick_path / "copy", symlinks=False)
    (quick_path / "copy" / mine).write_text("mine")
    assert StreamFolder.open(quick_path / "copy").state().t == 2
    assert (quick_path / "copy" / mine).read_text() == "mine"
