"""README.md and docs/ stay true: their commands exist, their flags too, and they run, in order, in one folder.

In a ```console block a line that begins with "$ " is a command (a "\\" at its end continues it) and the lines below it
are what it prints, where "..." stands for anything, also over several lines. With no lines below it, all that counts is
that the command succeeds. ```python blocks run in the same folder. A comment right above a block says otherwise:

    <!-- test: skip, REASON -->      never run; its commands and flags are looked up all the same
    <!-- test: slow -->              run by `make test-all` alone
    <!-- test: OLD => NEW -->        NEW is run where OLD is written, such as a shorter training
    <!-- test: file NAME -->         the block is the content of the file NAME, which later commands use
    <!-- test: exit 1 -->            the last command of the block fails with this exit code
"""

import os
import re
import shlex
import shutil
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path

import pytest
import typer

from mbf_mlx import commands

ROOT = Path(__file__).resolve().parents[2]
DOCUMENTS = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
TIMEOUT = 300  # seconds for one command

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


@pytest.fixture
def environment(tmp_path):
    """The variables of a shell in which `mbf` and `python` are the ones under test."""
    bin_folder = tmp_path / "bin"
    bin_folder.mkdir()
    for name, words in (("mbf", [sys.executable, str(ROOT / "cli.py")]), ("python", [sys.executable])):
        (bin_folder / name).write_text(f'#!/bin/sh\nexec {shlex.join(words)} "$@"\n')
        (bin_folder / name).chmod(0o755)
    path = os.pathsep.join([str(bin_folder), str(Path(sys.executable).parent), os.environ["PATH"]])
    return {**os.environ, "PATH": path, "PYTHONPATH": str(ROOT), "COLUMNS": "120"}


def _needs_model(blocks):
    return any("mbf " in block.body or "mbf_mlx" in block.body for block in blocks)


def _run_document(document, slow, tmp_path, environment, request):
    blocks = [block for block in read_blocks(document.read_text(encoding="utf-8")) if not block.skip]
    if slow and not any(block.slow for block in blocks):
        pytest.skip(f"nothing in {document.name} is slow")
    blocks = [block for block in blocks if slow or not block.slow]
    if _needs_model(blocks):
        environment["MBF_MODELS"] = str(request.getfixturevalue("smollm2").parent)
    (tmp_path / "work").mkdir()
    if any("benchmarks/" in block.body for block in blocks):
        shutil.copytree(ROOT / "benchmarks", tmp_path / "work" / "benchmarks")
    run_blocks(blocks, tmp_path / "work", environment)


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_the_commands_of_a_document_do_what_it_says(document, tmp_path, environment, request):
    _run_document(document, False, tmp_path, environment, request)


@pytest.mark.slow
@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_the_commands_of_a_document_do_what_it_says_the_slow_ones_too(document, tmp_path, environment, request):
    _run_document(document, True, tmp_path, environment, request)


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_every_command_and_flag_in_a_document_exists(document):
    parser = typer.main.get_command(commands.app)
    for block in read_blocks(document.read_text(encoding="utf-8")):
        for command in block.commands() if block.kind == "console" else []:
            for name, *words in our_calls(command.text):
                if name in ("--help", "--version"):
                    continue
                assert name in commands.available(), f"{document.name}:{block.line}: no such command: mbf {name}"
                known = {flag for option in parser.get_command(None, name).params for flag in option.opts}
                known |= {flag for option in parser.get_command(None, name).params for flag in option.secondary_opts}
                flags = {word.partition("=")[0] for word in words if re.match(r"--?[a-zA-Z]", word)}
                unknown = flags - known - {"--help", "-h"}
                assert not unknown, f"{document.name}:{block.line}: mbf {name} has no {', '.join(sorted(unknown))}"


def test_the_readme_names_every_command():
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    missing = [name for name in commands.available() if f"mbf {name}" not in readme]
    assert not missing, f"README.md does not name mbf {', mbf '.join(missing)}"


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
