"""A base is its weights, its settings and its tokenizer: a stream notices a change of each."""

import json
import shutil
from pathlib import Path

import pytest

from tests.conftest import import_mlx

import_mlx()

from mbf_mlx import Stream  # noqa: E402
from mbf_mlx.base.decisive_files import decisive_files  # noqa: E402
from mbf_mlx.errors import InputError  # noqa: E402
from mbf_mlx.stream.folder import StreamFolder  # noqa: E402
from mbf_mlx.stream.records import Manifest, parse  # noqa: E402
from tests.support.command_line import mbf  # noqa: E402


@pytest.fixture
def base(tiny_llama, tmp_path):
    return Path(shutil.copytree(tiny_llama, tmp_path / "base"))


def change(path, **fields):
    document = json.loads(path.read_text()) | fields if path.exists() else fields
    path.write_text(json.dumps({name: value for name, value in document.items() if value is not None}))


def swap_merges(base):
    path = base / "tokenizer.json"
    document = json.loads(path.read_text())
    document["model"]["merges"].reverse()
    path.write_text(json.dumps(document))


DECISIVE = {
    "rope_theta": ("config.json", lambda base: change(base / "config.json", rope_theta=500000.0)),
    "rms_norm_eps": ("config.json", lambda base: change(base / "config.json", rms_norm_eps=0.1)),
    "a new field": ("config.json", lambda base: change(base / "config.json", logit_scale=2.0)),
    "merges": ("tokenizer.json", swap_merges),
    "added spaces": ("tokenizer_config.json", lambda base: change(base / "tokenizer_config.json", add_bos_token=True)),
    "special tokens": ("special_tokens_map.json", lambda base: change(base / "special_tokens_map.json", eos_token="a")),
    "ends": ("generation_config.json", lambda base: change(base / "generation_config.json", eos_token_id=[2, 3])),
}
HARMLESS = {
    "a version": lambda base: change(base / "config.json", transformers_version="5.9", torch_dtype=None, dtype="x"),
    "an order": lambda base: (base / "config.json").write_text(
        json.dumps(dict(reversed(json.loads((base / "config.json").read_text()).items())), indent=8)
    ),
    "a null": lambda base: change(base / "config.json") or _append_null(base / "config.json"),
    "a card": lambda base: (base / "README.md").write_text("new words"),
}


def _append_null(path):
    path.write_text(path.read_text().rstrip()[:-1] + ', "rope_scaling": null}')


@pytest.mark.parametrize("case", DECISIVE)
def test_what_decides_what_is_computed_changes_its_hash(base, case):
    name, alter = DECISIVE[case]
    before = decisive_files(base)
    alter(base)
    after = decisive_files(base)
    assert {key for key in before.keys() | after.keys() if before.get(key) != after.get(key)} == {name}


@pytest.mark.parametrize("case", HARMLESS)
def test_what_decides_nothing_changes_no_hash(base, case):
    before = decisive_files(base)
    HARMLESS[case](base)
    assert decisive_files(base) == before


def test_a_base_with_other_settings_or_another_tokenizer_is_refused_everywhere(base, tmp_path):
    stream, task = tmp_path / "s", tmp_path / "task.jsonl"
    task.write_text('{"prompt": "a", "completion": "b"}\n' * 4)
    Stream.open(stream, base=str(base)).learn(task, iters=1)
    for case in ("rope_theta", "merges"):
        name, alter = DECISIVE[case]
        whole = (base / name).read_bytes()
        alter(base)
        for words in (
            ("learn", stream, task, "--again"),
            ("generate", stream, "a"),
            ("check", task, "--stream", stream),
        ):
            done = mbf(*words, timeout=120)
            assert done.returncode == 1 and "Traceback" not in done.stderr
            assert f"not the same settings or tokenizer, so it computes something else:\n  {name}: " in done.stderr
        (base / name).write_bytes(whole)
    assert len(Stream.open(stream).learn(task, again=True, iters=1)) == 1


def test_a_stream_that_was_made_before_takes_the_hashes_at_its_next_commit(base, tmp_path):
    stream, task = tmp_path / "s", tmp_path / "task.jsonl"
    task.write_text('{"prompt": "a", "completion": "b"}\n' * 4)
    Stream.open(stream, base=str(base))
    path = stream / "generations" / "000000" / "manifest.json"
    manifest = parse(Manifest, path.read_bytes(), path)
    assert manifest.base_files == decisive_files(base)
    path.write_bytes(manifest.model_copy(update={"base_files": {}}).sealed().to_json())
    assert b"base_files" not in path.read_bytes()
    assert StreamFolder.open(stream).current().manifest.base_files == {}
    Stream.open(stream).learn(task, iters=1)
    assert StreamFolder.open(stream).current().manifest.base_files == decisive_files(base)
    change(base / "config.json", rope_theta=500000.0)
    with pytest.raises(InputError, match="config.json: expected sha256"):
        Stream.open(stream).learn(task, again=True, iters=1)
