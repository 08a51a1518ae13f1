import numpy as np
import pytest

from mbf_mlx.files.dtypes import BYTES, CONFIG_NAMES, FLOATS, NUMPY, from_float32, name_of, to_float32


def test_every_type_has_the_size_that_numpy_gives_it():
    assert {name: np.dtype(code).itemsize for name, code in NUMPY.items()} == {name: BYTES[name] for name in NUMPY}
    assert set(FLOATS) < set(NUMPY) and set(CONFIG_NAMES) < set(FLOATS)


def test_a_numpy_type_has_one_name():
    for name, code in NUMPY.items():
        assert name_of(np.dtype(code)) == ("U16" if name == "BF16" else name)
    with pytest.raises(ValueError, match="expected one of U64, .*, got complex64"):
        name_of(np.dtype(np.complex64))


def test_bfloat16_is_the_upper_half_of_a_float32():
    bits = np.array([0x3F80, 0xC000, 0x0000, 0x8000, 0x7F80, 0x3E20], np.uint16)
    np.testing.assert_array_equal(to_float32(bits, "BF16"), np.float32([1, -2, 0, -0.0, np.inf, 0.15625]))
    assert np.signbit(to_float32(bits, "BF16")[3])
    np.testing.assert_array_equal(from_float32(to_float32(bits, "BF16"), "BF16"), bits)


def test_every_bfloat16_comes_back_from_float32():
    bits = np.arange(1 << 16, dtype=np.uint16)
    values = to_float32(bits, "BF16")
    numbers = ~np.isnan(values)
    np.testing.assert_array_equal(from_float32(values, "BF16")[numbers], bits[numbers])
    assert (from_float32(values, "BF16")[~numbers] == 0x7FC0).all()


@pytest.mark.parametrize(("dtype", "code"), [("F64", "<f8"), ("F32", "<f4"), ("F16", "<f2")])
def test_numpys_own_floats_are_converted_by_numpy(dtype, code):
    values = np.float32([1.5, -0.1, 65504.0])
    held = from_float32(values, dtype)
    assert held.dtype == np.dtype(code)
    back = to_float32(held, dtype)
    assert back.dtype == np.float32 and not np.shares_memory(back, held)
    np.testing.assert_array_equal(back, values.astype(code).astype(np.float32))


def test_bfloat16_is_rounded_to_the_nearest_and_to_even(mx):
    generator = np.random.default_rng(0)
    values = np.concatenate([generator.normal(size=1000), [0.0, -0.0, 1.00390625, 1.01171875, 1e38, 1e-40]])
    values = np.append(values.astype(np.float32), np.float32(np.inf))
    ours = to_float32(from_float32(values, "BF16"), "BF16")
    np.testing.assert_array_equal(ours, np.array(mx.array(values).astype(mx.bfloat16).astype(mx.float32)))
    assert np.isnan(to_float32(from_float32(np.float32([np.nan]), "BF16"), "BF16"))[0]
