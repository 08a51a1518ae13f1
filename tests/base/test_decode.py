"""Codes are decoded to the same bits as mlx decodes them."""

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest

from mbf_mlx.base import decode as module
from mbf_mlx.base.decode import BITS, decode
from mbf_mlx.base.unpack import unpack_all


@pytest.mark.parametrize("dtype", [mx.float32, mx.float16, mx.bfloat16])
@pytest.mark.parametrize("group_size", [32, 64, 128])
@pytest.mark.parametrize("bits", BITS)
def test_every_weight_has_the_bits_that_mlx_gives_it(bits, group_size, dtype, monkeypatch):
    monkeypatch.setattr(module, "_PIECE", 1000)  # several pieces, and a smaller one at the end
    generator = np.random.default_rng(bits)
    weight = generator.normal(size=(7, 384)) * 10.0 ** generator.integers(-6, 3, (7, 1))
    words, *others = mx.quantize(mx.array(weight).astype(dtype), group_size=group_size, bits=bits, stream=mx.cpu)
    scales, offsets = (each.astype(mx.float32) for each in others)
    expected = mx.dequantize(words, scales, offsets, group_size=group_size, bits=bits, stream=mx.cpu)
    found = decode(words, scales, offsets, bits)
    assert found.dtype == mx.float32 and len(np.unique(np.array(found))) > 100
    assert np.array_equal(np.array(found).view(np.uint32), np.array(expected).view(np.uint32))


def test_hand_worked_codes_of_four_bits():
    words = mx.array([[0x76543210, 0xFEDCBA98, 0x76543210, 0xFEDCBA98]], mx.uint32)
    found = decode(words, mx.array([[0.5]]), mx.array([[-1.0]]), 4)
    assert found.tolist() == [[code / 2 - 1 for code in [*range(16), *range(16)]]]


def test_codes_that_cross_bytes_are_refused():
    with pytest.raises(ValueError, match=r"decode: expected bits of \(4, 8\), got 3"):
        decode(mx.zeros((1, 3), mx.uint32), mx.ones((1, 1)), mx.ones((1, 1)), 3)


@pytest.mark.parametrize("bits", [3, *BITS])
def test_a_model_is_unpacked_to_what_mlx_gives(bits):
    model = nn.Sequential(nn.Embedding(70, 64), nn.Linear(64, 96), nn.Linear(96, 32, bias=False))
    model.set_dtype(mx.float16)
    nn.quantize(model, group_size=32, bits=bits)
    expected = [
        mx.dequantize(each.weight, *(each[name].astype(mx.float32) for name in ("scales", "biases")), 32, bits)
        for each in model.layers
    ]
    bias = model.layers[1].bias
    unpack_all(model)
    assert [type(each) for each in model.layers] == [nn.Embedding, nn.Linear, nn.Linear]
    for layer, weight in zip(model.layers, expected, strict=True):
        assert np.array_equal(np.array(layer.weight).view(np.uint32), np.array(weight).view(np.uint32))
    assert mx.array_equal(model.layers[1].bias, bias) and "bias" not in model.layers[2]
