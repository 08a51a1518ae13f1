"""A short run, without guidance, of what `make fuzz` does for ten minutes with atheris.

Every reader takes whole and damaged files, or refuses them with an InputError."""

import random

import pytest

from mbf_mlx.errors import InputError
from tests.fuzz.fuzz import READERS, feed, seeds

INTERESTING = [b"\x00", b"\xff", b"\xff" * 4, b"\x00" * 8, b"\xff" * 7 + b"\x7f"]
INTERESTING += [b"{", b"}", b'"', b"[" * 2000, b"\n", b"1e999"]


@pytest.mark.parametrize("name", READERS)
def test_the_files_that_fuzzing_starts_from_are_read(quick_path, name):
    for seed in seeds(name):
        suffix = {"gguf": "x.gguf", "safetensors": "x.safetensors"}.get(name) or "x" + (
            [".jsonl", ".csv", ".tsv", ".json"][seed[0]]
        )
        path = quick_path / suffix
        path.write_bytes(seed[1:] if name == "task" else seed)
        try:
            READERS[name](path)
        except InputError as error:
            assert "does not fit" in str(error) or "rows" in str(error), error


@pytest.mark.parametrize("name", READERS)
def test_damaged_files_are_refused_and_nothing_worse(quick_path, name):
    dice = random.Random(7)
    for _ in range(250):
        data = bytearray(dice.choice(seeds(name)))
        for _ in range(dice.randint(1, 4)):
            at = dice.randrange(len(data) + 1)
            way = dice.randrange(4)
            if way == 0 and at < len(data):
                data[at] ^= 1 << dice.randrange(8)
            elif way == 1:
                data[at:at] = dice.choice(INTERESTING)
            elif way == 2:
                del data[at : at + dice.randint(1, 9)]
            else:
                piece = dice.choice(INTERESTING)
                data[at : at + len(piece)] = piece
        feed(name, bytes(data), quick_path)
