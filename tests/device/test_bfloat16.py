"""Products in bfloat16: right to the bit of the rounding, and refused in words where there are none."""

import sys

import numpy as np
import pytest

from mbf_mlx.device import bfloat16

LIBRARY = bfloat16.library()
needs_library = pytest.mark.skipif(LIBRARY is None, reason=bfloat16.reason())


@pytest.fixture
def looked_for_again():
    """What was found is forgotten, before the test and after it."""
    known = (bfloat16._load, bfloat16.trial, bfloat16.is_faster)
    for each in known:
        each.cache_clear()
    yield
    for each in known:
        each.cache_clear()


def as_float64(halves):
    return (halves.astype(np.uint32) << 16).view(np.float32).astype(np.float64)


@needs_library
@pytest.mark.parametrize("turned", [False, True])
@pytest.mark.parametrize(("rows", "out", "inner"), [(1, 7, 5), (33, 192, 576), (64, 300, 64), (257, 96, 130)])
def test_products_are_those_of_the_rounded_numbers(rows, out, inner, turned):
    draw = np.random.default_rng(rows)
    weight = bfloat16._upper(draw.standard_normal((out, inner), np.float32))
    x = bfloat16._upper(draw.standard_normal((rows, out if turned else inner), np.float32))
    onto = draw.standard_normal((rows, inner if turned else out), np.float32)
    packed, found, added = LIBRARY.pack(weight, turned=turned), np.full_like(onto, np.nan), onto.copy()
    packed.multiply(x, found)
    packed.multiply(x, added, add=True)
    right = as_float64(x) @ (as_float64(weight) if turned else as_float64(weight).T)
    np.testing.assert_allclose(found, right, rtol=1e-5, atol=1e-5 * np.abs(right).max())
    np.testing.assert_allclose(added, onto + right, rtol=1e-5, atol=1e-5 * np.abs(right).max())


@needs_library
def test_one_packed_weight_serves_threads_side_by_side():
    from concurrent.futures import ThreadPoolExecutor

    draw = np.random.default_rng(0)
    packed = LIBRARY.pack(bfloat16._upper(draw.standard_normal((96, 64), np.float32)))
    xs = [bfloat16._upper(draw.standard_normal((20, 64), np.float32)) for _ in range(40)]

    def product(x):
        out = np.empty((20, 96), np.float32)
        packed.multiply(x, out)
        return out

    alone = [product(x) for x in xs]
    with ThreadPoolExecutor(4) as pool:
        together = list(pool.map(product, xs))
    np.testing.assert_array_equal(together, alone)


@needs_library
@pytest.mark.parametrize(
    ("x", "out"),
    [
        (np.zeros((2, 5), np.uint16), np.zeros((2, 8), np.float32)),
        (np.zeros((2, 4), np.uint16), np.zeros((3, 8), np.float32)),
        (np.zeros((2, 4), np.float32), np.zeros((2, 8), np.float32)),
        (np.zeros((4, 2), np.uint16).T, np.zeros((2, 8), np.float32)),
        (np.zeros((2, 4), np.uint16), np.zeros((2, 16), np.float32)[:, ::2]),
    ],
)
def test_arrays_that_do_not_fit_never_reach_the_library(x, out):
    with pytest.raises(ValueError, match="^expected "):
        LIBRARY.pack(np.zeros((8, 4), np.uint16)).multiply(x, out)


def test_without_the_package_nothing_is_found_and_the_reason_names_it(monkeypatch, looked_for_again):
    monkeypatch.setattr(bfloat16, "files_of", lambda package: {})
    monkeypatch.setattr(sys, "platform", "linux")
    assert bfloat16.library() is None and not bfloat16.is_faster()
    assert bfloat16.reason() == (
        "MKL, which multiplies in bfloat16, is not installed; pip install 'mbf-mlx[bf16]' brings it"
    )
    with pytest.raises(ValueError, match="is not installed"):
        bfloat16.trial()


def test_a_library_that_does_not_load_is_a_reason_and_no_crash(monkeypatch, tmp_path, looked_for_again):
    (tmp_path / "libmkl_rt.so.3").write_bytes(b"no library")
    monkeypatch.setattr(bfloat16, "files_of", lambda package: {"libmkl_rt.so.3": str(tmp_path / "libmkl_rt.so.3")})
    monkeypatch.setattr(bfloat16.importlib.metadata, "version", lambda package: "2026.2")
    monkeypatch.setattr(sys, "platform", "linux")
    assert bfloat16.library() is None and bfloat16.reason().startswith("MKL 2026.2 does not load: ")


def test_a_cpu_without_units_for_it_takes_float32_and_tries_nothing(monkeypatch, looked_for_again):
    monkeypatch.setattr(bfloat16, "cpu_flags", lambda: frozenset({"avx2", "avx512f"}))
    monkeypatch.setattr(bfloat16, "library", lambda: pytest.fail("a library was loaded"))
    assert not bfloat16.is_faster()


@pytest.mark.parametrize(("halves", "plain", "taken"), [(90, 110, False), (130, 110, False), (550, 110, True)])
def test_precisions_that_are_nearly_as_fast_do_not_change_places_with_the_load(halves, plain, taken):
    assert bfloat16.Trial(bfloat16=halves, float32=plain).is_faster == taken


@needs_library
def test_what_is_faster_is_taken(monkeypatch, looked_for_again):
    monkeypatch.setattr(bfloat16, "cpu_flags", lambda: frozenset({"amx_bf16"}))
    found = bfloat16.trial()
    assert found.bfloat16 > 0 and found.float32 > 0
    assert bfloat16.is_faster() == (found.bfloat16 > bfloat16.MARGIN * found.float32)
    bfloat16.is_faster.cache_clear()
    monkeypatch.setattr(bfloat16, "trial", lambda: bfloat16.Trial(bfloat16=800.0, float32=60.0))
    assert bfloat16.is_faster()
