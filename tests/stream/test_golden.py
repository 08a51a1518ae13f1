"""The stream that version 0.1.0 wrote, and the script that made it."""

import shutil

import numpy as np

from mbf_mlx.stream.folder import StreamFolder
from mbf_mlx.stream.repair import verify_all
from tests.conftest import ROOT
from tests.golden.make_stream import make_stream
from tests.support.streams import contents, learn

GOLDEN = ROOT / "tests/golden/stream-v1"


def same(state, other):
    """Factors are computed by QR, so a different BLAS may change their last bits."""
    assert (state.t, state.layers, state.rank, state.seed) == (other.t, other.layers, other.rank, other.seed)
    for name, pair in other.deployed.items():
        for ours, theirs in zip(state.deployed[name], pair):
            np.testing.assert_allclose(ours, theirs, atol=1e-6)
    assert state.kept.keys() == other.kept.keys()
    for key, tensors in other.kept.items():
        for name, tensor in tensors.items():
            np.testing.assert_allclose(state.kept[key][name], tensor, atol=1e-6)


def test_the_script_makes_the_golden_stream_again(quick_path):
    ours = make_stream(quick_path / "new")
    verify_all(ours)
    shutil.copytree(GOLDEN, quick_path / "golden", symlinks=True)
    golden = StreamFolder.open(quick_path / "golden")
    assert ours.identity == golden.identity
    assert ours.history() == golden.history()
    assert ours.interrupted() == golden.interrupted() == {"task": "task3", "step": 2}
    same(ours.state(), golden.state())


def test_the_golden_stream_and_a_new_one_write_the_same_files(quick_path):
    """The same files of the same sizes, and the same manifest but for the hashes of tensors."""
    shutil.copytree(GOLDEN, quick_path / "golden", symlinks=True)
    streams = [learn(make_stream(quick_path / "new")), learn(StreamFolder.open(quick_path / "golden"))]
    found = [contents(stream.path) for stream in streams]
    assert found[0].keys() == found[1].keys()
    manifests = [stream.current().manifest.model_dump(exclude={"files", "checksum"}) for stream in streams]
    assert manifests[0] == manifests[1]
    sizes = [{name: file.bytes for name, file in stream.current().manifest.files.items()} for stream in streams]
    assert sizes[0] == sizes[1]
    same(streams[0].state(), streams[1].state())
