"""docs/architecture.md names every file of the package, and no other, with a clause on what it holds."""

import re
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
PACKAGE = ROOT / "mbf_mlx"
TEXT = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
WALK_AT_MOST = 12  # numbered places that a reader enters from the command line to the commit


def tree():
    """Return the tree of the page, "engine/choose.py" -> its clause; a folder's path ends in "/"."""
    found, above = {}, []
    lines = re.search(r"^```text\nmbf_mlx/\n(.*?)^```$", TEXT, re.MULTILINE | re.DOTALL)[1].splitlines()
    for line in lines:
        indent, name, clause = re.fullmatch(r"((?:  )+)(\S+)(?: {2,}(.*))?", line).groups()
        above = above[: len(indent) // 2 - 1]
        found["".join([*above, name])] = clause
        if name.endswith("/"):
            above.append(name)
    return found


def files():
    """Return the files of the package that hold something: a wing's own `__init__.py` is empty."""
    return {str(file.relative_to(PACKAGE)) for file in PACKAGE.rglob("*.py") if file.stat().st_size}


def test_the_tree_names_every_file_and_no_other():
    named = {path for path in tree() if not path.endswith("/")}
    missing, gone = sorted(files() - named), sorted(named - files())
    assert not missing, f"docs/architecture.md: add {', '.join(missing)} to the tree"
    assert not gone, f"docs/architecture.md: take {', '.join(gone)} out of the tree"


def test_the_tree_names_every_folder_and_says_what_each_line_is():
    folders = {f"{file.parent.relative_to(PACKAGE)}/" for file in PACKAGE.rglob("*.py") if file.parent != PACKAGE}
    named = {path for path in tree() if path.endswith("/")}
    assert folders <= named and all((PACKAGE / path).is_dir() for path in named)
    silent = [path for path, clause in tree().items() if not clause]
    assert not silent, f"docs/architecture.md: say what {', '.join(silent)} holds"


def test_the_walk_is_short_and_leads_through_files_that_exist():
    walk = re.search(r"^## The walk.*?(?=^## )", TEXT, re.MULTILINE | re.DOTALL)[0]
    steps = re.findall(r"^\d+\. `(\S+\.py)`", walk, re.MULTILINE)
    assert 6 <= len(steps) <= WALK_AT_MOST
    gone = [name for name in re.findall(r"`([\w/]+\.py)`", walk) if name not in files()]
    assert not gone, f"docs/architecture.md: the walk leads through {', '.join(gone)}, which is not there"
