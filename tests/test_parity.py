"""Every function of the shared math on every array library and device of this machine, against NumPy in float64.

This finds a backend's faults; that the formulas are right is test_reference.py's. Of pairs of factors, which have many
right answers, the products are compared.
"""

import importlib.util
import inspect
from contextlib import nullcontext

import numpy as np
import pytest

from mbf_mlx import reference
from tests.support.arrays import to_numpy

CLOSE = {"rtol": 2e-5, "atol": 2e-5}  # float32 QR, SVD and sums over matrices of some 40 x 60 of size one
RANK, IN, OUT = 4, 60, 40


@pytest.fixture(scope="module", params=["numpy", "mlx-cpu", "mlx-gpu", "cupy"])
def library(request):
    """(array library, what to run its factorizations in) on one device."""
    if request.param == "numpy":
        yield np, nullcontext
        return
    if request.param == "cupy":
        if importlib.util.find_spec("cupy") is None:
            pytest.skip("not run: CuPy is not installed, it needs an NVIDIA GPU")
        import cupy

        if cupy.cuda.runtime.getDeviceCount() == 0:
            pytest.skip("not run: CuPy finds no GPU")
        yield cupy, nullcontext
        return
    mx = pytest.importorskip("mlx.core", reason="mlx is not installed: pip install 'mbf-mlx[cpu]'")
    if request.param == "mlx-gpu" and not mx.is_available(mx.gpu):
        pytest.skip("not run: this machine has no GPU that mlx can use")
    before = mx.default_device()
    mx.set_default_device(mx.gpu if request.param == "mlx-gpu" else mx.cpu)
    yield mx, lambda: mx.stream(mx.cpu)  # MLX has QR and SVD on the CPU alone
    mx.set_default_device(before)


def product(pair):
    return pair[1] @ pair[0]


def gram(xp, a):
    """The moments of inputs that nothing but A's own directions reach, with some noise: (k, k), positive definite."""
    return a @ a.T / IN


def numbers():
    generator = np.random.default_rng(7)
    shapes = {"a": (RANK, IN), "b": (OUT, RANK), "c": (RANK, IN), "d": (OUT, RANK)}
    found = {name: generator.normal(size=shape) / np.sqrt(RANK) for name, shape in shapes.items()}
    basis = generator.normal(size=(2 * RANK, IN)), generator.normal(size=(2 * RANK, IN))
    return found | {"old": gram(np, basis[0]), "new": gram(np, basis[1])}


def square(sketch):
    """What a sketch stands for: its rows' signs are open."""
    return sketch.T @ sketch


# name -> (does it factorize, what it makes of a, c (rank, in), b, d (out, rank) and old, new (2 rank, 2 rank))
CASES = {
    "orthogonal_init": (True, lambda x: reference.orthogonal_init(x["a"])),
    "signed_qr": (True, lambda x: reference.signed_qr(x["a"])),
    "in_basis": (True, lambda x: product(reference.in_basis(x["a"], x["b"], "balanced"))),
    "merge": (False, lambda x: reference.merge(x["b"], x["d"], reference.merge_weight(3))),
    "move": (True, lambda x: reference.move(x["a"], x["b"], x["c"])),
    "merge_products": (True, lambda x: product(reference.merge_products(x["a"], x["b"], x["c"], x["d"], 0.4, RANK))),
    "stack_pairs": (False, lambda x: product(reference.stack_pairs([(x["a"], x["b"]), (x["c"], x["d"])], [2.0, -1.0]))),
    "cut_rank": (True, lambda x: product(reference.cut_rank(x["a"], x["b"], 2))),
    "split_delta": (True, lambda x: product(reference.split_delta(x["b"] @ x["a"], 3))),
    "input_basis": (True, lambda x: reference.input_basis(x["a"], x["c"])),
    "merge_by_inputs": (
        True,
        lambda x: product(
            reference.merge_by_inputs((x["a"], x["b"]), (x["c"], x["d"]), 0.5, RANK, x["old"], x["new"])[:2]
        ),
    ),
    "sketch_gram": (True, lambda x: square(reference.sketch_gram(x["a"] @ x["c"].T @ x["c"], x["a"]))),
    "merge_sketches": (True, lambda x: square(reference.merge_sketches([x["a"], x["c"]], [0.25, 0.75], RANK))),
    "delta": (False, lambda x: reference.delta(x["a"], x["b"], 2.0)),
    "update_norm": (False, lambda x: reference.update_norm(x["a"], x["b"])),
}
NO_ARRAYS = {"merge_weight", "namespace"}


def test_no_function_of_the_shared_math_is_left_out():
    public = {
        name
        for name, value in inspect.getmembers(reference, inspect.isfunction)
        if value.__module__ == reference.__name__ and not name.startswith("_")
    }
    assert public == set(CASES) | NO_ARRAYS


def test_all_agree_with_numpy_in_float64(library):
    xp, where = library
    exact = numbers()
    here = {name: xp.asarray(value.astype(np.float32)) for name, value in exact.items()}
    wrong = []
    for name, (factorizes, function) in CASES.items():
        with where() if factorizes else nullcontext():
            found = function(here)
            found = found if isinstance(found, tuple) else (found,)
            parts = [to_numpy(each) for each in found]
        expected = function(exact)
        for part, right in zip(parts, expected if isinstance(expected, tuple) else (expected,), strict=True):
            if part.dtype != np.float32 or not np.allclose(part, right, **CLOSE):
                wrong.append(f"{name}: {part.dtype}, off by {np.abs(part - right).max():.1e}")
    assert wrong == []
