"""Damage to every file of a stream is found and named, and repaired if a whole generation is left."""

import os
import shutil

import numpy as np
import pytest

from mbf_mlx.errors import InputError
from mbf_mlx.stream.folder import StreamFolder
from mbf_mlx.stream.generations import SMALL_FILE
from mbf_mlx.stream.repair import repair, verify_all
from mbf_mlx.stream.saves import Working
from tests.conftest import ROOT
from tests.support.streams import contents, learn, new_stream

NAMES = [
    "manifest.json", "stream.json", "history.jsonl", "state.safetensors", "adapter/adapters.safetensors",
    "adapter/adapter_config.json",
]  # fmt: skip
GOLDEN = ROOT / "tests/golden/stream-v1"


@pytest.fixture
def stream(quick_path):
    """A stream with two tasks, and a third one in training."""
    stream = learn(new_stream(quick_path / "s"), 2)
    run = {"task": "task3", "sha256": "3", "generation": 2}
    Working(stream.working, stream.files).save(7, run, {}, {"step": 7}, {"factor.x": np.ones(4, np.float32)})
    return stream


def damages(path, others, regions):
    """Yield ways to damage a file: (name, new content, or None for a missing file)."""
    data = path.read_bytes()
    for at in sorted({round(i * (len(data) - 1) / max(1, regions - 1)) for i in range(regions)}):
        yield f"bit of byte {at} flipped", data[:at] + bytes([data[at] ^ (1 << (at % 8))]) + data[at + 1 :]
    for length in sorted({0, 1, len(data) // 2, len(data) - 1} - {len(data)}):
        yield f"cut to {length} bytes", data[:length]
    yield "one byte longer", data + b" "
    yield "gone", None
    for other in others:
        if other.read_bytes() != data:
            yield f"that of {other.parent.name}", other.read_bytes()


def put(path, content):
    path.unlink(missing_ok=True)
    if content is not None:
        path.write_bytes(content)


def refused(action, *words):
    with pytest.raises(InputError) as caught:
        action()
    for word in words:
        assert word in str(caught.value)


REGIONS = [pytest.param(6, id="six regions"), pytest.param(10**6, marks=pytest.mark.slow, id="every byte")]


@pytest.mark.parametrize("regions", REGIONS)
@pytest.mark.parametrize("name", NAMES)
def test_a_damaged_file_of_the_current_generation_is_named_and_the_one_before_taken(stream, quick_path, name, regions):
    learn(new_stream(quick_path / "other", name="b"), 2)
    path = stream.path / "generations/000002" / name
    others = [stream.path / "generations/000001" / name, quick_path / "other/generations/000002" / name]
    shutil.copytree(stream.path, quick_path / "whole", symlinks=True)
    for how, content in damages(path, others, regions):
        put(path, content)
        folder = f"000002/{name}" if "of" not in how else "000002"
        refused(lambda: StreamFolder.open(stream.path), folder, "damaged: ", f"mbf status {stream.path} --repair")
        message = repair(stream.path)
        assert message == (
            f"{stream.path}: went back from generation 000002, which is damaged, to 000001; it has learned 1 task"
        ), how
        repaired = StreamFolder.open(stream.path)
        repaired.verify()
        assert repaired.state().t == 1
        shutil.rmtree(stream.path)
        shutil.copytree(quick_path / "whole", stream.path, symlinks=True)


@pytest.mark.parametrize("regions", REGIONS)
@pytest.mark.parametrize("name", NAMES)
def test_a_damaged_file_of_the_generation_before_is_found_by_verify_and_not_gone_back_to(stream, name, regions):
    path = stream.path / "generations/000001" / name
    whole = path.read_bytes()
    before = contents(stream.path)
    for _, content in damages(path, [stream.path / "generations/000002" / name], regions):
        put(path, content)
        assert StreamFolder.open(stream.path).state().t == 2
        hint = "mbf undo cannot go back to generation 000001; the current one is not affected"
        refused(lambda: verify_all(StreamFolder.open(stream.path)), "000001", "damaged: ", hint)
        with stream.writer():
            refused(stream.undo, "000001", "damaged: ")
        assert repair(stream.path).endswith("is damaged and cannot be restored, so the last task cannot be undone")
        put(path, whole)
        assert contents(stream.path) == before
    put(path, b"")
    learn(stream)
    Working(stream.working, stream.files).drop()
    verify_all(stream)


@pytest.mark.parametrize("regions", REGIONS)
def test_a_damaged_stream_json_is_named_and_made_again(stream, quick_path, regions):
    learn(new_stream(quick_path / "other", name="b", rank=2), 2)
    path, before = stream.path / "stream.json", contents(stream.path)
    for how, content in damages(path, [quick_path / "other/stream.json"], regions):
        put(path, content)
        refused(lambda: StreamFolder.open(stream.path), str(stream.path), "--repair")
        assert repair(stream.path) == (
            f"{stream.path}: restored stream.json from generation 000002; it has learned 2 tasks"
        ), how
        assert contents(stream.path) == before, how


@pytest.mark.parametrize("regions", REGIONS)
@pytest.mark.parametrize("name", ["progress.json", "tensors.safetensors"])
def test_a_damaged_save_of_a_task_in_training_is_named_and_not_continued(stream, name, regions):
    path = stream.working / "step-00000007" / name
    whole = path.read_bytes()
    for how, content in damages(path, [], regions):
        put(path, content)
        assert StreamFolder.open(stream.path).interrupted() is None, how
        hint = "run the same mbf learn again; it starts this task from the beginning"
        refused(lambda: verify_all(StreamFolder.open(stream.path)), "step-00000007", "damaged: ", hint)
    put(path, whole)
    assert StreamFolder.open(stream.path).interrupted() == {"task": "task3", "step": 7}


@pytest.mark.parametrize("name", ["current", "adapter"])
@pytest.mark.parametrize(
    "target", ["", "nowhere", "/etc", "..", "current", "adapter", "generations", "generations/2e0", "generations/-1"]
)
def test_a_link_that_leads_elsewhere_is_made_again_at_opening(stream, name, target):
    before = contents(stream.path)
    (stream.path / name).unlink()
    if target:
        os.symlink(target, stream.path / name)
    assert StreamFolder.open(stream.path).state().t == 2
    assert contents(stream.path) == before


def test_a_link_to_a_generation_that_is_not_there_is_damage_that_repair_mends(stream):
    before = contents(stream.path)
    (stream.path / "current").unlink()
    os.symlink("generations/000009", stream.path / "current")
    refused(lambda: StreamFolder.open(stream.path), "000009/manifest.json: damaged: missing", "--repair")
    assert "went back from generation 000009, which is damaged, to 000002" in repair(stream.path)
    assert contents(stream.path) == before


def test_repair_does_not_take_a_whole_generation_that_was_never_committed(stream):
    """A run that is killed before the commit leaves a whole generation. Only the current one counts."""
    target = os.readlink(stream.path / "current")
    learn(stream)
    (stream.path / "current").unlink()
    os.symlink(target, stream.path / "current")
    assert "nothing to repair" in repair(stream.path)
    assert StreamFolder.open(stream.path).state().t == 2
    assert sorted(p.name for p in (stream.path / "generations").iterdir()) == ["000002"]


@pytest.mark.parametrize(
    "name", ["generations", "generations/000002", "stream.json", "lock.json", "current", "adapter"]
)
@pytest.mark.parametrize("what", ["file", "folder", "loop"])
def test_something_else_in_the_place_of_a_part_never_ends_in_a_traceback(stream, name, what):
    path = stream.path / name
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)
    if what == "file":
        path.write_text("other")
    elif what == "folder":
        path.mkdir()
    else:
        os.symlink(path.name, path)
    for action in (StreamFolder.open, repair, StreamFolder.open):
        try:
            action(stream.path)
        except InputError as error:
            assert str(stream.path) in str(error)
    if name not in ("generations", "stream.json"):
        assert StreamFolder.open(stream.path).state().t in (1, 2)


def test_nothing_whole_left_is_said(stream):
    for number in ("000001", "000002"):
        put(stream.path / "generations" / number / "history.jsonl", b"")
    refused(lambda: repair(stream.path), "no undamaged generation is left in generations/")


@pytest.mark.parametrize("where", ["first", "middle", "last"])
def test_damage_deep_inside_a_large_file_is_found_when_it_is_read_and_by_verify(quick_path, where):
    layers = {"model.layers.0.mlp.up_proj": (9000, 60), "model.layers.0.mlp.down_proj": (60, 9000)}
    stream = learn(new_stream(quick_path / "s", rank=40, layers=layers, keys=["mlp.up_proj", "mlp.down_proj"]), 2)
    path = stream.path / "generations/000002/adapter/adapters.safetensors"
    data = bytearray(path.read_bytes())
    assert len(data) > SMALL_FILE
    data[{"first": 400, "middle": len(data) // 2, "last": -1}[where]] ^= 4
    path.write_bytes(data)
    stream = StreamFolder.open(stream.path)  # the fast check reads small files alone
    for action in (lambda: verify_all(stream), stream.state):
        refused(action, "000002/adapter/adapters.safetensors: damaged: its content is not what was committed")
    assert "went back" in repair(stream.path)
    # The same for a generation that undo would return to.
    stream = learn(StreamFolder.open(stream.path))
    path = stream.path / "generations/000001/adapter/adapters.safetensors"
    path.write_bytes(bytes(data))
    with stream.writer():
        refused(stream.undo, "000001/adapter/adapters.safetensors: damaged: ")
    assert stream.state().t == 2


def test_the_golden_stream_of_version_1_opens_and_learns_on(quick_path):
    shutil.copytree(GOLDEN, quick_path / "s", symlinks=True)
    stream = StreamFolder.open(quick_path / "s")
    verify_all(stream)
    assert [record.name for record in stream.history()] == ["task1", "task2"]
    assert stream.interrupted() == {"task": "task3", "step": 2}
    state = stream.state()
    b = state.deployed["model.layers.1.self_attn.v_proj"].b
    assert float(b.astype(np.float64).sum()) == pytest.approx(-0.40687091648578644, abs=1e-12)
    with stream.writer():
        assert stream.undo().name == "task2"
    learn(stream, 2)
    assert StreamFolder.open(quick_path / "s").state().t == 3
