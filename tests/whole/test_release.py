"""The wheel and the sdist work in empty environments without the checkout; `make release-check` runs these tests.

$MBF_DIST names the folder of the files to check, which are then published. Without it, the files are built here.
"""

import json
import os
import re
import subprocess
import sys
import tarfile
import venv
import zipfile
from email.parser import Parser
from pathlib import Path

import pytest

import mbf_mlx
from mbf_mlx.device import machine
from tests.conftest import ROOT
from tests.support.house import WITHOUT_MLX, modules

pytestmark = [pytest.mark.slow, pytest.mark.release]
KINDS = ("wheel", "sdist")
EXTRAS = ("plain", "cpu", "cuda12", "cuda13")


@pytest.fixture(scope="session")
def files(tmp_path_factory):
    """The wheel, and the sdist that it is built from."""
    folder = Path(os.environ.get("MBF_DIST") or tmp_path_factory.mktemp("dist"))
    if not list(folder.glob("*.whl")):
        pytest.importorskip("build", reason="the package `build` is not installed: pip install build")
        command = [sys.executable, "-m", "build", "--outdir", str(folder), str(ROOT)]
        done = subprocess.run(command, capture_output=True, text=True, timeout=600)
        assert done.returncode == 0, done.stdout + done.stderr
    (wheel,), (sdist,) = folder.glob("*.whl"), folder.glob("*.tar.gz")
    return {"wheel": wheel.resolve(), "sdist": sdist.resolve()}


@pytest.fixture(scope="session")
def installed(files, tmp_path_factory):
    """`installed("wheel", "cpu")` installs into an empty environment and returns its bin folder, or skips."""
    made = {}

    def install(kind, extra):
        if extra.startswith("cuda") and not machine.has_nvidia():
            pytest.skip(f"not run: [{extra}] needs an NVIDIA GPU")
        if extra == "cpu" and sys.platform != "linux":
            pytest.skip("not run: [cpu] is for Linux")
        if (kind, extra) not in made:
            folder = tmp_path_factory.mktemp(f"{kind}-{extra}") / "venv"
            venv.create(folder, with_pip=True)
            what = str(files[kind]) + ("" if extra == "plain" else f"[{extra}]")
            command = [str(folder / "bin" / "python"), "-m", "pip", "install", "--quiet", what]
            done = subprocess.run(command, capture_output=True, text=True, env=outside(), cwd=folder, timeout=1800)
            assert done.returncode == 0, done.stderr
            made[kind, extra] = folder / "bin"
        return made[kind, extra]

    return install


def outside():
    """The environment variables without those that lead to this checkout."""
    ours = ("PYTHONPATH", "VIRTUAL_ENV", "HF_HUB_OFFLINE")
    return {name: value for name, value in os.environ.items() if name not in ours and not name.startswith("MBF_")}


def run(*command, cwd):
    """Run a command outside the checkout and return what it printed."""
    done = subprocess.run(
        [str(each) for each in command], capture_output=True, text=True, cwd=cwd, env=outside(), timeout=3600
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_the_wheel_holds_the_package_and_the_recipes_alone(files):
    with zipfile.ZipFile(files["wheel"]) as archive:
        names, size = set(archive.namelist()), sum(info.file_size for info in archive.infolist())
    metadata = {name for name in names if name.split("/")[0].endswith(".dist-info")}
    assert {name.split("/")[0] for name in names - metadata} == {"mbf_mlx"}
    assert any(name.endswith("licenses/LICENSE") for name in metadata)
    checkout = {str(file.relative_to(ROOT)) for file in modules().values()} | {"mbf_mlx/__init__.py"}
    assert checkout <= names
    recipes = {f"mbf_mlx/recipes/{file.name}" for file in (ROOT / "models").glob("*.toml")}
    assert {name for name in names if name.startswith("mbf_mlx/recipes/")} == recipes
    assert size < 3_000_000


def test_the_sdist_holds_what_the_readme_links_to(files):
    with tarfile.open(files["sdist"]) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    links = {target for target in re.findall(r"\]\(([^)#]+)", readme) if "://" not in target}
    assert links <= names and "tests/conftest.py" in names


def test_the_metadata_says_the_version_the_licence_and_the_extras(files):
    with zipfile.ZipFile(files["wheel"]) as archive:
        (name,) = (each for each in archive.namelist() if each.endswith(".dist-info/METADATA"))
        metadata = Parser().parsestr(archive.read(name).decode())
    assert metadata["Version"] == mbf_mlx.__version__ and mbf_mlx.__version__ in files["sdist"].name
    assert metadata["License-Expression"] == "MIT"
    assert set(EXTRAS) - {"plain"} <= set(metadata.get_all("Provides-Extra"))


def test_the_index_takes_the_metadata_and_renders_the_readme(files):
    for package in ("twine", "readme_renderer"):
        pytest.importorskip(package, reason=f"not run: {package} is not installed: make install-dev")
    checked = run(sys.executable, "-m", "twine", "check", "--strict", *files.values(), cwd=ROOT)
    assert checked.count("PASSED") == 2
    from readme_renderer import markdown

    page = markdown.render((ROOT / "README.md").read_text(encoding="utf-8"))
    assert page and "<table>" in page and "<pre" in page
    assert "test: " not in re.sub(r"<[^>]+>", "", page), "the comments that steer tests show"


@pytest.mark.parametrize("extra", EXTRAS)
@pytest.mark.parametrize("kind", KINDS)
def test_it_runs_in_an_empty_environment(kind, extra, installed, tmp_path):
    folder = installed(kind, extra)
    run(folder / "python", "-m", "pip", "check", cwd=tmp_path)
    assert run(folder / "mbf", "--version", cwd=tmp_path) == f"mbf {mbf_mlx.__version__}\n"
    assert "Commands:" in run(folder / "mbf", "--help", cwd=tmp_path)
    report = json.loads(run(folder / "mbf", "doctor", "--json", cwd=tmp_path))
    has_mlx = extra != "plain" or sys.platform == "darwin"
    assert bool(report["device"]) == has_mlx
    assert not has_mlx or report["device"]["blas"] != "reference"
    names = [name for name in modules() if has_mlx or name in WITHOUT_MLX]
    code = f"import importlib, mbf_mlx\nfor name in {names}: importlib.import_module('mbf_mlx.' + name)\n"
    assert str(folder.parent) in run(folder / "python", "-c", code + "print(mbf_mlx.__file__)", cwd=tmp_path)


def test_the_quickstart_runs_from_the_wheel_without_a_checkout(installed, tmp_path):
    """It fetches 93 MB and trains for minutes; on a busy machine it takes most of an hour."""
    extra = "plain" if sys.platform == "darwin" else "cpu"
    done = run(installed("wheel", extra) / "mbf", "quickstart", "--fast", "--json", cwd=tmp_path)
    result = json.loads(done)
    assert len(result["assistant"]["tasks"]) == 3 and result["answer"].strip()
    assert result["assistant"]["average_accuracy"] > sum(result["base_scores"].values()) / 3
