"""A small stream, and a server for it, which the tests of a file share."""

import pytest

from mbf_mlx.config import LoRAConfig
from tests.support.served import LIMIT, running, teach


@pytest.fixture(scope="module")
def stream(tiny_llama, tmp_path_factory):
    from mbf_mlx import Stream

    folder = tmp_path_factory.mktemp("small")
    stream = Stream.open(folder / "s1", base=str(tiny_llama), lora=LoRAConfig(rank=4))
    teach(stream, folder / "words")
    return stream


@pytest.fixture(scope="module")
def served(stream):
    with running(stream, max_request_bytes=LIMIT) as (server, said):
        yield server, said
