"""A stranger's model, adapter or name cannot run code, write outside its folder, or use the network."""

import http.server
import json
import os
import re
import shutil
import subprocess
import sys
import threading

import pytest

from mbf_mlx.commands import app
from mbf_mlx.commands.escapes import visible
from mbf_mlx.data.row import BadRow
from mbf_mlx.errors import InputError
from mbf_mlx.stream.folder import StreamFolder
from tests.conftest import ROOT
from tests.support.streams import contents, learn, new_stream

TEMPLATES = {
    "a class of Python's": "{{ ''.__class__.__mro__[1].__subclasses__() }}",
    "the modules that jinja has loaded": "{{ cycler.__init__.__globals__.os.system('touch PLACE') }}",
    "the template's own globals": "{{ self._TemplateReference__context.environment.loader }}{{ lipsum.__globals__ }}",
    "a file": "{% include '/etc/passwd' %}",
    "another template": "{% import 'PLACE' as other %}{{ other }}",
    "a format string": "{{ '{0.__class__.__init__.__globals__}'.format(messages) }}",
    "a change of what it is given": "{{ messages.append(messages[0]) }}",
    "a filter into attributes": "{{ messages | attr('__class__') | attr('__base__') }}{{ missing.x }}",
    "a loop over more than can be": "{% for i in range(10000000000) %}x{% endfor %}",
}


@pytest.mark.parametrize("case", TEMPLATES)
def test_a_malicious_chat_template_is_refused_and_has_done_nothing(quick_path, case):
    pytest.importorskip("mlx_lm", reason="mlx-lm is not installed: pip install 'mbf-mlx[cpu]'")
    from tests.support.encoded import encode, row
    from tests.support.tiny_tokenizers import make_tokenizer

    place = quick_path / "written"
    tokenizer = make_tokenizer(template="{{ messages }}")
    tokenizer._tokenizer.chat_template = TEMPLATES[case].replace("PLACE", str(place))
    tokenizer.has_chat_template = True
    with pytest.raises(BadRow, match="the model's chat template refuses the row: |changes the answer"):
        encode(row(prompt="a", completion="b"), tokenizer)
    assert not place.exists()


@pytest.mark.parametrize("name", ["../../outside", "/tmp/outside", "a/../../outside"])
def test_a_manifest_cannot_name_files_outside_its_generation(quick_path, name):
    """Not even with a fitting checksum: a manifest must list files of a generation."""
    import hashlib

    from mbf_mlx.stream.records import Manifest, parse

    stream = learn(new_stream(quick_path / "s"), 1)
    path = stream.path / "generations/000001/manifest.json"
    manifest = parse(Manifest, path.read_bytes(), path)
    (quick_path / "outside").write_bytes(b"secret")
    record = {"bytes": 6, "sha256": hashlib.sha256(b"secret").hexdigest()}
    files = {**manifest.model_dump()["files"], name: record}
    forged = Manifest(**{**manifest.model_dump(), "files": files}).sealed()
    path.write_bytes(forged.to_json())
    with pytest.raises(ValueError, match="damaged: files: expected names inside the generation, got"):
        StreamFolder.open(stream.path)


def test_reading_a_stream_follows_no_link_to_write(quick_path):
    """The lock of a stranger's stream, or its new names, may be links to a file of ours: that file stays unchanged."""
    from typer.testing import CliRunner

    stream = learn(new_stream(quick_path / "s"), 2)
    ours = quick_path / "ours.txt"
    ours.write_text("mine")
    for name in ("lock.json", "lock.json.new", "current.new", "adapter.new", "stream.json.new", "working"):
        (stream.path / name).symlink_to(ours)
    done = CliRunner().invoke(app, ["undo", str(stream.path)])
    assert done.exit_code == 0, done.output
    assert ours.read_text() == "mine"
    assert not any(path.endswith(".new") for path in contents(stream.path))


def test_no_code_of_a_model_folder_is_run_even_where_somebody_would_say_yes(tiny_llama, tmp_path):
    """transformers asks "run the custom code?" unless it is told; here the answer would be yes."""
    from mbf_mlx import Stream

    base = tmp_path / "base"
    shutil.copytree(tiny_llama, base)
    Stream.open(tmp_path / "s", base=str(base))
    (base / "evil.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w').close()\nclass Evil: pass\n")
    settings = json.loads((base / "tokenizer_config.json").read_text())
    settings |= {"auto_map": {"AutoTokenizer": ["evil.Evil", None]}, "tokenizer_class": "Evil"}
    (base / "tokenizer_config.json").write_text(json.dumps(settings))
    command = [sys.executable, str(ROOT / "cli.py"), "generate", str(tmp_path / "s"), "a", "--max-tokens", "1"]
    done = subprocess.run(command, input="y\n" * 9, capture_output=True, text=True, timeout=300)
    assert "run the custom code" not in done.stdout + done.stderr
    assert not (tmp_path / "ran").exists()


def test_a_pip_in_the_working_folder_is_not_the_one_that_downloads(tmp_path, monkeypatch):
    from mbf_mlx.base import download

    (tmp_path / "pip.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w').close()\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    with pytest.raises(InputError, match="pip could not download it"):
        download._download_wheel("no-such-package==1.0", tmp_path)
    assert not (tmp_path / "ran").exists()


def _linked(place, target):
    place.unlink(missing_ok=True)
    place.symlink_to(target)


FOREIGN_FILES = {
    "a licence": lambda base, secret: _linked(base / "LICENSE", secret),
    "a tokenizer's settings": lambda base, secret: _linked(base / "special_tokens_map.json", secret),
    "weights": lambda base, secret: _linked(base / "model.safetensors", secret),
    "a chain of links": lambda base, secret: (_linked(base / "NOTICE", "a"), _linked(base / "a", secret)),
    "a way up": lambda base, secret: _linked(base / "NOTICE", "../secret"),
    "a link to nothing": lambda base, secret: _linked(base / "NOTICE", "nothing"),
    "a pipe": lambda base, secret: os.mkfifo(base / "generation_config.json"),
    "templates elsewhere": lambda base, secret: _linked(base / "additional_chat_templates", secret.parent),
}


@pytest.mark.parametrize("case", FOREIGN_FILES)
def test_a_model_folder_with_files_of_others_is_refused_by_name(tiny_llama, tmp_path, case):
    from tests.support.command_line import mbf

    base, secret = tmp_path / "base", tmp_path / "secret"
    shutil.copytree(tiny_llama, base)
    secret.write_text("private")
    FOREIGN_FILES[case](base, secret)
    (tmp_path / "task.jsonl").write_text('{"prompt": "a", "completion": "b"}\n' * 4)
    done = mbf("learn", tmp_path / "s", tmp_path / "task.jsonl", "--model", base, timeout=120)
    assert done.returncode == 1 and "cannot use this model folder: expected a file of its own, got " in done.stderr
    assert "Traceback" not in done.stderr and "private" not in done.stdout + done.stderr


def test_links_inside_a_model_folder_and_into_the_hubs_cache_are_its_own(tiny_llama, tmp_path):
    from mbf_mlx.base.sources import check_folder

    repository = tmp_path / "models--org--name"
    snapshot, blobs = repository / "snapshots" / "0123", repository / "blobs"
    snapshot.mkdir(parents=True)
    shutil.copytree(tiny_llama, blobs)
    for path in blobs.iterdir():
        (snapshot / path.name).symlink_to(f"../../blobs/{path.name}")
    check_folder(snapshot)
    inside = tmp_path / "inside"
    shutil.copytree(tiny_llama, inside)
    (inside / "LICENSE.txt").write_text("MIT")
    (inside / "LICENSE").symlink_to("LICENSE.txt")
    check_folder(inside)
    (tmp_path / "linked").symlink_to(inside)
    check_folder(tmp_path / "linked")


@pytest.fixture
def asked():
    """The address of a hub that has nothing, and the list of what it was asked for."""
    seen = []

    class Hub(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            seen.append((self.path, self.headers.get("Authorization")))
            self.send_error(404)

        do_HEAD = do_POST = do_GET

        def log_message(self, *words):
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_address[1]}", seen
    server.shutdown()
    server.server_close()


@pytest.mark.parametrize("recorded", ["evil/model", "smollm2-135m-instruct", "evil\x00/model"])
def test_a_strangers_stream_reaches_no_hub(tiny_llama, tmp_path, asked, recorded):
    from mbf_mlx import Stream
    from mbf_mlx.stream.records import Manifest, parse
    from tests.support.command_line import mbf

    stream, task = tmp_path / "s", tmp_path / "task.jsonl"
    task.write_text('{"prompt": "a", "completion": "b"}\n' * 4)
    Stream.open(stream, base=str(tiny_llama)).learn(task, iters=1)
    manifest = stream / "generations" / "000001" / "manifest.json"
    forged = parse(Manifest, manifest.read_bytes(), manifest).model_copy(update={"base_path": recorded}).sealed()
    manifest.write_bytes(forged.to_json())
    endpoint, seen = asked
    settings = {
        "HF_ENDPOINT": endpoint,
        "HF_HUB_OFFLINE": "0",
        "HF_TOKEN": "hf_secret",
        "HF_HOME": str(tmp_path / "hf"),
    }
    settings["MBF_MODELS"] = str(tmp_path / "models")
    for words in (
        ("generate", stream, "a"), ("eval", stream), ("learn", stream, task, "--again"), ("plan", stream, task),
        ("export", stream, "mlx", tmp_path / "out"), ("check", task, "--stream", stream),
    ):  # fmt: skip
        done = mbf(*words, env={**os.environ, **settings}, timeout=120)
        assert done.returncode == 1 and "its base model is not where it was" in done.stderr, (words, done.stderr)
        assert "Traceback" not in done.stderr
    assert seen == []


EVIL = "\x1b]0;owned\x07\x1b[2J\u202egnp.exe\x9b31m\r\u2066\x7f"


def test_nothing_in_a_strangers_stream_moves_the_terminals_cursor(tmp_path):
    """Through a real terminal: a name in every kind of output, tables and JSON and errors."""
    from tests.support.command_line import on_a_terminal

    stream = learn(new_stream(tmp_path / "s"), 1)
    history = stream.path / "generations/000001/history.jsonl"
    name = json.loads(history.read_text())["name"]
    forge(stream.path / "generations/000001", name, EVIL)
    for words in (
        ("status", stream.path),
        ("status", stream.path, "--json"),
        ("report", stream.path, "--out", tmp_path / "page.html", "--json"),
        ("undo", stream.path),
        ("status", EVIL[:-1]),
    ):
        shown = on_a_terminal(*words)
        assert "owned" in shown or words[0] == "report", shown
        ours = re.sub("\x1b\\[[0-9;]*m|\r\n", "", shown)  # colours and line ends
        assert not re.search("[\x00-\x08\x0b-\x1f\x7f-\x9f\u202e\u2066]", ours), ours
    page = (tmp_path / "page.html").read_text(encoding="utf-8")
    assert "owned" in page and not re.search("[\x00-\x08\x0b-\x1f\x7f-\x9f\u202e\u2066]", page)


def test_ordinary_unicode_is_printed_as_it_is():
    for text in ("a\u00a0b", "\U0001f469\u200d\U0001f4bb", "שלום", "سلام", "naïve 日本語\n\tend"):
        assert visible(text) == text


def forge(generation, name, other):
    """Give a task of a generation another name, with checksums that fit."""
    from mbf_mlx.files.storage import sha256
    from mbf_mlx.stream.records import FileRecord, Manifest, parse

    history, path = generation / "history.jsonl", generation / "manifest.json"
    history.write_text(history.read_text().replace(json.dumps(name), json.dumps(other), 1))
    manifest = parse(Manifest, path.read_bytes(), path)
    data = history.read_bytes()
    files = {**manifest.files, "history.jsonl": FileRecord(bytes=len(data), sha256=sha256(data))}
    path.write_bytes(manifest.model_copy(update={"files": files}).sealed().to_json())
