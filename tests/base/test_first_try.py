"""A tokenizer that takes any time or memory is refused, and what has passed is not tried again."""

import base64
import json
import shutil

import pytest

from mbf_mlx.base import first_try, tokenizer_child
from mbf_mlx.base.first_try import try_tokenizer
from mbf_mlx.base.tokenizer_child import growth, own_texts
from mbf_mlx.errors import InputError
from mbf_mlx.export.gguf.vocabulary import CONTRACTIONS, LLAMA3, QWEN2, TEKKEN
from tests.conftest import import_mlx

import_mlx()


@pytest.fixture
def base(tiny_llama, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "caches"))
    monkeypatch.setattr(first_try, "SECONDS", 3)
    folder = tmp_path / "base"
    shutil.copytree(tiny_llama, folder)
    return folder


def change(folder, **parts):
    place = folder / "tokenizer.json"
    place.write_text(json.dumps(json.loads(place.read_text()) | parts))


def replaced(pattern, content, kind="String"):
    return {"type": "Replace", "pattern": {kind: pattern}, "content": content}


def chain(*steps, name="normalizers"):
    return {"type": "Sequence", name: list(steps)}


def split(pattern):
    return {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False}


GROW = "may make .* letters of one: expected at most 100"
FAIL = r"it fails for a text of 10,0\d\d letters: Onig: Regex search error"
BOUND = "it takes more than 3 seconds or 6 GB for a few short texts"
BAD = {
    # Only for a letter that no text of the try has.
    "a chain": ({"normalizer": chain(replaced("~", "|" * 50), replaced("|", "^" * 50), replaced("^", "x"))}, GROW),
    "a pattern between all letters": ({"normalizer": replaced("", "x" * 101)}, GROW),
    "a regular expression": ({"normalizer": replaced("~+", "x" * 101, "Regex")}, GROW),
    "a long beginning": ({"normalizer": {"type": "Prepend", "prepend": "x" * 1000}}, GROW),
    "many short steps": ({"normalizer": chain(*[replaced("~", "~~")] * 40)}, GROW),
    "a decoder": ({"decoder": chain(replaced("~", "x" * 1000), name="decoders")}, "its decoder " + GROW),
    "a chain in a chain": ({"normalizer": chain(chain(replaced("~", "|" * 50)), replaced("|", "^" * 50))}, GROW),
    "a pattern that goes back": ({"pre_tokenizer": split("(~+)+$")}, FAIL),
    "a pattern that goes back over pairs": ({"pre_tokenizer": split("(~|~|#~#|~#)*@")}, FAIL),
    "a pattern of ordinary letters that goes back": ({"pre_tokenizer": split("(?:q|qq)+w")}, FAIL),
    "a normalizer that goes back": ({"normalizer": replaced("(~|~)*;", "", "Regex")}, FAIL),
    "padding": (
        {"padding": {"strategy": {"Fixed": 10**9}, "direction": "Right", "pad_to_multiple_of": None, "pad_id": 0,
                     "pad_type_id": 0, "pad_token": "<|endoftext|>"}},
        BOUND,
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD)
def test_a_tokenizer_that_may_take_any_time_or_memory_is_refused(base, case):
    parts, said = BAD[case]
    change(base, **parts)
    with pytest.raises(InputError, match=rf"base: its tokenizer is not used: .*{said}.*\nhint: ") as caught:
        try_tokenizer(base)
    assert str(caught.value).count("\n") == 1


def test_any_other_tokenizer_passes_once_and_is_remembered_by_its_content(base, tmp_path, monkeypatch):
    try_tokenizer(base)
    (passed,) = (tmp_path / "caches/mbf-mlx/tried").iterdir()
    assert passed.stat().st_size == 0
    monkeypatch.setattr(first_try.sys, "executable", "/nowhere")  # nothing is started again
    try_tokenizer(base)
    change(base, normalizer=replaced("~", "x"))
    with pytest.raises(FileNotFoundError):
        try_tokenizer(base)


@pytest.mark.parametrize("text", ["", "{", "[]", "{}", '{"normalizer": 3, "decoder": [1], "model": null}'])
def test_what_is_no_tokenizer_is_left_to_whoever_loads_it(base, text):
    (base / "tokenizer.json").write_text(text)
    try_tokenizer(base)
    (base / "tokenizer.json").unlink()
    try_tokenizer(base)


@pytest.mark.parametrize(
    ("step", "most"),
    [
        (None, 1),
        ({"type": "NFKC"}, 1),
        (replaced(" ", "\u2581"), 1),
        (replaced("abc", "xyz"), 1),
        (replaced("ab", "x" * 10), 5),
        (chain(replaced("\n", "<|LF|>"), replaced("\t", "<|TAB|>"), replaced(" ", "<|S|>")), 7),  # none finds another
        (chain(replaced("\n", "<|LF|>"), replaced("|", "xx")), 12),
        (chain(replaced("a", "bb"), {"type": "Lowercase"}, replaced("c", "dd")), 4),
        (chain({"type": "Precompiled", "precompiled_charsmap": ""}, replaced(" {2,}", "\u2581", "Regex")), 2),
        ({"type": "Precompiled", "precompiled_charsmap": "BAAAAAAAAABh"}, 1),
        (
            {
                "type": "Precompiled",
                "precompiled_charsmap": base64.b64encode(bytes(4) + b"a" * 1800 + bytes(1)).decode(),
            },
            100,
        ),
        ({"type": "Precompiled", "precompiled_charsmap": "x"}, 1),
    ],
)
def test_growth_is_what_a_chain_may_make_of_one_letter(step, most):
    assert growth(step) == pytest.approx(most, rel=0.01)


def test_the_texts_have_the_letters_and_pairs_of_the_patterns():
    texts = list(own_texts({"pre_tokenizer": {"pretokenizers": [split(r"\p{L}+|~#"), replaced("@", "x")]}}))
    begun = {text[:2] for text in texts}
    assert {"~~", "##", "~#", "@@", "aa"} <= begun and "pp" not in begun
    assert all(tokenizer_child.LONG <= len(text) <= tokenizer_child.LONG + 100 for text in texts)


REAL = [LLAMA3, QWEN2, TEKKEN]
UNICODE = [{"type": "NFKD"}, {"type": "StripAccents"}, {"type": "Lowercase"}]


@pytest.mark.parametrize(
    "parts",
    [
        *({"pre_tokenizer": split(pattern.replace("{contractions}", way))} for pattern in REAL for way in CONTRACTIONS),
        {"pre_tokenizer": {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}},
        {"pre_tokenizer": {"type": "BertPreTokenizer"}},
        {"normalizer": chain({"type": "Prepend", "prepend": "▁"}, replaced(" ", "▁"))},
        {"normalizer": chain(replaced("``", '"'), replaced("''", '"'), *UNICODE, replaced(" {2,}", " ", "Regex"))},
        {"decoder": chain(replaced("▁", " "), {"type": "ByteFallback"}, {"type": "Fuse"}, name="decoders")},
    ],
)
def test_the_patterns_of_the_models_that_people_use_pass(base, parts):
    change(base, **parts)
    try_tokenizer(base)


def test_the_real_tokenizer_passes(smollm2, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    try_tokenizer(smollm2)
