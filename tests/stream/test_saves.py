import hashlib
import json

import numpy as np
import pytest

from mbf_mlx.errors import InputError
from mbf_mlx.files.storage import Files
from mbf_mlx.learning.progress import check_shapes, progress_of
from mbf_mlx.stream.records import NewerFormatError
from mbf_mlx.stream.saves import Saved, Working, check_same_run
from tests.support.saves import RUN, save
from tests.support.streams import learn, new_stream


def test_the_newest_save_is_the_one_that_counts_and_the_only_one_kept(tmp_path):
    working = Working(tmp_path / "working", Files())
    assert working.load() is None
    save(working, 5)
    save(working, 10)
    saved = working.load()
    assert saved.progress == {"step": 10} and saved.run == RUN
    np.testing.assert_array_equal(saved.tensors["factor.x"], np.full((2, 3), 10, np.float32))
    assert [folder.name for folder in (tmp_path / "working").iterdir()] == ["step-00000010"]


def test_a_save_that_was_cut_off_is_passed_over(tmp_path):
    working = Working(tmp_path / "working", Files())
    save(working, 5)
    (tmp_path / "working/step-00000009").mkdir()
    (tmp_path / "working/step-00000009/progress.json").write_text('{"run": {}')
    (tmp_path / "working/building").mkdir()
    assert working.load().progress == {"step": 5}
    save(working, 12)
    assert working.load().progress == {"step": 12}
    assert [folder.name for folder in (tmp_path / "working").iterdir()] == ["step-00000012"]


def test_damaged_tensors_are_passed_over(tmp_path):
    working = Working(tmp_path / "working", Files())
    save(working, 5)
    tensors = tmp_path / "working/step-00000005/tensors.safetensors"
    data = bytearray(tensors.read_bytes())
    data[-1] ^= 1
    tensors.write_bytes(data)
    assert working.load() is None


def test_another_run_is_refused_with_what_differs(tmp_path):
    working = Working(tmp_path / "working", Files())
    save(working, 5)
    check_same_run(working.load(), dict(RUN), working.folder)
    message = r"run of task 'mail' was interrupted.*\n  epochs: 3 was saved, 4 is asked for now\nhint: .* --restart"
    with pytest.raises(InputError, match=message):
        check_same_run(working.load(), RUN | {"epochs": 4}, working.folder)


def test_a_run_of_files_or_of_a_stream_that_changed_is_refused_in_words(tmp_path):
    saved = Saved(run={"task": "mail", "sha256": "a" * 64, "generation": 1}, machine={}, progress={}, tensors={})
    with pytest.raises(InputError) as error:
        check_same_run(saved, {"task": "mail", "sha256": "b" * 64, "generation": 2}, tmp_path)
    assert str(error.value).splitlines()[1:] == [
        "  the stream has learned or undone a task since then",
        "  the task's files have changed since then",
        "hint: repeat the earlier command, with the same files, to finish that run, or add --restart to discard it",
    ]


def test_drop_forgets_the_run(tmp_path):
    working = Working(tmp_path / "working", Files())
    save(working, 5)
    working.drop()
    assert working.load() is None and not (tmp_path / "working").exists()


def rewritten(working, change):
    """Write the save once more, with a right checksum, after `change(document)`."""
    file = next(working.folder.glob("step-*")) / "progress.json"
    document = json.loads(file.read_text())
    del document["checksum"]
    change(document)
    document["checksum"] = hashlib.sha256(json.dumps(document, sort_keys=True).encode()).hexdigest()
    file.write_text(json.dumps(document))


def test_a_save_of_today_without_a_version_is_read(tmp_path):
    working = Working(tmp_path / "working", Files())
    save(working, 5)
    rewritten(working, lambda document: document.pop("format_version"))
    assert working.load().progress == {"step": 5}


def test_the_save_of_a_newer_version_is_kept_and_refused(quick_path):
    stream = learn(new_stream(quick_path / "s"), 1)
    save(stream.saves, 5)
    rewritten(stream.saves, lambda document: document.update(format_version=2))
    with pytest.raises(NewerFormatError, match="a newer mbf-mlx has saved this run .format 2, this one reads 1.\nhint"):
        stream.saves.load()
    assert stream.interrupted() is None
    with stream.writer():
        pass
    assert list(stream.working.iterdir())


PROGRESS = {"step": 1, "losses": [1.0]}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"speed": 3}, "progress: speed: unexpected keyword argument"),
        ({"step": "soon"}, "progress: step: input should"),
    ],
)
def test_progress_that_is_no_progress_is_one_sentence(tmp_path, changes, message):
    assert progress_of(PROGRESS, tmp_path).step == 1
    with pytest.raises(InputError, match=f"{tmp_path}: the saved run cannot go on: {message}.*\nhint: add --restart"):
        progress_of(PROGRESS | changes, tmp_path)


SHAPES = {"factor.x": (2, 3), "moment.m.x": (2, 3)}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"factor.x": (3, 2)}, r"factor.x: expected shape \(2, 3\), got \(3, 2\)"),
        ({"factor.y": (2, 3)}, r"factor.y: expected shape none, got \(2, 3\)"),
        ({"best.x": (1, 3)}, r"best.x: expected shape \(2, 3\), got \(1, 3\)"),
        ({"moment.m.x": None}, r"moment.m.x: expected shape \(2, 3\), got none"),
    ],
)
def test_saved_arrays_of_something_else_are_one_sentence(changes, message):
    def arrays(shapes):
        return {name: np.zeros(shape, np.float32) for name, shape in shapes.items() if shape}

    check_shapes(arrays(SHAPES), SHAPES)
    check_shapes(arrays(SHAPES | {"best.x": (2, 3)}), SHAPES)
    with pytest.raises(InputError, match=f"the saved run cannot go on: {message}\nhint: add --restart"):
        check_shapes(arrays(SHAPES | changes), SHAPES)
