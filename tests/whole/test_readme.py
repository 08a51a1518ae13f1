"""README.md and docs/ stay true: their commands and flags exist, they run, and their links lead somewhere.

README.md runs first, in a new folder. Every page of docs/ goes on from there, each in its own copy of that folder.

In a ```console block a line that begins with "$ " is a command. A "\\" at its end continues it. The lines below it are
what it prints; "..." stands for anything, also over several lines. With no lines below it, the command only has to
succeed. ```python blocks run in the same folder. A comment right above a block says otherwise:

    <!-- test: skip, REASON -->      never run; its commands and flags must exist all the same
    <!-- test: slow -->              only `make test-all` runs it
    <!-- test: OLD => NEW -->        the test runs NEW instead of OLD, such as a shorter training
    <!-- test: file NAME -->         the block is the content of the file NAME, which later commands use
    <!-- test: exit 1 -->            the last command of the block fails with this exit code
"""

import os
import re
import runpy
import shlex
import shutil
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path
from xml.etree import ElementTree

import pytest
import typer
from filelock import FileLock

from mbf_mlx import commands

ROOT = Path(__file__).resolve().parents[2]
README = ROOT / "README.md"
PAGES = sorted((ROOT / "docs").glob("*.md"))
DOCUMENTS = [README, *PAGES]
TIMEOUT = 300  # seconds for one command
SVG = "http://www.w3.org/2000/svg"

_FENCE = re.compile(
    r"(?P<above>(?:<!-- test: .*? -->\n)*)^```(?P<kind>\w+)\n(?P<body>.*?)^```$", re.MULTILINE | re.DOTALL
)


@dataclass
class Command:
    """One command of a block, and what it prints."""

    text: str
    output: str = ""


@dataclass
class Block:
    """One fenced block and what the comments above it ask for."""

    kind: str  # the word behind the fence
    body: str
    line: int
    skip: str = ""
    slow: bool = False
    file: str = ""
    exit: int = 0
    replace: list[tuple[str, str]] = field(default_factory=list)

    def commands(self):
        """Return the commands of a console block, as written."""
        found = []
        lines = iter(self.body.splitlines())
        for line in lines:
            if line.startswith("$ "):
                text = line[2:]
                while text.endswith("\\"):
                    text = text[:-1] + next(lines).removeprefix("> ").lstrip()
                found.append(Command(text))
            else:
                assert found, f"line {self.line}: a console block begins with '$ ' and a command"
                found[-1].output += line + "\n"
        return found

    def replaced(self, text):
        """Return the text with what the comments replace."""
        for old, new in self.replace:
            text = text.replace(old, new)
        return text


def read_blocks(text):
    """Return the fenced blocks of a document that are commands, Python, or a file for them."""
    blocks = []
    for match in _FENCE.finditer(text):
        block = Block(match["kind"], match["body"], text[: match.start("kind")].count("\n") + 1)
        for wish in re.findall(r"<!-- test: (.*?) -->", match["above"]):
            if wish == "slow":
                block.slow = True
            elif wish.startswith("skip, "):
                block.skip = wish.removeprefix("skip, ")
            elif wish.startswith("file "):
                block.file = wish.removeprefix("file ")
            elif wish.startswith("exit "):
                block.exit = int(wish.removeprefix("exit "))
            elif " => " in wish:
                block.replace.append(tuple(wish.split(" => ")))
            else:
                pytest.fail(f"line {block.line}: no such wish: {wish}")
        if block.kind in ("console", "python") or block.file:
            blocks.append(block)
    return blocks


def matches(expected, printed):
    """Return whether what was printed is what a document says, where "..." is anything."""
    parts = [re.escape(part.strip()) for part in expected.strip().split("...")]
    return re.fullmatch(r"\s*" + r".*".join(parts) + r"\s*", printed, re.DOTALL) is not None


def run_blocks(blocks, folder, environment):
    """Run the blocks in order; a failure names its line and shows all that was printed."""
    shell = {"cwd": folder, "env": environment, "capture_output": True, "text": True, "timeout": TIMEOUT}
    for block in blocks:
        if block.file:
            path = folder / block.file
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(block.replaced(block.body), encoding="utf-8")
        elif block.kind == "python":
            done = subprocess.run([sys.executable, "-c", block.replaced(block.body)], **shell)
            assert done.returncode == 0, f"line {block.line}:\n{done.stdout}{done.stderr}"
        else:
            listed = block.commands()
            for command in listed:
                text = block.replaced(command.text)
                done = subprocess.run(["/bin/sh", "-c", text], stdin=subprocess.DEVNULL, **shell)
                everything = f"line {block.line}: $ {text}\n{done.stdout}{done.stderr}"
                code = block.exit if command is listed[-1] else 0
                assert done.returncode == code, f"exit code {done.returncode}, not {code}; {everything}"
                if command.output:
                    printed = done.stdout if block.exit == 0 else done.stdout + done.stderr
                    expected = block.replaced(command.output)
                    assert matches(expected, printed), f"the document says\n{expected}\nbut {everything}"


def our_calls(text):
    """Yield the words of every `mbf …` in a command, with its pipes and its environment taken off."""
    for part in re.split(r"&&|\|\||[|;]", text):
        words = shlex.split(part)
        while words and re.fullmatch(r"\w+=.*", words[0]):
            words = words[1:]
        if words and words[0] == "mbf":
            yield words[1:]
        elif words[:2] == ["python", "cli.py"]:
            yield words[2:]


def shell(folder, **variables):
    """Return the variables of a shell in which `mbf` and `python` are the ones under test, as files in `folder`."""
    folder.mkdir(exist_ok=True)
    for name, words in (("mbf", [sys.executable, str(ROOT / "cli.py")]), ("python", [sys.executable])):
        (folder / name).write_text(f'#!/bin/sh\nexec {shlex.join(words)} "$@"\n')
        (folder / name).chmod(0o755)
    path = os.pathsep.join([str(folder), str(Path(sys.executable).parent), os.environ["PATH"]])
    return {**os.environ, "PATH": path, "PYTHONPATH": str(ROOT), "COLUMNS": "120", **variables}


@pytest.fixture
def environment(tmp_path):
    """The variables of a shell in which `mbf` and `python` are the ones under test."""
    return shell(tmp_path / "bin")


def run_document(document, folder, bin_folder, smollm2, slow):
    """Run what a document says in `folder`; its slow blocks, too, where `slow` says so."""
    blocks = [block for block in read_blocks(document.read_text(encoding="utf-8")) if not block.skip]
    run_blocks([b for b in blocks if slow or not b.slow], folder, shell(bin_folder, MBF_MODELS=str(smollm2.parent)))


@pytest.fixture(scope="session")
def after_readme(smollm2, tmp_path_factory):
    """The folder that README.md's commands leave behind; made once a run, whichever worker comes first."""
    base = tmp_path_factory.getbasetemp()
    place = (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / "readme"
    with FileLock(f"{place}.lock"):
        if not (place / "done").exists():
            shutil.rmtree(place, ignore_errors=True)
            (place / "work").mkdir(parents=True)
            run_document(README, place / "work", place / "bin", smollm2, slow=False)
            (place / "done").touch()
    return place / "work"


def run_page(page, slow, after_readme, tmp_path, smollm2):
    """Run a page of docs/ in a copy of what README.md leaves behind."""
    shutil.copytree(after_readme, tmp_path / "work", symlinks=True)
    if "$ mbf experiment benchmarks/" in page.read_text(encoding="utf-8"):
        shutil.copytree(ROOT / "benchmarks", tmp_path / "work" / "benchmarks")
    run_document(page, tmp_path / "work", tmp_path / "bin", smollm2, slow)


def test_the_commands_of_the_readme_do_what_it_says(after_readme):
    assert (after_readme / "assistant" / "stream.json").exists()


@pytest.mark.parametrize("page", PAGES, ids=lambda path: path.name)
def test_the_commands_of_a_page_do_what_it_says(page, after_readme, tmp_path, smollm2):
    run_page(page, False, after_readme, tmp_path, smollm2)


@pytest.mark.slow
@pytest.mark.parametrize("page", PAGES, ids=lambda path: path.name)
def test_the_commands_of_a_page_do_what_it_says_the_slow_ones_too(page, after_readme, tmp_path, smollm2):
    if not any(block.slow for block in read_blocks(page.read_text(encoding="utf-8"))):
        pytest.skip(f"nothing in {page.name} is slow")
    run_page(page, True, after_readme, tmp_path, smollm2)


def written_calls(text):
    """Yield (line, words) of every `mbf …` of a document: in console blocks, and in `code` of a sentence or a table."""
    for block in read_blocks(text):
        for command in block.commands() if block.kind == "console" else []:
            yield from ((block.line, words) for words in our_calls(command.text))
    sentences = re.sub(r"^```.*?^```$", lambda fence: "\n" * fence[0].count("\n"), text, flags=re.MULTILINE | re.DOTALL)
    for match in re.finditer(r"`(mbf [^`]+)`", sentences):
        line = sentences[: match.start()].count("\n") + 1
        yield from ((line, words) for words in our_calls(match[1].replace("\\|", "/").replace("…", "")))


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_every_command_and_flag_in_a_document_exists(document):
    parser = typer.main.get_command(commands.app)
    for line, (name, *words) in written_calls(document.read_text(encoding="utf-8")):
        if name in ("--help", "--version", "--install-completion", "COMMAND"):
            continue
        assert name in commands.available(), f"{document.name}:{line}: no such command: mbf {name}"
        parameters = parser.get_command(None, name).params
        known = {flag for option in parameters for flag in (*option.opts, *option.secondary_opts)}
        flags = {word.partition("=")[0] for word in words if re.match(r"--?[a-zA-Z]", word)}
        unknown = flags - known - {"--help", "-h"}
        assert not unknown, f"{document.name}:{line}: mbf {name} has no {', '.join(sorted(unknown))}"


def test_the_readme_names_every_command():
    readme = README.read_text(encoding="utf-8")
    missing = [name for name in commands.available() if f"mbf {name}" not in readme]
    assert not missing, f"README.md does not name mbf {', mbf '.join(missing)}"


def test_the_readme_is_short_and_leads_to_every_page():
    readme = README.read_text(encoding="utf-8")
    assert len(readme.splitlines()) <= 200
    missing = [page.name for page in PAGES if f"](docs/{page.name})" not in readme]
    assert not missing, f"README.md does not link to {', '.join(missing)}"


def anchors(text):
    """Return what "#…" of a link may name: a document's headings in small letters, joined by "-", as GitHub does."""
    headings = re.findall(r"^#+ (.+)$", re.sub(r"^```.*?^```$", "", text, flags=re.MULTILINE | re.DOTALL), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_every_link_in_a_document_leads_somewhere(document):
    for target in re.findall(r"\]\(([^)\s]+)\)", document.read_text(encoding="utf-8")):
        place, _, anchor = target.partition("#")
        if "://" in place:
            continue
        file = (document.parent / place).resolve() if place else document
        assert file.exists(), f"{document.name} links to {target}, which is not there"
        assert not anchor or anchor in anchors(file.read_text(encoding="utf-8")), f"{document.name}: no #{anchor}"


@pytest.mark.parametrize("document", [*DOCUMENTS, ROOT / "benchmarks" / "README.md"], ids=lambda path: path.name)
def test_every_file_that_a_document_names_is_there(document):
    named = re.findall(r"\b(?:mbf_mlx|tests|benchmarks)/[\w/]+\.(?:py|toml)\b", document.read_text(encoding="utf-8"))
    gone = [name for name in named if not (ROOT / name).is_file()]
    assert not gone, f"{document.name} names {', '.join(gone)}, which is not there"


def test_the_picture_is_a_terminal_and_loads_nothing():
    picture = runpy.run_path(str(ROOT / "docs" / "picture.py"))
    drawn = picture["draw"]("mbf status s", "\x1b[1mscore\x1b[0m [a] <b>\n\x1b[32m75.0\x1b[0m")
    for svg in (drawn, (ROOT / "docs" / "picture.svg").read_text(encoding="utf-8")):
        texts = [element.text or "" for element in ElementTree.fromstring(svg).iter(f"{{{SVG}}}text")]
        assert any("$\xa0mbf\xa0" in text for text in texts) and any("75.0" in text for text in texts)
        assert "://" not in svg.replace(SVG, "") and "url(#" in svg
    assert "[a]\xa0<b>" in "".join(ElementTree.fromstring(drawn).itertext())
    assert picture["shown"]("a\nit answers: b\n\nNext:") == "a\nit answers: b"


# The mechanism itself: a document that says what is not so has to fail.
def run_text(text, tmp_path, environment):
    """Run a document given as text, with every fence written as ~~~ so that it can stand in this file."""
    run_blocks(read_blocks(text.replace("~~~", "```")), tmp_path, environment)


def test_a_document_that_is_true_passes(tmp_path, environment):
    text = """
<!-- test: file mail/train.jsonl -->
~~~json
{"prompt": "a"}
~~~

<!-- test: a long time => 0 -->
~~~console
$ sleep a long time
$ cat mail/train.jsonl \\
    mail/train.jsonl
{"prompt": ...}
{...
$ mbf --version
mbf ...
~~~

<!-- test: exit 2 -->
~~~console
$ echo first
first
$ mbf nonsense
...No such command 'nonsense'.
~~~

~~~python
open("mail/train.jsonl").read()
~~~
"""
    run_text(text, tmp_path, environment)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("~~~console\n$ echo 1\n2\n~~~", "the document says"),
        ("~~~console\n$ false\n~~~", "exit code 1, not 0"),
        ("<!-- test: exit 1 -->\n~~~console\n$ true\n~~~", "exit code 0, not 1"),
        ("~~~python\nraise SystemExit('wrong')\n~~~", "wrong"),
        ("~~~console\necho no dollar\n~~~", "begins with"),
    ],
)
def test_a_document_that_is_wrong_fails(text, message, tmp_path, environment):
    with pytest.raises(AssertionError, match=re.escape(message)):
        run_text(text, tmp_path, environment)


def test_calls_are_found_behind_pipes_and_variables():
    text = "MBF_MODELS=m mbf learn s t --model x && echo hi | mbf generate s - ; python cli.py status s | head"
    assert [words[0] for words in our_calls(text)] == ["learn", "generate", "status"]
