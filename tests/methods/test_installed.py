"""Methods that installed packages add; the package is the one that docs/methods.md shows."""

import json
import os
import re
import subprocess
import sys
import tomllib

import numpy as np
import pytest

from mbf_mlx.errors import InputError
from mbf_mlx.methods import Pair, empty_state, installed, make, names
from mbf_mlx.methods.slao import Slao
from tests.conftest import ROOT
from tests.support.command_line import mbf
from tests.support.rows import rows_of
from tests.support.streams import learn, new_stream

DOCUMENT = (ROOT / "docs" / "methods.md").read_text(encoding="utf-8")


def block(kind, first):
    """The fenced block of docs/methods.md that begins with these letters."""
    (found,) = [
        each for each in re.findall(rf"^```{kind}\n(.*?)^```$", DOCUMENT, re.M | re.S) if each.startswith(first)
    ]
    return found


def install(folder, code, points, name="mbf-capped"):
    """Leave a package in a folder as `pip install --target` does: its module, and metadata with its entry points."""
    metadata = folder / f"{name.replace('-', '_')}-0.1.dist-info"
    metadata.mkdir(parents=True)
    (metadata / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 0.1\n")
    lines = "".join(f"{method} = {value}\n" for method, value in points.items())
    (metadata / "entry_points.txt").write_text(f"[mbf_mlx.methods]\n{lines}")
    module = next(iter(points.values())).partition(":")[0]
    (folder / f"{module}.py").write_text(code)
    return folder


def documented(folder):
    project = tomllib.loads(block("toml", "[build-system]"))
    code = block("python", '"""Capped')
    assert len(code.splitlines()) <= 30
    assert project["tool"]["setuptools"]["py-modules"] == ["capped"]
    return install(folder, code, project["project"]["entry-points"]["mbf_mlx.methods"], project["project"]["name"])


@pytest.fixture
def site(tmp_path, monkeypatch):
    """`site(code, points, name)`: a package that this process finds as installed."""

    def add(code, points, name="mbf-other"):
        monkeypatch.syspath_prepend(install(tmp_path / name, code, points, name))
        installed._found.cache_clear()

    yield add
    installed._found.cache_clear()


def test_the_documented_method_learns_and_is_compared_in_experiments(tmp_path, tiny_llama, write_jsonl):
    pytest.importorskip("mlx.core", reason="mlx is not installed: pip install 'mbf-mlx[cpu]'")
    environment = {**os.environ, "PYTHONPATH": str(documented(tmp_path / "site"))}
    for number, name in enumerate(("mail", "notes")):
        write_jsonl(f"{name}/test.jsonl", rows_of(3, seed=10 + number))
        write_jsonl(f"{name}/train.jsonl", rows_of(6, seed=number))
    stream, tasks = tmp_path / "s", [tmp_path / "mail", tmp_path / "notes"]
    flags = ["--model", tiny_llama, "--method", "capped", "--method-options", "limit=0.01", "--iters", 2, "--rank", 2]
    done = mbf("learn", stream, *tasks, *flags, "--json", env=environment)
    assert done.returncode == 0, done.stderr
    document = json.loads(done.stdout)
    assert document["method"] == "capped" and len(document["tasks"]) == 2
    plan = tmp_path / "plan.toml"
    plan.write_text(
        f'base = "{tiny_llama}"\ntasks = "{tmp_path}"\n[orders]\none = ["mail", "notes"]\n[train]\niters = 2\n'
        '[lora]\nrank = 2\n[[methods]]\nmethod = "capped"\noptions = {limit = 0.01}\n[[methods]]\nmethod = "slao"\n'
    )
    done = mbf("experiment", plan, "--out", tmp_path / "out", "--json", env=environment)
    assert done.returncode == 0, done.stderr
    cells = json.loads(done.stdout)["cells"]
    assert [cell["method"] for cell in cells] == ["capped", "slao"]
    done = mbf("learn", stream, tasks[0], "--again")  # without the package
    assert done.returncode == 1 and "method: expected one of slao" in done.stderr, done.stderr


def test_the_documented_method_caps_what_a_task_may_move(site):
    site(block("python", '"""Capped'), {"capped": "capped:Capped"}, "mbf-capped")
    method = make("capped", {"limit": 0.5})
    assert names()[-1] == "capped" and method.options == {"limit": 0.5}
    state = method.finish(empty_state({"w": (2, 2)}, 1), {"w": Pair(np.float32([[3, 4]]), np.float32([[0], [1]]))})
    state = method.finish(state, {"w": Pair(np.float32([[3, 14]]), np.float32([[0], [1.25]]))})
    np.testing.assert_allclose(state.deployed["w"].a, [[3, 6.5]])  # may move by 2.5
    np.testing.assert_allclose(state.deployed["w"].b, [[0], [1.25]])
    assert state.deployed["w"].a.dtype == np.float32 and method.absorb(state, state.deployed).t == 3
    with pytest.raises(InputError, match=r"method capped: expected options of limit, got 'share'"):
        make("capped", {"share": 1})


def test_a_name_of_ours_means_our_method(site):
    site("raise SystemExit('imported')\n", {"slao": "thief:Thief"})
    assert isinstance(make("slao"), Slao) and names().count("slao") == 1


METHOD = "from mbf_mlx.methods import Method\nclass Ring(Method):\n    name = 'ring'\n"


@pytest.mark.parametrize(
    ("code", "message"),
    [
        ("import no_such_package\n", r"cannot be loaded: ModuleNotFoundError: No module named 'no_such_package'\nhint"),
        ("def broken(:\n", r"ring_package:Ring of the package mbf-ring cannot be loaded: SyntaxError"),
        ("Other = 1\n", r"cannot be loaded: AttributeError: module 'ring_package' has no attribute 'Ring'"),
        ("class Ring: pass\n", r"expected a subclass of mbf_mlx.methods.Method, got <class 'ring_package.Ring'>"),
        (METHOD.replace("'ring'", "'rings'"), r"expected a class with name = 'ring', got 'rings'"),
        (METHOD, r"does not define finish, start"),
    ],
)
def test_a_package_that_cannot_be_used_is_named_in_one_message(site, code, message, monkeypatch):
    monkeypatch.delitem(sys.modules, "ring_package", raising=False)
    site(code, {"ring": "ring_package:Ring"}, "mbf-ring")
    assert "ring" in names()  # nothing is imported to list it
    with pytest.raises(InputError, match=f"^method ring: .*{message}"):
        make("ring")


def test_two_packages_with_one_name_are_both_named(site):
    site(METHOD, {"ring": "first:Ring"}, "mbf-first")
    site(METHOD, {"ring": "second:Ring"}, "mbf-second")
    message = r"expected one package with this method, got second:Ring of the package mbf-second, first:Ring of the"
    with pytest.raises(InputError, match=message):
        make("ring")


@pytest.mark.parametrize("words", [["--help"], ["status", "s"]], ids=" ".join)
def test_help_and_status_read_no_entry_points(words, tmp_path):
    learn(new_stream(tmp_path / "s"))
    code = (
        f"import sys\nfrom mbf_mlx.commands import app\n"
        f"try: app({words})\nexcept SystemExit as end: assert not end.code\n"
        "installed = sys.modules.get('mbf_mlx.methods.installed')\n"
        "assert installed is None or not installed._found.cache_info().misses"
    )
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=tmp_path, env=environment)
    assert done.returncode == 0, done.stderr
