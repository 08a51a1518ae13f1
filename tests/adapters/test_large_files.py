"""A large file of tensors is refused by its header, before the rest is read."""

import resource

import pytest

from mbf_mlx.adapters.mlx_lm import read_tensors
from mbf_mlx.errors import InputError


def test_a_huge_file_that_is_no_adapter_costs_no_memory(tmp_path):
    place = tmp_path / "adapters.safetensors"
    with open(place, "wb") as file:
        file.write((100).to_bytes(8, "little") + b"{" * 100)
        file.truncate(3 << 30)  # sparse
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(InputError, match="damaged safetensors file: not JSON"):
        read_tensors(place)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 100_000  # kB on Linux, bytes on a Mac
