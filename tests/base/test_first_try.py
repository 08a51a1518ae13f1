"""A tokenizer or template that takes any time or memory is refused, and what has passed is not tried again."""

import json
import shutil
import time

import pytest

from mbf_mlx.base import first_try
from mbf_mlx.base.first_try import try_tokenizer
from mbf_mlx.errors import InputError
from tests.conftest import import_mlx

import_mlx()

LONG = "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}"
FULL = (
    "{% set ns = namespace(x='a' * 1000) %}{% for i in range(60) %}{% set ns.x = ns.x + ns.x %}{% endfor %}{{ ns.x }}"
)
TALKS = "{% for i in range(99999) %}{% for j in range(9999) %}{{ 'word ' * 100 }}{% endfor %}{% endfor %}"


@pytest.fixture
def base(tiny_llama, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "caches"))
    monkeypatch.setattr(first_try, "SECONDS", 3)
    folder = tmp_path / "base"
    shutil.copytree(tiny_llama, folder)
    return folder


def with_template(folder, template):
    place = folder / "tokenizer_config.json"
    place.write_text(json.dumps(json.loads(place.read_text()) | {"chat_template": template}))


@pytest.mark.parametrize("template", [LONG, FULL, TALKS, [{"name": "default", "template": LONG}]])
def test_a_template_without_an_end_is_refused(base, template):
    with_template(base, template)
    began = time.monotonic()
    with pytest.raises(InputError, match=r"its tokenizer or chat template takes more than 3 seconds or 6 GB"):
        try_tokenizer(base)
    assert time.monotonic() - began < 60


@pytest.mark.parametrize("template", ["{{ messages[0].content }}", "{{ raise_exception('no') }}", "{% broken", None])
def test_any_other_template_passes_once_and_is_remembered_by_its_content(base, template, tmp_path, monkeypatch):
    with_template(base, template)
    try_tokenizer(base)
    (passed,) = (tmp_path / "caches/mbf-mlx/tried").iterdir()
    assert passed.stat().st_size == 0
    monkeypatch.setattr(first_try.sys, "executable", "/nowhere")  # nothing is started again
    try_tokenizer(base)
    with_template(base, LONG)
    with pytest.raises(FileNotFoundError):
        try_tokenizer(base)
