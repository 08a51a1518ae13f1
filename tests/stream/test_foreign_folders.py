"""Folders and files of the user's that have names of ours: they are refused as they are, and nothing is removed."""

import json

import pytest

from mbf_mlx.errors import InputError
from tests.support.streams import contents, new_stream

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
