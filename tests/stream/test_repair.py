import json

import pytest

from mbf_mlx.errors import InputError
from mbf_mlx.stream.folder import StreamFolder
from mbf_mlx.stream.repair import repair
from tests.support.command_line import mbf
from tests.support.streams import contents, learn, new_stream

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
    assert "went back from generation 000002" in repair(quick_path / "s")
    stream = StreamFolder.open(quick_path / "s")
    assert stream.state().t == 1
    learn(stream)
    assert StreamFolder.open(quick_path / "s").state().t == 2


def test_repair_of_a_whole_stream_changes_nothing(quick_path):
    learn(new_stream(quick_path / "s"), 2)
    before = contents(quick_path / "s")
    assert "nothing to repair" in repair(quick_path / "s")
    assert contents(quick_path / "s") == before


def test_a_stream_that_lost_its_identity_is_never_made_anew(quick_path):
    """What it has learned stands in its generations; it says what brings it back."""
    stream = learn(new_stream(quick_path / "s"), 2)
    (stream.path / "stream.json").unlink()
    before = contents(stream.path)
    with pytest.raises(
        InputError, match="not a stream: stream.json is missing\nhint: mbf status .* --repair restores it"
    ):
        new_stream(stream.path, name="b")
    assert contents(stream.path) == before
    repair(stream.path)
    assert StreamFolder.open(stream.path).state().t == 2


def test_damage_in_the_generation_before_is_told_and_stops_nothing_but_undo(quick_path):
    stream = learn(new_stream(quick_path / "s"), 2)
    (stream.path / "generations/000001/history.jsonl").write_bytes(b"")
    done = mbf("status", stream.path)
    assert done.returncode == 0 and "000001/history.jsonl: damaged" in done.stderr, done.stderr
    assert "the current one is not affected" in done.stderr
    document = json.loads(mbf("status", stream.path, "--json").stdout)
    assert document["can_undo"] is False and "000001/history.jsonl: damaged" in document["damaged"]
    said = repair(stream.path)
    assert said.endswith(
        "nothing to repair: its current generation is undamaged; the one before is damaged and cannot be restored, so"
        " the last task cannot be undone"
    )
    assert learn(StreamFolder.open(stream.path)).state().t == 3
    assert json.loads(mbf("status", stream.path, "--json").stdout)["damaged"] is None
