"""Folders and files of the user's that have names of ours: they are refused as they are, and nothing is removed."""

import json
import os
from types import SimpleNamespace

import psutil
import pytest

from mbf_mlx.errors import InputError
from mbf_mlx.stream.folder import StreamFolder
from tests.support.streams import contents, learn, new_stream

KINDS = {
    "a folder current": lambda path: (path / "current").mkdir(),
    "a file adapter": lambda path: (path / "adapter").write_text("mine"),
    "a link current to elsewhere": lambda path: (path / "current").symlink_to("releases/7"),
    "a link adapter to elsewhere": lambda path: (path / "adapter").symlink_to("/dev/null"),
    "a lock.json of npm's": lambda path: (path / "lock.json").write_text(json.dumps({"name": "app", "version": "1"})),
    "a lock with words": lambda path: (path / "lock").write_text("do not touch"),
    "a stream.json.new": lambda path: (path / "stream.json.new").write_text("[1, 2]"),
    "a folder generations": lambda path: (path / "generations/mine").mkdir(parents=True),
}


@pytest.mark.parametrize("kind", KINDS)
def test_a_users_folder_is_refused_and_stays_as_it_is(tmp_path, kind):
    folder = tmp_path / "mine"
    folder.mkdir()
    KINDS[kind](folder)
    before = [(path.name, path.is_symlink()) for path in sorted(folder.rglob("*"))], contents(folder)
    with pytest.raises(InputError, match="expected a new or empty folder for a stream, got something else"):
        new_stream(folder)
    assert before == ([(path.name, path.is_symlink()) for path in sorted(folder.rglob("*"))], contents(folder))


def test_what_a_killed_creation_leaves_is_taken_over(tmp_path):
    folder = tmp_path / "s"
    folder.mkdir()
    (folder / "lock").touch()
    (folder / "lock.json").write_text(json.dumps({"process": 1, "host": "h", "since": "2026-01-01 00:00:00"}))
    (folder / "adapter").symlink_to("current/adapter")
    (folder / "current").symlink_to("generations/000000")
    (folder / "generations/building-000000").mkdir(parents=True)
    assert new_stream(folder).current().number == 0


def test_a_stream_on_a_disk_without_links_is_read_without_a_lock_and_stays_as_it_is(quick_path, monkeypatch):
    """exFAT: what would be links are texts that say where they would lead."""
    stream = learn(new_stream(quick_path / "s"), 2)
    for name in ("current", "adapter"):
        target = os.readlink(stream.path / name)
        (stream.path / name).unlink()
        (stream.path / name).write_text(target)
    before = {path: path.stat().st_mtime_ns for path in stream.path.rglob("*")}
    parts = [
        SimpleNamespace(mountpoint="/", fstype="ext4"),
        SimpleNamespace(mountpoint=str(quick_path), fstype="exfat"),
    ]
    monkeypatch.setattr(psutil, "disk_partitions", lambda all: parts)
    assert StreamFolder.open(stream.path).state().t == 2
    assert {path: path.stat().st_mtime_ns for path in stream.path.rglob("*")} == before
    parts[1] = SimpleNamespace(mountpoint=str(quick_path), fstype="btrfs")  # a copying program has made texts of them
    assert StreamFolder.open(stream.path).state().t == 2
    assert os.readlink(stream.path / "adapter") == "current/adapter"
