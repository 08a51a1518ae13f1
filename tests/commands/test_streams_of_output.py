"""Output that cannot be written, and machines that allow little: one sentence, never a traceback."""

import errno
import os
import resource
import shutil
import sys
from pathlib import Path

import pytest

from mbf_mlx.errors import InputError
from mbf_mlx.files.storage import refusal
from tests.support.command_line import mbf
from tests.support.rows import rows_of
from tests.support.streams import learn, new_stream


@pytest.fixture
def stream(quick_path):
    return learn(new_stream(quick_path / "s"), 1).path


def limited(count):
    return lambda: resource.setrlimit(resource.RLIMIT_NOFILE, (count, count))


def closed(*numbers):
    return lambda: [os.close(number) for number in numbers]


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="this system has no /dev/full")
@pytest.mark.parametrize("words", [("status",), ("status", "--json"), ("--help",), ("learn", "--help")])
def test_output_that_is_full_is_one_sentence(stream, words):
    words = [words[0], *([stream] if words[0] == "status" else []), *words[1:]]
    with open("/dev/full", "w") as full:
        done = full_output(words, full)
    assert done.returncode == 1
    assert done.stderr == (
        "error: the output: cannot write: the disk is full\n"
        "hint: free some space and run the command again; nothing was lost\n"
    )


def full_output(words, full):
    import subprocess

    from tests.conftest import ROOT

    command = [sys.executable, str(ROOT / "cli.py"), *map(str, words)]
    return subprocess.run(command, stdout=full, stderr=subprocess.PIPE, text=True, cwd=ROOT)


@pytest.mark.parametrize(("numbers", "code"), [((1,), 0), ((2,), 0), ((0, 1, 2), 0)])
def test_a_command_runs_where_its_streams_are_closed(stream, numbers, code):
    done = mbf("status", stream, preexec_fn=closed(*numbers))
    assert done.returncode == code and "Traceback" not in done.stdout + done.stderr
    assert mbf("status", stream / "none", preexec_fn=closed(*numbers)).returncode == 1


@pytest.mark.parametrize(
    "environment",
    [
        {"PYTHONIOENCODING": "ascii"},
        {"PYTHONIOENCODING": "latin-1"},
        {"LC_ALL": "POSIX", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"},
    ],
)
def test_letters_that_an_encoding_lacks_are_spelled_out(write_jsonl, environment):
    task = write_jsonl("names.jsonl", [{"prompt": "où", "completion": "là ⟦→"}, *rows_of(12)])
    done = mbf("check", task, env={**os.environ, **environment}, encoding="latin-1")
    assert done.returncode == 0, done.stderr
    assert "\\u27e6" in done.stdout


def test_few_open_files_are_one_sentence(stream, write_jsonl, tiny_llama):
    task = write_jsonl("words.jsonl", rows_of(12))
    assert mbf("status", stream, preexec_fn=limited(16)).returncode == 0
    done = mbf("check", task, "--model", tiny_llama, preexec_fn=limited(64))
    assert done.returncode == 1
    assert "error: mlx-lm needs to be allowed 4,096 open files; this process may open 64\nhint: raise" in done.stderr


NUMBERS = "ENOLCK EOPNOTSUPP EMFILE ENFILE ENOMEM ESTALE ETIMEDOUT EBUSY EXDEV EINVAL ENOSYS EUCLEAN ENODEV EREMOTEIO"


@pytest.mark.parametrize("number", [getattr(errno, name) for name in NUMBERS.split() if hasattr(errno, name)])
def test_whatever_the_operating_system_says_is_one_sentence(number):
    said = refusal(OSError(number, os.strerror(number)), Path("s/current"), verb="read")
    assert isinstance(said, InputError)
    first, hint = str(said).splitlines()
    assert first.startswith("s/current: cannot read: ") and hint.startswith("hint: ")


def test_a_link_in_the_place_of_the_lock_is_refused_and_what_it_leads_to_stays(stream, quick_path):
    mine = quick_path / "mine.txt"
    mine.write_text("not to be emptied")
    (stream / "lock").unlink()
    (stream / "lock").symlink_to(mine)
    done = mbf("undo", stream)
    assert done.returncode == 1 and "lock: expected the stream's own empty file, got a link" in done.stderr
    assert mine.read_text() == "not to be emptied"


@pytest.mark.skipif(not shutil.which("setpriv"), reason="setpriv is not installed")
@pytest.mark.skipif(os.getuid() != 0, reason="only root can become a user without a home")
def test_a_user_without_a_home_and_without_a_name_can_check_a_task(write_jsonl):
    import subprocess

    from tests.conftest import ROOT

    task = write_jsonl("words.jsonl", rows_of(12))
    for place in (task, *task.parents[:3]):
        place.chmod(0o755)
    command = ["setpriv", "--reuid=54321", "--clear-groups", sys.executable, str(ROOT / "cli.py"), "check", str(task)]
    environment = {name: value for name, value in os.environ.items() if name != "HOME"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, cwd="/")
    assert "Traceback" not in done.stderr and (done.returncode == 0 or "permission" in done.stderr.lower()), done.stderr
