import json

import pytest

from mbf_mlx.errors import InputError
from mbf_mlx.stream.folder import StreamFolder
from mbf_mlx.stream.records import LINE_BYTES, parse
from mbf_mlx.stream.repair import repair
from tests.support.streams import contents, identity, learn, new_stream, record


def test_history_grows_by_a_bounded_line_a_task(quick_path):
    full = record(1, labels=["x" * 60] * 64, curve=[(10**6, 12.3456)] * 24, scores=[0.123456] * 50, losses=[1.5] * 50)
    assert len(full.to_json()) <= LINE_BYTES + 50 * 32
    assert parse(type(full), full.to_json(), "here").labels.startswith("sha256:")


def test_identity_round_trips_through_json():
    one = identity()
    assert parse(type(one), one.to_json(), "here") == one


def test_an_unknown_method_field_in_stream_json_is_an_error_with_its_place(quick_path):
    new_stream(quick_path / "s")
    where = quick_path / "s/stream.json"
    where.write_text(json.dumps(json.loads(where.read_text()) | {"rank": "four"}))
    with pytest.raises(InputError, match="stream.json: damaged: rank: input should be a valid integer"):
        StreamFolder.open(quick_path / "s")


def test_a_newer_format_is_refused_with_what_reads_it(quick_path):
    new_stream(quick_path / "s")
    where = quick_path / "s/stream.json"
    where.write_text(json.dumps(json.loads(where.read_text()) | {"format_version": 9, "novelty": 1}))
    with pytest.raises(InputError, match="format version 9, .*reads versions up to 1\nhint: upgrade with: pip"):
        StreamFolder.open(quick_path / "s")


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


@pytest.mark.parametrize("inside", ["current", "generations/000002"])
def test_a_generation_is_not_taken_for_the_stream(quick_path, inside):
    stream = learn(new_stream(quick_path / "s"), 2)
    before = contents(stream.path)
    for action in (StreamFolder.open, repair):
        with pytest.raises(InputError) as caught:
            action(stream.path / inside)
        expected = f"{stream.path / inside}: one generation of a stream, not a stream\nhint: give the stream's folder: "
        assert str(caught.value) == expected + str(stream.path.resolve())
    assert contents(stream.path) == before
