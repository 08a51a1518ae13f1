"""Array libraries for tests of code that is written once for all of them."""

import importlib.util
import json
from pathlib import Path

import numpy as np
import pytest

GOLDEN = json.loads((Path(__file__).parents[1] / "golden" / "algorithm1.json").read_text(encoding="utf-8"))["cases"]
SINGLE = {"rtol": 1e-5, "atol": 2e-6}  # float32: 6e-8 a rounding, some hundred of them
DOUBLE = {"rtol": 1e-12, "atol": 1e-12}
# CuPy exists on NVIDIA machines alone; a hundred skips elsewhere would hide those that matter.
LIBRARIES = ["numpy", "mlx", *(["cupy"] if importlib.util.find_spec("cupy") else [])]


@pytest.fixture(scope="module", params=LIBRARIES)
def xp(request):
    """NumPy, MLX or CuPy, for a whole module so that Hypothesis may use it.

    MLX has QR and SVD on its CPU alone, so it runs there, as the package runs them on a Mac and on CUDA, too.
    """
    if request.param == "numpy":
        return np
    if request.param == "cupy":
        import cupy

        if cupy.cuda.runtime.getDeviceCount() == 0:
            pytest.skip("cupy finds no GPU")
        return cupy
    mx = pytest.importorskip("mlx.core", reason="mlx is not installed: pip install 'mbf-mlx[cpu]'")
    before = mx.default_device()
    mx.set_default_device(mx.cpu)
    request.addfinalizer(lambda: mx.set_default_device(before))
    return mx


def single(xp, values):
    """Return `values` as a float32 array of `xp`."""
    return xp.asarray(np.asarray(values, dtype=np.float32))


def to_numpy(array):
    """Return an array of any library as NumPy's."""
    return np.asarray(array.get() if hasattr(array, "get") else array)
