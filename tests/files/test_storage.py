import os

import pytest

from mbf_mlx.errors import InputError
from mbf_mlx.files import storage
from mbf_mlx.files.storage import Files, free_bytes, new_memory, read_file, read_large, refusal, require_space
from tests.support.failing import WAYS, Crash, failing


def test_a_replaced_file_has_the_new_content_and_leaves_nothing_beside_it(tmp_path):
    path = tmp_path / "note"
    for data in (b"old", b"newer"):
        Files().replace(path, data)
        assert path.read_bytes() == data
    assert [entry.name for entry in tmp_path.iterdir()] == ["note"]


def test_a_replaced_link_leads_to_the_new_target(tmp_path):
    for target in ("one", "two"):
        Files().replace_link(tmp_path / "link", target)
        assert os.readlink(tmp_path / "link") == target
    assert [entry.name for entry in tmp_path.iterdir()] == ["link"]


@pytest.mark.parametrize("how", WAYS)
def test_a_replacement_that_fails_leaves_the_old_file_or_the_new_one(tmp_path, how):
    path = tmp_path / "note"
    with failing() as count:
        Files().replace(path, b"first")
    found = set()
    for at in range(1, count.done + 1):
        path.write_bytes(b"old")
        with failing(at, how):
            try:
                Files().replace(path, b"new")
            except (Crash, InputError):
                pass
        found.add(path.read_bytes())
        Files().replace(path, b"next")  # what the failure left beside it is no hindrance
        assert [entry.name for entry in tmp_path.iterdir()] == ["note"]
    assert found == {b"old", b"new"}


def test_what_cannot_be_removed_is_discarded_in_silence(tmp_path):
    class Refusing(Files):
        def remove(self, path):
            raise InputError("no")

    Refusing().discard(tmp_path / "note")
    Files().discard(tmp_path / "missing")


def test_an_error_without_words_of_ours_is_told_in_the_systems(tmp_path):
    said = refusal(OSError(9, "bad file descriptor"), tmp_path)
    assert str(said).startswith(f"{tmp_path}: cannot write: the operating system says 'bad file descriptor'\nhint: ")


@pytest.mark.parametrize("read", [read_file, read_large])
def test_a_file_is_read_whole(tmp_path, read):
    for data in (b"", b"x" * 5000):
        (tmp_path / "file").write_bytes(data)
        assert bytes(read(tmp_path / "file")) == data
    with pytest.raises(FileNotFoundError):
        read(tmp_path / "missing")
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(InputError, match="pipe: cannot read: a device, pipe or socket is there"):
        read(tmp_path / "pipe")


def test_new_memory_can_be_written_to():
    memory = new_memory(5000)
    memory[:3] = b"abc"
    assert len(memory) == 5000 and bytes(memory[:4]) == b"abc\0"
    assert len(new_memory(0)) == 0


def test_space_is_looked_for_where_the_result_will_be(tmp_path):
    place = tmp_path / "not/yet/there"
    assert free_bytes(place) > 0
    require_space(place, 1, "a commit")
    with pytest.raises(InputError, match=r"there: a commit needs [\d,]+ bytes of disk space, [\d,]+ are free\nhint"):
        require_space(place, 1 << 62, "a commit")


def test_every_folder_that_is_made_is_flushed_with_its_name(tmp_path):
    class Watched(Files):
        def __init__(self):
            self.synced = []

        def sync_folder(self, path):
            self.synced.append(path)
            super().sync_folder(path)

    files = Watched()
    files.make_folder(tmp_path / "a/b/c")
    assert files.synced == [tmp_path, tmp_path / "a", tmp_path / "a/b"]
    files.make_folder(tmp_path / "a/b/c")
    assert len(files.synced) == 3


def test_a_mac_flushes_to_the_disk_itself(tmp_path, monkeypatch):
    """F_FULLFSYNC, which only a Mac has: here it is told by its number."""
    asked = []
    monkeypatch.setattr(storage.sys, "platform", "darwin")
    monkeypatch.setattr(storage.fcntl, "F_FULLFSYNC", 51, raising=False)
    monkeypatch.setattr(storage.fcntl, "fcntl", lambda descriptor, command: asked.append(command))
    Files().write(tmp_path / "file", b"a")
    assert asked == [51]
