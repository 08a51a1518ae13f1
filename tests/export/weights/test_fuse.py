"""The codes, grids and numbers that a fuse stands on."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mbf_mlx.errors import InputError
from mbf_mlx.export.weights import affine
from mbf_mlx.export.weights.checkpoint import Setting
from mbf_mlx.export.weights.fuse import Form, Survival, delta_rows, round_rows
from mbf_mlx.export.weights.tensors import Tensor, Writer, read_headers
from mbf_mlx.methods import Pair


@pytest.mark.parametrize("bits", affine.BITS)
def test_unpacked_codes_mean_what_mlx_says_they_mean(bits, mx):
    weight = mx.random.normal((6, 128), key=mx.random.key(1))
    words, scales, offsets = mx.quantize(weight, group_size=64, bits=bits)
    codes = affine.unpack(np.array(words), bits)
    ours = affine.decode(codes, np.array(scales), np.array(offsets))
    theirs = np.array(mx.dequantize(words, scales, offsets, group_size=64, bits=bits))
    np.testing.assert_allclose(ours, theirs, atol=1e-6)
    np.testing.assert_array_equal(affine.pack(codes, bits), np.array(words))


@given(st.sampled_from(affine.BITS), st.integers(0, 2**32 - 1))
def test_packing_and_unpacking_is_the_identity(bits, seed):
    codes = np.random.default_rng(seed).integers(0, 2**bits, size=(3, 64), dtype=np.uint8)
    words = affine.pack(codes, bits)
    assert words.dtype == np.uint32 and words.shape == (3, 64 * bits // 32)
    np.testing.assert_array_equal(affine.unpack(words, bits), codes)


@pytest.mark.parametrize("dtype", ["F16", "BF16", "F32"])
@pytest.mark.parametrize("bits", [4, 6, 8])
def test_no_weight_is_further_from_its_code_than_half_a_step(bits, dtype):
    weight = np.random.default_rng(0).normal(size=(16, 128)).astype(np.float32)
    scales, offsets = affine.fit(weight, bits, 64, dtype)
    stored = affine.decode(affine.nearest(weight, scales, offsets, bits), scales, offsets)
    step = np.repeat(scales, 64, axis=1)
    # A scale rounded down in storage leaves the largest weight of a group a little outside the grid.
    slack = {"F32": 1e-5, "F16": 2.0**-11, "BF16": 2.0**-8}[dtype] * 2**bits
    assert (np.abs(stored - weight) <= (0.5 + slack) * step).all()


def test_a_group_of_equal_weights_is_kept_exactly():
    weight = np.repeat(np.float32([[0.0], [1.5], [-0.25]]), 64, axis=1)
    scales, offsets = affine.fit(weight, 4, 64, "F16")
    np.testing.assert_array_equal(affine.decode(affine.nearest(weight, scales, offsets, 4), scales, offsets), weight)


def test_a_fused_value_by_hand():
    # W = [0 .. 15] lies on the grid of scale 1; B A * scale adds 2 * [[1], [0]] @ [[1, 1, ...]]: row 0 moves by 2.
    weight = np.stack([np.arange(32) % 16, np.arange(32) % 16]).astype(np.float32)
    pair = Pair(np.ones((1, 32), np.float32), np.float32([[1], [0]]))
    np.testing.assert_array_equal(delta_rows(pair, 2.0), np.repeat(np.float32([[2], [0]]), 32, axis=1))
    tensors, stored = round_rows("layer", weight + delta_rows(pair, 2.0), Form(Setting(4, 32), "F16"))
    np.testing.assert_array_equal(stored[0], weight[0] + 2)
    np.testing.assert_array_equal(stored[1], weight[1])
    np.testing.assert_array_equal(tensors["layer.biases"].ravel(), [2, 0])
    np.testing.assert_array_equal(tensors["layer.scales"].ravel(), [1, 1])
    assert tensors["layer.weight"][0, 0] == 0x76543210


def test_retention_and_error_by_hand():
    survival = Survival()
    weight, delta = np.float32([[3, 4]]), np.float32([[1, 0]])
    survival.add(weight, delta, weight + np.float32([[0.5, 0]]))
    assert (survival.size, survival.retention, survival.error) == (0.2, 0.5, 0.5)
    survival.add(weight, delta, weight + np.float32([[1.5, 1]]))  # kept 1.5, lost .5 along and 1 across
    assert survival.retention == 1.0
    assert survival.error == pytest.approx(np.sqrt((0.25 + 0.25 + 1) / 2))


def test_nothing_learned_is_nothing_lost():
    survival = Survival()
    survival.add(np.ones((2, 2), np.float32), np.zeros((2, 2), np.float32), np.ones((2, 2), np.float32))
    assert (survival.size, survival.retention, survival.error) == (0.0, 1.0, 0.0)


def test_a_written_file_reads_back_row_by_row(tmp_path, mx):
    path = tmp_path / "a.safetensors"
    values = np.arange(12, dtype=np.float32).reshape(4, 3)
    with Writer(path, {"w": Tensor("F32", (4, 3)), "e": Tensor("U8", (0, 2))}, {"format": "mlx"}) as writer:
        writer.write("w", values[2:], 2)
        writer.write("w", values[:2])
    tensors, metadata = read_headers([path])
    np.testing.assert_array_equal(tensors["w"].rows(1, 3), values[1:3])
    assert metadata == {path: {"format": "mlx"}} and tensors["e"].shape == (0, 2)
    np.testing.assert_array_equal(np.array(mx.load(str(path))["w"]), values)


def test_rows_of_another_shape_are_a_wrong_call(tmp_path):
    with Writer(tmp_path / "a.safetensors", {"w": Tensor("F32", (4, 3))}) as writer:
        with pytest.raises(ValueError, match="expected rows of"):
            writer.write("w", np.zeros((4, 2), np.float32))


@pytest.mark.parametrize("damage", ["cut", "text", "empty"])
def test_a_damaged_file_is_the_users_to_know(tmp_path, damage):
    path = tmp_path / "model.safetensors"
    with Writer(path, {"w": Tensor("F32", (4, 3))}) as writer:
        writer.write("w", np.zeros((4, 3), np.float32))
    raw = path.read_bytes()
    path.write_bytes({"cut": raw[:-4], "text": b"hello, I am no weights", "empty": b""}[damage])
    with pytest.raises(InputError, match=r"model\.safetensors"):
        read_headers([path])
