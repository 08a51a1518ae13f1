"""Where an export may go: nothing is overwritten without --force, nothing foreign ever, and nothing is half there."""

import json
import os
import subprocess
import sys

import pytest

from mbf_mlx.errors import InputError
from mbf_mlx.export.place import LISTING, fresh_file, fresh_folder


def write(out, text="one", **options):
    with fresh_folder(out, **options) as folder:
        (folder / "model.txt").write_text(text)


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def test_a_folder_appears_whole_and_lists_its_files(tmp_path):
    with fresh_folder(tmp_path / "out") as folder:
        (folder / "model.txt").write_text("one")
        assert not (tmp_path / "out").exists()
    assert names(tmp_path) == ["out"]
    assert json.loads((tmp_path / "out" / LISTING).read_text())["files"] == [LISTING, "model.txt"]


def test_an_existing_place_is_refused_without_force(tmp_path):
    write(tmp_path / "out")
    with pytest.raises(InputError, match="exists; choose another place, or replace an earlier export with --force"):
        write(tmp_path / "out", "two")
    assert (tmp_path / "out" / "model.txt").read_text() == "one"


def test_force_replaces_an_earlier_export(tmp_path):
    write(tmp_path / "out")
    write(tmp_path / "out", "two", force=True)
    assert (tmp_path / "out" / "model.txt").read_text() == "two"
    assert names(tmp_path) == ["out"]


@pytest.mark.parametrize("foreign", ["out/notes.txt", "out/deep/notes.txt"])
def test_a_folder_with_a_file_that_we_did_not_write_is_never_replaced(tmp_path, foreign):
    write(tmp_path / "out")
    (tmp_path / foreign).parent.mkdir(exist_ok=True)
    (tmp_path / foreign).write_text("mine")
    with pytest.raises(InputError, match="no export of ours, or holds other files"):
        write(tmp_path / "out", "two", force=True)
    assert (tmp_path / foreign).read_text() == "mine"
    assert (tmp_path / "out" / "model.txt").read_text() == "one"


def test_a_folder_that_is_no_export_is_never_replaced(tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "thesis.tex").write_text("mine")
    with pytest.raises(InputError, match="no export of ours"):
        write(tmp_path / "out", force=True)
    assert (tmp_path / "out" / "thesis.tex").read_text() == "mine"


def test_a_link_is_never_followed_or_replaced(tmp_path):
    write(tmp_path / "real")
    (tmp_path / "out").symlink_to("real")
    with pytest.raises(InputError, match="no export of ours"):
        write(tmp_path / "out", "two", force=True)
    assert (tmp_path / "real" / "model.txt").read_text() == "one"


def test_a_failure_leaves_nothing_and_keeps_what_was_there(tmp_path):
    write(tmp_path / "out")
    with pytest.raises(ZeroDivisionError), fresh_folder(tmp_path / "out", force=True) as folder:
        (folder / "model.txt").write_text("two")
        raise ZeroDivisionError
    assert names(tmp_path) == ["out"]
    assert (tmp_path / "out" / "model.txt").read_text() == "one"


def test_what_a_killed_run_left_is_removed_by_the_next(tmp_path):
    ended = subprocess.Popen([sys.executable, "-c", ""])
    ended.wait()
    stale, alive = tmp_path / f".out.mbf-{ended.pid}", tmp_path / f".out.mbf-{os.getppid()}"
    for folder in (stale, alive):
        folder.mkdir()
        (folder / "half").write_text("")
    write(tmp_path / "out")
    assert names(tmp_path) == [alive.name, "out"]


@pytest.mark.parametrize("place", ["stream", "stream/inside", "."])
def test_an_export_goes_neither_into_nor_around_the_stream(tmp_path, place):
    (tmp_path / "stream").mkdir()
    with pytest.raises(InputError, match="an export must be neither inside nor around"):
        write(tmp_path / place, force=True, forbidden=(tmp_path / "stream",))


def test_a_missing_parent_and_a_full_disk_are_said_before_anything_is_written(tmp_path):
    with pytest.raises(InputError, match="expected its parent folder to exist"):
        write(tmp_path / "no" / "out")
    with pytest.raises(InputError, match=r"the export needs .* bytes of disk space"):
        write(tmp_path / "out", needs=1 << 60)
    assert names(tmp_path) == []


def test_a_file_is_replaced_with_force_only_if_it_is_ours(tmp_path):
    out = tmp_path / "model.gguf"
    with fresh_file(out) as path:
        path.write_text("one")
    with pytest.raises(InputError, match="exists"), fresh_file(out):
        pass
    with pytest.raises(InputError, match="no export of ours"), fresh_file(out, force=True):
        pass
    with fresh_file(out, force=True, is_ours=lambda path: path.read_text() == "one") as path:
        path.write_text("two")
    assert out.read_text() == "two" and names(tmp_path) == ["model.gguf"]


def test_what_was_put_into_the_place_meanwhile_stays(tmp_path):
    out = tmp_path / "out"
    with (
        pytest.raises(InputError, match="out: something was put there .*; the export is .*/out-2"),
        fresh_folder(out) as new,
    ):
        (new / "model.txt").write_text("one")
        out.mkdir()
        (out / "thesis.tex").write_text("mine")
    assert (out / "thesis.tex").read_text() == "mine" and names(tmp_path) == ["out", "out-2"]
    assert (tmp_path / "out-2/model.txt").read_text() == "one"
    file = tmp_path / "model.gguf"
    with pytest.raises(InputError, match="the export is .*/model-2.gguf"), fresh_file(file) as new:
        new.write_text("one")
        file.write_text("mine")
    assert file.read_text() == "mine" and (tmp_path / "model-2.gguf").read_text() == "one"


def test_what_was_added_to_an_earlier_export_meanwhile_stays(tmp_path):
    out = tmp_path / "out"
    write(out)
    (tmp_path / "out-2").mkdir()
    message = "files that we did not export were put there .*; the export is .*/out-3"
    with pytest.raises(InputError, match=message), fresh_folder(out, force=True) as new:
        (new / "model.txt").write_text("two")
        (out / "deep").mkdir()
        (out / "deep/notes.txt").write_text("mine")
    assert (out / "deep/notes.txt").read_text() == "mine" and (out / "model.txt").read_text() == "one"
    assert names(tmp_path) == ["out", "out-2", "out-3"] and (tmp_path / "out-3/model.txt").read_text() == "two"


def test_a_link_that_was_put_into_the_place_meanwhile_stays(tmp_path):
    out, real = tmp_path / "out", tmp_path / "real"
    write(real)
    with pytest.raises(InputError, match="something was put there"), fresh_folder(out) as new:
        (new / "model.txt").write_text("two")
        out.symlink_to("real")
    assert out.is_symlink() and (real / "model.txt").read_text() == "one"
