"""The house: what may import what, what the wheel holds, and that a clean install runs."""

import ast
import functools
import importlib.metadata
import os
import re
import shutil
import subprocess
import sys
import tomllib

import pytest

import mbf_mlx
from tests.conftest import ROOT
from tests.support.house import WITHOUT_MLX, modules

# Imports point down these lines, never up; between the wings of one line, and inside a wing, they may not go round in
# circles. Every module stands in one of these wings, or is one of the single modules named here.
LAYERS = [
    ["commands"],
    ["report"],
    ["api", "experiment", "planning"],
    ["learning", "export", "serving", "exchange"],
    ["engine", "memory", "stream"],
    ["data", "base", "adapters"],
    ["methods", "files"],
    ["config", "device"],
    ["reference", "metrics", "errors", "units"],
]


def imports(file):
    """Yield (module, whether at the top level) of every import in a file; "mbf_mlx.x" without its first part."""
    tree = ast.parse(file.read_text(encoding="utf-8"))
    top = {id(node) for node in ast.iter_child_nodes(tree)}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((alias.name, id(node) in top) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{file.name}:{node.lineno}: imports are absolute here"
            for alias in node.names:
                yield f"{node.module}.{alias.name}", id(node) in top


@functools.cache
def our_imports(file):
    """Return the modules of this package that a file imports, in functions, too."""
    known, found = modules(), set()
    for name, _ in imports(file):
        if name.startswith("mbf_mlx."):
            name = name.removeprefix("mbf_mlx.")
            while name and name not in known:
                name = name.rpartition(".")[0]
            found.add(name)
    return found - {""}


def layer(module):
    """Return the line of LAYERS that a module stands in, 0 the highest; None for a module in no wing."""
    return next((number for number, wings in enumerate(LAYERS) if module.partition(".")[0] in wings), None)


def run(code, **environment):
    command = [sys.executable, "-W", "error::DeprecationWarning:mbf_mlx", "-c", code]
    return subprocess.run(
        command, capture_output=True, text=True, cwd=ROOT, timeout=300, env={**os.environ, **environment}
    )


# As if the named packages were not installed: no finder knows them.
BLOCK = """
import importlib, sys
finders = list(sys.meta_path)
class Without:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] not in {names}:
            return next((spec for finder in finders if (spec := finder.find_spec(name, path, target))), None)
    def find_distributions(self, *context):
        for finder in finders:
            for found in getattr(finder, "find_distributions", lambda *context: ())(*context):
                if found.metadata["Name"].replace("-", "_") not in {names}: yield found
sys.meta_path[:] = [Without()]
for name in {modules}:
    try: importlib.import_module("mbf_mlx." + name)
    except Exception as error: print(f"{{name}}: {{error!r}}")
"""


def test_every_module_imports_where_torch_is_not_there():
    done = run(BLOCK.format(names={"torch"}, modules=list(modules())))
    assert done.returncode == 0, done.stderr
    # Where mlx is not installed either, what needs it cannot be imported; the next test says what must.
    assert [line for line in done.stdout.splitlines() if "No module named 'mlx" not in line] == []


def test_the_modules_below_the_backend_import_where_mlx_is_not_there():
    names = [name for name in modules() if name in WITHOUT_MLX or name.partition(".")[0] in WITHOUT_MLX]
    assert {"methods.slao", "device.backend", "commands.doctor"} <= set(names)
    done = run(BLOCK.format(names={"mlx", "mlx_lm", "torch", "transformers"}, modules=names))
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == ""


def test_importing_the_package_computes_and_loads_nothing():
    done = run("import sys, mbf_mlx; print(*sys.modules)")
    loaded = set(done.stdout.split())
    assert not loaded & {"mlx.core", "mlx_lm", "transformers", "numpy", "typer"}


def test_every_module_stands_in_a_wing_and_every_wing_is_there():
    assert [name for name in modules() if layer(name) is None] == []
    assert {wing for wings in LAYERS for wing in wings} == {name.partition(".")[0] for name in modules()}


def test_imports_point_down_the_layers():
    up = [
        f"{module} imports {other}"
        for module, file in modules().items()
        for other in our_imports(file)
        if layer(other) < layer(module)
    ]
    assert up == []


def test_imports_do_not_go_round_in_circles():
    graph = {name: our_imports(file) - {name} for name, file in modules().items()}
    done, open_now = set(), []

    def visit(name):
        assert name not in open_now, "circle: " + " -> ".join([*open_now[open_now.index(name) :], name])
        if name not in done:
            open_now.append(name)
            for other in sorted(graph[name]):
                # A package's own face imports its parts; they may import its siblings.
                visit(other)
            open_now.pop()
            done.add(name)

    for name in graph:
        visit(name)


def test_nothing_imports_torch_and_nothing_reads_pickles():
    unwanted = {"torch", "pickle", "dill", "joblib", "shelve", "marshal"}
    for module, file in modules().items():
        assert not unwanted & {name.partition(".")[0] for name, _ in imports(file)}, module


def test_commands_alone_print():
    for module, file in modules().items():
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in {"print", "input"}:
                assert module.partition(".")[0] == "commands", f"{file.name}:{node.lineno}: commands print, not modules"


def test_every_module_says_what_it_is_for():
    files = {name: file for name, file in modules().items() if file.stat().st_size}  # a wing's __init__.py is empty
    silent = [name for name, file in files.items() if not ast.get_docstring(ast.parse(file.read_text("utf-8")))]
    assert silent == []


def test_what_is_imported_is_declared():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    extras = project["optional-dependencies"]
    declared = {re.split(r"[^\w-]", line)[0] for line in project["dependencies"] + extras["cpu"]}
    distributions = importlib.metadata.packages_distributions()
    # mlx-lm brings these, pinned with it: models, tokenizers, templates, the hub.
    brought = {"transformers", "tokenizers", "jinja2", "huggingface-hub", "sentencepiece", "protobuf"}
    for module, file in modules().items():
        for name, _ in imports(file):
            top = name.partition(".")[0]
            if top == "mbf_mlx" or top in sys.stdlib_module_names:
                continue
            names = {item.lower().replace("_", "-") for item in distributions.get(top, [top])}
            assert names & (declared | brought), f"mbf_mlx.{module} imports {top}, which pyproject.toml does not name"


def test_the_version_stands_in_one_place():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    assert project["project"]["dynamic"] == ["version"]
    assert project["tool"]["hatch"]["version"]["path"] == "mbf_mlx/__init__.py"
    changelog = (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
    assert re.search(rf"^## {re.escape(mbf_mlx.__version__)}\b", changelog, re.MULTILINE)


def test_files_name_no_machine_path():
    pattern = re.compile(r"(?<![\w.])/(?:root|home/\w+|Users/\w+|work)/")
    listed = subprocess.run(["git", "ls-files"], capture_output=True, text=True, cwd=ROOT, check=False)
    if listed.returncode:
        pytest.skip("not a git checkout")
    for name in listed.stdout.splitlines():
        file = ROOT / name
        if name == "tests/test_package.py" or not file.is_file():
            continue
        found = pattern.search(file.read_bytes().decode("utf-8", errors="ignore"))
        assert not found, f"{name} names {found.group()}"


def test_no_test_module_imports_from_another_one():
    """What two of them need stands in tests/support/."""
    pattern = re.compile(r"(?:from|import) +tests(?:\.\w+)*\.test_\w+|from +tests(?:\.\w+)* +import .*\btest_\w+")
    found = [
        f"{file.relative_to(ROOT)}: {line.strip()}"
        for folder in ("tests", "benchmarks")
        for file in sorted((ROOT / folder).rglob("*.py"))
        for line in file.read_text(encoding="utf-8").splitlines()
        if pattern.search(line)
    ]
    assert found == []


@pytest.mark.parametrize(
    ("answers", "message"),
    [
        ("*platform*) echo 3.9.6;; *) exit 1;;", "mbf-mlx needs Python 3.11 or newer; {} is 3.9.6."),
        ("*) exit 127;;", "mbf-mlx needs Python 3.11 or newer; {} is not here."),
        ("*version_info*) echo yes;; *) exit 1;;", "{} cannot make virtual environments; on Debian and Ubuntu:"),
    ],
)
def test_make_says_in_one_line_which_python_it_cannot_use(answers, message, tmp_path):
    if not shutil.which("make"):
        pytest.skip("make is not installed")
    shutil.copy(ROOT / "Makefile", tmp_path)
    (tmp_path / "pyproject.toml").touch()
    python = tmp_path / "python"
    python.write_text(f'#!/bin/sh\ncase "$2" in {answers} esac\n')
    python.chmod(0o755)
    done = subprocess.run(
        ["make", "test", f"PYTHON={python}"], capture_output=True, text=True, cwd=tmp_path, timeout=60
    )
    said = [line for line in done.stderr.splitlines() if not line.startswith("make")]
    assert done.returncode == 2 and len(said) == 1 and said[0].startswith(message.format(python)), done.stderr
    assert not (tmp_path / ".venv").exists()
