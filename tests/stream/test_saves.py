import numpy as np
import pytest

from mbf_mlx.errors import InputError
from mbf_mlx.files.storage import Files
from mbf_mlx.stream.saves import Working, check_same_run
from tests.support.saves import RUN, save


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


def test_drop_forgets_the_run(tmp_path):
    working = Working(tmp_path / "working", Files())
    save(working, 5)
    working.drop()
    assert working.load() is None and not (tmp_path / "working").exists()
