"""`mbf export`, from a stream that learned something to a folder that other programs load."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from mbf_mlx.config import LoRAConfig, TrainConfig
from mbf_mlx.errors import InputError
from tests.conftest import ROOT
from tests.support.rows import rows_of

pytest.importorskip("mlx.core", reason="mlx is not installed: pip install 'mbf-mlx[cpu]'")

from mbf_mlx import Stream


@pytest.fixture(scope="module")
def taught(tiny_llama, tmp_path_factory):
    """A stream that has learned one task, and the task's folder."""
    folder = tmp_path_factory.mktemp("taught")
    task = folder / "words"
    task.mkdir()
    for split, count in (("train", 16), ("test", 6)):
        rows = rows_of(count, seed=len(split))
        (task / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    stream = Stream.open(folder / "stream", base=str(tiny_llama), lora=LoRAConfig(rank=4))
    stream.learn(task, train=TrainConfig(epochs=2, batch_size=4, learning_rate=5e-3))
    return folder / "stream", task


def mbf(*arguments):
    command = [sys.executable, str(ROOT / "cli.py"), *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=dict(os.environ), timeout=300)


def test_a_stream_leaves_as_a_model_that_was_compared_on_its_held_out_rows(taught, tmp_path):
    done = mbf("export", taught[0], "mlx", tmp_path / "out", "--json")
    assert done.returncode == 0, done.stderr
    document = json.loads(done.stdout)
    assert document["target"] == "mlx" and document["out"] == str(tmp_path / "out")
    assert document["quality"]["rows"] == 6
    assert document["quality"]["source"] == "held-out rows of 1 task"
    assert document["quality"]["agreement"] >= 0.8  # a random model has close calls
    assert "words" in (tmp_path / "out" / "README.md").read_text()
    text = mbf("export", taught[0], "mlx", tmp_path / "out", "--force")
    assert text.returncode == 0, text.stderr
    assert "of the update is in the weights" in text.stdout and "mlx_lm.generate" in text.stderr


def test_no_row_of_a_task_goes_into_an_export(taught, tmp_path):
    texts = [json.loads(line)["prompt"] for line in (taught[1] / "train.jsonl").read_text().splitlines()]
    for target in ("mlx", "adapter", "peft"):
        Stream.open(taught[0]).export(target, tmp_path / target)
        for file in (tmp_path / target).rglob("*"):
            written = file.read_bytes()
            assert not [text for text in texts if len(text) > 12 and text.encode() in written]


def test_the_adapter_target_gives_the_bytes_of_the_streams_own_adapter(taught, tmp_path):
    Stream.open(taught[0]).export("adapter", tmp_path / "out")
    ours, exported = taught[0] / "adapter", tmp_path / "out"
    assert (exported / "adapters.safetensors").read_bytes() == (ours / "adapters.safetensors").read_bytes()


def test_rows_that_have_gone_are_named_and_the_export_still_made(taught, tmp_path):
    moved = taught[1].with_name("moved")
    taught[1].rename(moved)
    try:
        document = Stream.open(taught[0]).export("mlx", tmp_path / "out")
    finally:
        moved.rename(taught[1])
    assert document["quality"] is None
    assert "is not there any more" in document["notes"][0]


def test_calibration_rows_take_the_place_of_the_tasks(taught, tmp_path):
    text = tmp_path / "text.txt"
    text.write_text("\n\n".join(f"Paragraph {number} says a little about the weather." for number in range(8)))
    document = Stream.open(taught[0]).export("mlx", tmp_path / "out", calibration=text)
    assert document["quality"]["rows"] == 4 and document["quality"]["source"] == "rows of text.txt"
    with pytest.raises(InputError, match="no such file"):
        Stream.open(taught[0]).export("mlx", tmp_path / "other", calibration=tmp_path / "none.txt")


def test_a_stream_that_learned_nothing_and_a_place_inside_it_are_refused(taught, tiny_llama, tmp_path):
    empty = Stream.open(tmp_path / "empty", base=str(tiny_llama), lora=LoRAConfig(rank=4))
    with pytest.raises(InputError, match="nothing to export"):
        empty.export("mlx", tmp_path / "out")
    done = mbf("export", taught[0], "mlx", taught[0] / "inside")
    assert done.returncode == 1 and "an export must be neither inside nor around" in done.stderr
    assert "Traceback" not in done.stderr
    assert not (taught[0] / "inside").exists()


def test_what_is_exported_is_what_the_stream_deploys(taught, tmp_path):
    from mbf_mlx.export.weights.checkpoint import Checkpoint

    stream = Stream.open(taught[0])
    stream.export("mlx", tmp_path / "out", bits=32)
    before, after = Checkpoint(Path(stream.base_path)), Checkpoint(tmp_path / "out")
    for name, pair in stream.folder.state().deployed.items():
        delta = stream.folder.identity.scale * pair.b @ pair.a
        np.testing.assert_allclose(after.layer(name).rows() - before.layer(name).rows(), delta, atol=1e-5)
