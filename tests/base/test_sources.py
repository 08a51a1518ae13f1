"""A name becomes a local model folder, or one sentence that says why not; nothing half-written stays.

Long, because it is a table of names and folders, each with the whole message.
"""

import hashlib
import http.server
import json
import os
import shutil
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from mbf_mlx.base import sources
from mbf_mlx.base.fingerprint import fingerprint
from mbf_mlx.base.recipe import HubSource, PackageSource, read_recipe, recipes
from mbf_mlx.base.sources import check_folder, resolve_base
from mbf_mlx.errors import InputError
from tests.conftest import ROOT, import_mlx

import_mlx()
from tests.support.tiny_gguf import write_tiny_gguf  # noqa: E402


@pytest.fixture
def models(tmp_path, monkeypatch):
    """An empty folder for fetched and converted models."""
    monkeypatch.setenv("MBF_MODELS", str(tmp_path / "models"))
    return tmp_path / "models"


@pytest.fixture
def copy(tiny_llama, tmp_path):
    """A copy of the tiny Llama's folder to damage."""
    return Path(shutil.copytree(tiny_llama, tmp_path / "copy"))


# --- local folders and files ---


def test_a_model_folder_is_taken_as_it_is(tiny_llama, models):
    assert resolve_base(tiny_llama) == (tiny_llama, str(tiny_llama))
    assert not models.exists()


def test_a_gguf_file_is_converted_once(tmp_path, models):
    write_tiny_gguf(tmp_path / "tiny one.gguf", tmp_path / "scratch", types="Q4_0")
    said = []
    folder = resolve_base(tmp_path / "tiny one.gguf", report=said.append).path
    assert folder == models / "tiny one"
    assert said == [f"converting tiny one.gguf to {folder}, once"]
    before = {path.name: path.stat().st_mtime_ns for path in folder.iterdir()}
    assert resolve_base(str(tmp_path / "tiny one.gguf"), report=said.append).path == folder
    assert {path.name: path.stat().st_mtime_ns for path in folder.iterdir()} == before
    assert len(said) == 1
    assert [path.name for path in models.iterdir()] == ["tiny one"]
    # the same bytes elsewhere are the same model
    (tmp_path / "elsewhere").mkdir()
    shutil.copy(tmp_path / "tiny one.gguf", tmp_path / "elsewhere")
    assert resolve_base(tmp_path / "elsewhere" / "tiny one.gguf").path == folder


def test_another_gguf_file_of_the_same_name_is_not_mistaken_for_it(tmp_path, models):
    write_tiny_gguf(tmp_path / "tiny.gguf", tmp_path / "scratch", types="Q4_0")
    resolve_base(tmp_path / "tiny.gguf")
    write_tiny_gguf(tmp_path / "tiny.gguf", tmp_path / "scratch", types="Q8_0")
    with pytest.raises(InputError, match="it was made from something else\nhint: remove or rename"):
        resolve_base(tmp_path / "tiny.gguf")


def test_a_conversion_that_fails_leaves_nothing(tmp_path, models):
    write_tiny_gguf(tmp_path / "tiny.gguf", tmp_path / "scratch", types={"ffn_up.weight": "Q5_0", "": "Q4_0"})
    with pytest.raises(InputError, match="of type Q5_0"):
        resolve_base(tmp_path / "tiny.gguf")
    assert list(models.iterdir()) == []
    folder = resolve_base(tmp_path / "tiny.gguf", quantize=4).path
    assert folder.name == "tiny-4bit"
    check_folder(folder)
    assert [path.name for path in models.iterdir()] == ["tiny-4bit"]


def test_quantize_is_checked_and_only_for_gguf_files(tmp_path, tiny_llama, models):
    write_tiny_gguf(tmp_path / "tiny.gguf", tmp_path / "scratch", types="F16", blocks=1)
    with pytest.raises(InputError, match="--quantize: expected one of 2, 3, 4, 5, 6, 8, got 7"):
        resolve_base(tmp_path / "tiny.gguf", quantize=7)
    with pytest.raises(InputError, match="--quantize is for GGUF files\nhint: mlx_lm.convert"):
        resolve_base(tiny_llama, quantize=4)


def test_what_is_no_model_is_refused_with_what_would_be(tmp_path, models, monkeypatch):
    (tmp_path / "loop").symlink_to("loop")
    (tmp_path / "model.safetensors").write_bytes(b"")
    (tmp_path / "notes.txt").write_text("hello")
    for name, message in {
        "smollm": "no such model: expected a model folder, a .gguf file, (.|\n)*recipes are smollm2-135m-instruct, ",
        "": "no such model|expected a config.json",
        "a/b/c": "no such model",
        "../up": "no such model",
        "x" * 5000: "no such model",
        "~nobody-of-this-name/model": "no such model",
        str(tmp_path / "loop"): "no such model",
        str(tmp_path): "not a model folder: expected a config.json in it",
        str(tmp_path / "notes.txt"): "not a GGUF file: expected it to begin with GGUF",
        str(tmp_path / "model.safetensors"): "expected a model's folder or a GGUF file\nhint: give the folder",
    }.items():
        monkeypatch.chdir(tmp_path / ".." if not name else tmp_path)
        with pytest.raises(InputError, match=message):
            resolve_base(name, offline=True)


TEMPLATE = 'tokenizer_config.json: chat_template: expected a text, or a list of {"name": …, "template": …}, got '
TOKENS = "expected a token's number, or a list of them, got "
PARTS = "config.json: quantization: expected group_size and bits, whole numbers above 0, got "
AGAIN = "\nhint: copy the file again from the model's source, or correct that field"
# file, what of it is changed (text: all of it), the message
BAD_FILES = {
    "a number as template": ("tokenizer_config.json", {"chat_template": 7}, TEMPLATE + "7" + AGAIN),
    "true as template": ("tokenizer_config.json", {"chat_template": True}, TEMPLATE + "True" + AGAIN),
    "templates without names": ("tokenizer_config.json", {"chat_template": ["a"]}, TEMPLATE + "['a']" + AGAIN),
    "a template that is none": (
        "tokenizer_config.json",
        {"chat_template": [{"name": "default", "template": None}]},
        TEMPLATE + "[{'name': 'default', 'template': None}]" + AGAIN,
    ),
    "a number by name": (
        "tokenizer_config.json",
        {"chat_template": {"default": 1}},
        TEMPLATE + "{'default': 1}" + AGAIN,
    ),
    "a length in words": (
        "tokenizer_config.json",
        {"model_max_length": "many"},
        "tokenizer_config.json: model_max_length: expected a number of tokens, got 'many'" + AGAIN,
    ),
    "a class without a name": (
        "tokenizer_config.json",
        {"tokenizer_class": 3},
        "tokenizer_config.json: tokenizer_class: expected a name, got 3" + AGAIN,
    ),
    "a list of settings": (
        "tokenizer_config.json",
        "[]",
        "tokenizer_config.json: expected a JSON object, got list" + AGAIN,
    ),
    "settings cut off": (
        "tokenizer_config.json",
        "",
        "tokenizer_config.json: not JSON: Expecting value: line 1 column 1 (char 0)" + AGAIN,
    ),
    "a generation cut off": (
        "generation_config.json",
        "",
        "generation_config.json: not JSON: Expecting value: line 1 column 1 (char 0)" + AGAIN,
    ),
    "a list as generation": (
        "generation_config.json",
        "[]",
        "generation_config.json: expected a JSON object, got list" + AGAIN,
    ),
    "an end in words": (
        "generation_config.json",
        '{"eos_token_id": "</s>"}',
        f"generation_config.json: eos_token_id: {TOKENS}'</s>'{AGAIN}",
    ),
    "an end that is half one": (
        "config.json",
        {"eos_token_id": [2, None]},
        f"config.json: eos_token_id: {TOKENS}[2, None]",
    ),
    "a window in words": (
        "config.json",
        {"sliding_window": "wide"},
        "config.json: sliding_window: expected a whole number, got 'wide'",
    ),
    "positions in words": (
        "config.json",
        {"max_position_embeddings": "8k"},
        "config.json: max_position_embeddings: expected a whole number, got '8k'",
    ),
    "a scaling that is a number": (
        "config.json",
        {"rope_scaling": 8},
        "config.json: rope_scaling: expected a JSON object, got 8",
    ),
    "bits in words": (
        "config.json",
        {"quantization": {"group_size": 32, "bits": "4"}},
        PARTS + "{'group_size': 32, 'bits': '4'}",
    ),
    "groups of nothing": (
        "config.json",
        {"quantization": {"group_size": 0, "bits": 4}},
        PARTS + "{'group_size': 0, 'bits': 4}",
    ),
}


@pytest.mark.parametrize("case", BAD_FILES)
def test_a_model_s_files_that_do_not_fit_are_named_before_anything_is_built(copy, case):
    name, change, message = BAD_FILES[case]
    text = change if isinstance(change, str) else json.dumps(json.loads((copy / name).read_text()) | change)
    (copy / name).write_text(text)
    with pytest.raises(InputError) as caught:
        check_folder(copy)
    assert str(caught.value) == f"{copy}/{message}"


def test_templates_as_models_have_them_are_taken(copy):
    settings = json.loads((copy / "tokenizer_config.json").read_text())
    named = [{"name": "default", "template": "a"}, {"name": "tools", "template": "b"}]
    for template in (None, "a", named, {"default": "a"}):
        settings |= {"chat_template": template, "model_max_length": 1e30}
        (copy / "tokenizer_config.json").write_text(json.dumps(settings))
        check_folder(copy)


def test_a_pipe_in_the_place_of_weights_is_refused_and_not_waited_for(copy):
    (copy / "model.safetensors").unlink()
    os.mkfifo(copy / "model.safetensors")
    with pytest.raises(
        InputError, match="model.safetensors: .* expected a file of its own, got a pipe, socket or device"
    ):
        check_folder(copy)


def test_folders_say_what_they_lack(copy):
    (copy / "tokenizer.json").rename(copy / "other.json")
    with pytest.raises(InputError, match="no tokenizer: expected tokenizer.json or tokenizer.model"):
        check_folder(copy)
    (copy / "model.safetensors").rename(copy / "pytorch_model.bin")
    with pytest.raises(InputError, match="holds pytorch_model.bin\nhint: we never read pickled weights"):
        check_folder(copy)
    (copy / "pytorch_model.bin").rename(copy / "tiny.gguf")
    with pytest.raises(InputError, match="it holds tiny.gguf\nhint: give the .gguf file itself"):
        check_folder(copy)
    for content, message in {
        "{": "not JSON",
        "[1]": "expected a JSON object, got list",
        "[" * 100000: "not JSON",
    }.items():
        (copy / "config.json").write_text(content)
        with pytest.raises(InputError, match=f"config.json: {message}"):
            check_folder(copy)
    (copy / "config.json").unlink()
    (copy / "config.json").mkdir()
    with pytest.raises(InputError, match="config.json: cannot read: a folder is there"):
        check_folder(copy)


def test_a_tensor_in_two_files_is_refused(copy):
    shutil.copy(copy / "model.safetensors", copy / "model-extra.safetensors")
    with pytest.raises(InputError, match=r"tensor .* is in model-extra.safetensors and in model.safetensors"):
        check_folder(copy)


def test_a_damaged_file_never_reaches_mlx(copy):
    content = bytearray((copy / "model.safetensors").read_bytes())
    content[20:24] = b"\xff\xff\xff\xff"
    (copy / "model.safetensors").write_bytes(content)
    with pytest.raises(InputError, match="model.safetensors: damaged safetensors file"):
        resolve_base(copy)


# --- fingerprints ---


def test_a_fingerprint_is_the_sha256_that_its_docstring_describes(tiny_llama, copy):
    import safetensors

    digest = hashlib.sha256()
    tensors = dict(safetensors.deserialize((tiny_llama / "model.safetensors").read_bytes()))
    for name in sorted(tensors):
        entry = tensors[name]
        digest.update(json.dumps([name, entry["dtype"], list(entry["shape"])]).encode() + b"\n" + bytes(entry["data"]))
    assert fingerprint(copy) == digest.hexdigest() == fingerprint(tiny_llama)


def test_a_fingerprint_does_not_depend_on_files_and_their_order(copy, mx):
    before = fingerprint(copy)
    tensors = mx.load(str(copy / "model.safetensors"))
    names = sorted(tensors, reverse=True)
    (copy / "model.safetensors").unlink()
    for number, some in enumerate((names[::2], names[1::2])):
        mx.save_safetensors(str(copy / f"model-{number}.safetensors"), {name: tensors[name] for name in some})
    assert fingerprint(copy) == before


def test_one_bit_makes_another_fingerprint(copy):
    before = fingerprint(copy)
    path = copy / "model.safetensors"
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    os.utime(path, ns=(1, path.stat().st_mtime_ns + 1))
    assert fingerprint(copy) != before


@pytest.fixture
def caches(tmp_path, monkeypatch):
    """The user's folder for caches; files count as settled at once."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "caches"))
    monkeypatch.setattr("mbf_mlx.base.fingerprint.SETTLED_NS", 0)
    return tmp_path / "caches" / "mbf-mlx" / "fingerprints"


def test_the_cache_is_used_while_nothing_touches_the_files_and_only_then(copy, caches):
    expected, path = fingerprint(copy), copy / "model.safetensors"
    (cache,) = caches.iterdir()
    cached = json.loads(cache.read_text())
    cache.write_text(json.dumps(cached | {"sha256": "0" * 64}))
    assert fingerprint(copy) == "0" * 64
    kept = path.stat()
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)  # other weights of the same size, in the same file
    os.utime(path, ns=(kept.st_atime_ns, kept.st_mtime_ns))  # ... with the time kept
    assert fingerprint(copy) not in (expected, "0" * 64)
    content[-1] ^= 1
    path.unlink()
    path.write_bytes(content)
    os.utime(path, ns=(kept.st_atime_ns, kept.st_mtime_ns))
    assert fingerprint(copy) == expected
    for nonsense in ("", "[]", "{}", '{"sha256": 3, "key": null}', "[" * 100000):
        cache.write_text(nonsense)
        assert fingerprint(copy) == expected


def test_files_that_were_just_written_are_not_cached(copy, caches, monkeypatch):
    monkeypatch.setattr("mbf_mlx.base.fingerprint.SETTLED_NS", 3_600_000_000_000)
    fingerprint(copy)
    assert not caches.exists()


def test_a_model_folder_cannot_bring_a_fingerprint_along(copy, caches):
    from mbf_mlx.base.fingerprint import _key

    expected = fingerprint(copy)
    shutil.rmtree(caches)
    forged = json.dumps({"sha256": "0" * 64, "key": _key([copy / "model.safetensors"])})
    (copy / ".mbf_fingerprint.json").write_text(forged)
    before = sorted(copy.iterdir())
    assert fingerprint(copy) == expected
    assert sorted(copy.iterdir()) == before


@pytest.mark.parametrize("home", [None, "", "relative", "/dev/null"])
def test_without_a_folder_for_caches_there_is_no_cache(copy, tmp_path, monkeypatch, home):
    import pwd

    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setattr("mbf_mlx.base.fingerprint.SETTLED_NS", 0)
    if home is None:
        monkeypatch.delenv("HOME")
        monkeypatch.setattr(pwd, "getpwuid", {}.__getitem__)  # a user without an entry, as in a container
    else:
        monkeypatch.setenv("HOME", home)
    before = sorted(tmp_path.iterdir())
    assert len(fingerprint(copy)) == 64
    assert sorted(tmp_path.iterdir()) == before


# --- recipes ---


def test_the_recipes_are_those_that_the_readme_promises_and_say_what_was_run():
    known = recipes()
    assert next(iter(known)) == "smollm2-135m-instruct"
    assert {name for name, recipe in known.items() if recipe.run_by_us} == {"smollm2-135m-instruct"}
    assert set(known) == {
        "smollm2-135m-instruct", "llama-2-7b-chat", "llama-3.2-1b-instruct", "llama-3.2-3b-instruct",
        "llama-3.1-8b-instruct", "tinyllama-1.1b-chat",
    }  # fmt: skip
    assert isinstance(known["smollm2-135m-instruct"].source, PackageSource)
    for recipe in known.values():
        assert recipe.run_by_us or (
            isinstance(recipe.source, HubSource) and recipe.source.hub.startswith("mlx-community/")
        )


RECIPE = (ROOT / "models" / "smollm2-135m-instruct.toml").read_text() if (ROOT / "models").is_dir() else ""
BAD_RECIPES = {
    "not TOML": ("name = ", "not readable as TOML"),
    "another name": (RECIPE.replace('name = "smollm2', 'name = "smollm3'), "expected 'tiny', as the file is called"),
    "a field too many": (RECIPE + 'colour = "red"\n', "lora.*colour: Extra inputs are not permitted"),
    "no licence": (RECIPE.replace("licence", "license"), "licence: Field required"),
    "a short hash": (RECIPE.replace('sha256 = "b179', 'sha256 = "'), "sha256: String should match"),
    "run perhaps": (RECIPE.replace("run_by_us = true", 'run_by_us = "perhaps"'), "run_by_us: Input should be a valid"),
}


@pytest.mark.parametrize("name", BAD_RECIPES)
def test_a_recipe_that_does_not_fit_is_refused(tmp_path, name):
    content, message = BAD_RECIPES[name]
    (tmp_path / "tiny.toml").write_text(content)
    with pytest.raises(InputError, match=message):
        read_recipe(tmp_path / "tiny.toml")


# --- the hub: huggingface_hub itself against a server of ours ---


class Hub(http.server.BaseHTTPRequestHandler):
    """The part of the hub's HTTP interface that a download needs; `served` is a folder, `asked` what was asked for."""

    served: Path
    asked: list[str]
    commit = "a" * 40

    def do_HEAD(self):
        self.do_GET()

    def do_GET(self):
        path = self.path.split("?")[0]
        self.asked.append(path)
        if "/gated/" in path:
            return self.refuse(403, "GatedRepo", "Access to this model is restricted")
        if "/missing/" in path:
            return self.refuse(401, "RepoNotFound", "Repository Not Found")
        if "/broken/" in path:
            return self.refuse(500, "", "Internal Error")
        if path.startswith("/api/models/") and "/revision/" in path and not path.endswith(("/main", self.commit)):
            return self.refuse(404, "RevisionNotFound", "Invalid rev id")
        names = [file.name for file in self.served.iterdir()]
        if path.startswith("/api/models/") and "/tree/" in path:
            entries = [self.entry(name) for name in names]
            return self.answer(json.dumps(entries).encode(), "application/json")
        if path.startswith("/api/models/"):
            info = {"id": "tiny/llama", "sha": self.commit, "siblings": [{"rfilename": name} for name in names]}
            return self.answer(json.dumps(info).encode(), "application/json")
        content = (self.served / path.rpartition("/")[2]).read_bytes()
        return self.answer(content, "application/octet-stream", self.entry(path.rpartition("/")[2])["oid"])

    def entry(self, name):
        content = (self.served / name).read_bytes()
        return {"type": "file", "path": name, "size": len(content), "oid": hashlib.sha1(content).hexdigest()}

    def refuse(self, status, code, message):
        self.send_response(status)
        self.send_header("X-Error-Code", code)
        self.send_header("X-Error-Message", message)
        self.send_header("Content-Length", "0")
        self.end_headers()

    def answer(self, content, kind, etag=None):
        self.send_response(200)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(content)))
        self.send_header("X-Repo-Commit", self.commit)
        if etag:
            self.send_header("ETag", f'"{etag}"')
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(content)

    def log_message(self, *values):
        pass


@pytest.fixture
def hub(tmp_path, copy):
    """A hub that has `tiny/llama`, with a pickle and a Python file in it that nobody may ask for."""
    (copy / "pytorch_model.bin").write_bytes(b"cos\nsystem\n(S'touch ran'\ntR.")
    (copy / "modeling.py").write_text("raise SystemExit('this ran')")
    (copy / "consolidated.safetensors").write_bytes(b"the same weights once more")
    (copy / "README.md").write_text("A tiny Llama.")
    handler = type("Served", (Hub,), {"served": copy, "asked": []})
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_address[1]}", handler.asked
    server.shutdown()
    server.server_close()


RESOLVE = """
import sys
from mbf_mlx.errors import InputError
from mbf_mlx.base.sources import resolve_base
try:
    found = resolve_base(sys.argv[1], revision=sys.argv[2] or None, offline=sys.argv[3] == "offline")
    print(found.path)
except InputError as error:
    print("InputError:", error)
"""


@pytest.fixture
def ask(tmp_path):
    """Resolve a hub name in a process of its own, as the hub's address is read when its library is imported."""

    def resolve(name, endpoint, revision="", offline="", **environment):
        variables = {"HF_ENDPOINT": endpoint, "HF_HOME": str(tmp_path / "hf"), "HF_HUB_OFFLINE": "0", **environment}
        variables |= {"PYTHONPATH": str(ROOT), "HF_HUB_DISABLE_TELEMETRY": "1", "HF_HUB_ETAG_TIMEOUT": "2"}
        done = subprocess.run(
            [sys.executable, "-c", RESOLVE, name, revision, offline],
            env={**os.environ, **variables}, capture_output=True, text=True, cwd=tmp_path,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        return done.stdout.strip()

    return resolve


NOWHERE = "http://127.0.0.1:9"


def test_a_hub_model_is_downloaded_without_pickles_and_code_and_then_works_offline(hub, ask, tiny_llama):
    endpoint, asked = hub
    folder = Path(ask("tiny/llama", endpoint))
    assert fingerprint(folder) == fingerprint(tiny_llama)
    names = {path.name for path in folder.iterdir()}
    assert names == {"config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json", "README.md"}
    assert not [path for path in asked if path.endswith((".bin", ".py", "consolidated.safetensors"))]
    asked.clear()
    for way in ({"offline": "offline"}, {"HF_HUB_OFFLINE": "1"}):
        assert ask("tiny/llama", endpoint, **way) == str(folder)
    assert asked == []
    assert ask("tiny/llama", NOWHERE) == str(folder)  # not reachable is no reason either


def test_a_copy_that_another_tool_cached_without_the_readme_works_offline(hub, ask, tmp_path):
    endpoint, _ = hub
    folder = Path(ask("tiny/llama", endpoint))
    (folder / "README.md").unlink()
    assert ask("tiny/llama", NOWHERE) == str(folder)


def test_each_hub_failure_has_its_own_sentence(hub, ask):
    endpoint, _ = hub
    gated = ask("gated/llama", endpoint)
    assert "gated/llama: its owner asks you to accept a licence first" in gated
    assert f"hint: accept it at {endpoint}/gated/llama, then log in with `hf auth login`" in gated
    assert "missing/llama: the hub has no such model, or it is private" in ask("missing/llama", endpoint)
    assert "tiny/llama: it has no revision 'v9'" in ask("tiny/llama", endpoint, revision="v9")
    assert f"tiny/other: cannot reach {NOWHERE}/tiny/other, and this machine has no" in ask("tiny/other", NOWHERE)
    assert "tiny/other: offline as asked, and this machine has no complete copy" in ask(
        "tiny/other", endpoint, offline="offline"
    )
    assert "InputError: broken/llama: " in ask("broken/llama", endpoint)


def test_a_hub_folder_that_is_no_model_is_refused(hub, ask, copy):
    endpoint, _ = hub
    (copy / "config.json").unlink()
    assert "not a model folder: expected a config.json in it" in ask("tiny/llama", endpoint)


def test_a_recipe_from_the_hub_becomes_a_whole_folder_of_its_own(tiny_llama, models, tmp_path):
    from mbf_mlx.base.sources import _copy_snapshot, _describe, _new_folder

    recipe = recipes()["llama-3.2-1b-instruct"]
    snapshot = tmp_path / "snapshot"
    snapshot.mkdir()
    for path in tiny_llama.iterdir():
        (snapshot / path.name).symlink_to(path)  # as the hub's cache has it
    (snapshot / "original").mkdir()
    (snapshot / "original/params.json").write_text("{}")
    with _new_folder(models / recipe.name) as partial:
        _copy_snapshot(snapshot, partial)
        _describe(partial, {"hub": "x"}, recipe)
    shutil.rmtree(snapshot)
    assert sources.fetch(recipe, offline=True) == models / recipe.name
    assert not any(path.is_symlink() for path in (models / recipe.name).iterdir())
    assert "license: llama3.2" in (models / recipe.name / "README.md").read_text()
    assert fingerprint(models / recipe.name) == fingerprint(tiny_llama)
