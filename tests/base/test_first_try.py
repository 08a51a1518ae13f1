"""A tokenizer that takes any time or memory is refused, and what has passed is not tried again."""

import json
import shutil
import time

import pytest

from mbf_mlx.base import first_try, tokenizer_child
from mbf_mlx.base.first_try import try_tokenizer
from mbf_mlx.errors import InputError
from tests.conftest import import_mlx

import_mlx()

DOUBLES = [{"type": "Replace", "pattern": {"String": "b"}, "content": "bb"}] * 40
IN_TURNS = [
    {"type": "Replace", "pattern": {"String": a}, "content": b * 30} for a, b in (("x", "y"), ("y", "z"), ("z", "q"))
]


@pytest.fixture
def base(tiny_llama, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "caches"))
    monkeypatch.setattr(first_try, "SECONDS", 4)
    folder = tmp_path / "base"
    shutil.copytree(tiny_llama, folder)
    return folder


def with_part(folder, **parts):
    place = folder / "tokenizer.json"
    place.write_text(json.dumps(json.loads(place.read_text()) | parts))


@pytest.mark.parametrize("part", ["normalizer", "decoder"])
@pytest.mark.parametrize("steps", [DOUBLES, IN_TURNS])
def test_steps_that_make_a_text_far_longer_are_refused_whatever_letters_they_wait_for(base, part, steps):
    kind = {"normalizer": "normalizers", "decoder": "decoders"}[part]
    with_part(base, **{part: {"type": "Sequence", kind: steps}})
    with pytest.raises(InputError, match=rf"its tokenizer is not used: its {part} may make [\d,]+ letters of one"):
        try_tokenizer(base)


@pytest.mark.parametrize("pattern", ["(b+)+c", "(?:q|qq)+w"])
def test_a_pattern_that_goes_back_without_end_is_refused_whatever_letters_it_waits_for(base, pattern):
    split = {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False}
    with_part(base, pre_tokenizer={"type": "Sequence", "pretokenizers": [split]})
    began = time.monotonic()
    with pytest.raises(InputError, match=r"its tokenizer is not used: it (fails for a text|takes more than 4 seconds)"):
        try_tokenizer(base)
    assert time.monotonic() - began < 60


@pytest.mark.parametrize(
    ("step", "most"),
    [
        (None, 1),
        ({"type": "NFKC"}, 1),
        ({"type": "Replace", "pattern": {"String": " "}, "content": "\u2581"}, 1),
        ({"type": "Replace", "pattern": {"Regex": "x*"}, "content": "abc"}, 4),
        ({"type": "Prepend", "prepend": "\u2581"}, 2),
        ({"type": "Sequence", "normalizers": DOUBLES[:3]}, 8),
        # Of what one step writes, the others find nothing: as in real decoders of bytes.
        (
            {
                "type": "Sequence",
                "normalizers": [
                    {"type": "Replace", "pattern": {"String": letter}, "content": "--"} for letter in "abcdef"
                ],
            },
            2,
        ),
    ],
)
def test_how_long_a_text_may_become(step, most):
    assert tokenizer_child.growth(step) == most


def test_a_tokenizer_passes_once_and_is_remembered_by_its_content(base, tmp_path, monkeypatch):
    try_tokenizer(base)
    (passed,) = (tmp_path / "caches/mbf-mlx/tried").iterdir()
    assert passed.stat().st_size == 0
    monkeypatch.setattr(first_try.sys, "executable", "/nowhere")  # nothing is started again
    try_tokenizer(base)
    with_part(base, decoder=None)
    with pytest.raises(FileNotFoundError):
        try_tokenizer(base)


def test_the_real_tokenizer_passes(smollm2, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    try_tokenizer(smollm2)


def test_a_file_that_is_no_tokenizer_is_told_by_whoever_loads_it(base):
    (base / "tokenizer.json").write_text("no json")
    try_tokenizer(base)
    (base / "tokenizer.json").unlink()
    try_tokenizer(base)
