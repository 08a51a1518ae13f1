"""The command line as a user meets it: in a process of its own.

Long, because each case is a command with all that it must print.
"""

import ast
import io
import json
import os
import re
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import typer
from typer.testing import CliRunner

from mbf_mlx import __version__, commands, units
from mbf_mlx.commands import console
from tests.support.streams import learn, new_stream

ROOT = Path(__file__).resolve().parents[2]

# Commands for these tests alone, entered in the table like any other.
TROUBLE = """
import sys, time, types
from importlib.machinery import ModuleSpec
from pathlib import Path
from typing import Annotated
import typer
from mbf_mlx import commands
from mbf_mlx.errors import InputError

def unfit(): raise InputError("mail.jsonl:3: expected a prompt, got nothing\\nhint: write one")
def bug(): raise RuntimeError("our own [fault]")
def screen(): raise RuntimeError("[METAL] Command buffer execution failed: Impacting Interactivity (0000000e:kIOGPU)")
def wait():
    try: print("waiting", flush=True); time.sleep(60)
    finally: Path("cleaned-up").write_text("yes")
def flood():
    for number in range(200_000): print(number)
def shout():
    print("done", file=sys.stderr, flush=True)
def say(words: Annotated[list[str], typer.Argument()], loud: bool = False): print(*words, loud)

for command in (unfit, bug, screen, wait, flood, shout, say):
    module = types.ModuleType(f"mbf_mlx.commands.{command.__name__}")
    module.__spec__ = ModuleSpec(module.__name__, None)
    setattr(module, command.__name__, command)
    sys.modules[module.__name__] = module
    commands.COMMANDS[command.__name__] = f"{command.__name__} for the tests."
commands.main()
"""


@pytest.fixture
def trouble(tmp_path):
    """`trouble("unfit")` runs one of the commands above, in tmp_path; `start=True` leaves it running."""
    (tmp_path / "trouble.py").write_text(TROUBLE)

    def run(*arguments, start=False, **options):
        command = [sys.executable, "trouble.py", *arguments]
        settings = {"cwd": tmp_path, "env": {**os.environ, "PYTHONPATH": str(ROOT)}, "text": True, **options}
        if start:
            return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, **settings)
        return subprocess.run(command, capture_output=True, timeout=60, **settings)

    return run


def mbf(*arguments, **options):
    """Run `mbf` from the checkout."""
    command = [sys.executable, str(ROOT / "cli.py"), *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, **options)


def test_version_is_the_packages():
    done = mbf("--version")
    assert (done.returncode, done.stdout) == (0, f"mbf {__version__}\n")


def test_work_that_macos_has_stopped_for_the_screen_is_named_with_what_helps(trouble):
    done = trouble("screen")
    assert done.returncode == 1 and "Traceback" not in done.stderr
    assert done.stderr.startswith("error: macOS has stopped this work because the screen waited for the GPU")
    assert "--grad-checkpoint" in done.stderr and "AGX_RELAX_CDM_CTXSTORE_TIMEOUT=1" in done.stderr


def test_help_lists_every_command_in_the_order_of_the_table():
    done = mbf("--help")
    assert done.returncode == 0
    listed = re.findall(r"^  ([a-z-]+)  +[A-Z]", done.stdout.split("Commands:")[1], re.MULTILINE)
    assert listed == commands.available()


def test_help_imports_nothing_heavy_and_no_command():
    code = "import sys; sys.argv = ['mbf', '--help']\nfrom mbf_mlx.commands import main\nimport atexit\n"
    code += "atexit.register(lambda: print(*sys.modules, sep='\\n', file=sys.stderr))\nmain()"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, timeout=60)
    loaded = set(done.stderr.split())
    assert "mbf_mlx.commands" in loaded and done.stdout.startswith("Usage: mbf")
    for name in ("mlx", "mlx_lm", "transformers", "numpy", "torch", "rich.console", "psutil", "pydantic"):
        assert name not in loaded, f"`mbf --help` imports {name}"
    assert {name for name in loaded if name.startswith("mbf_mlx.")} == {"mbf_mlx.commands", "mbf_mlx.errors"}


def test_status_loads_neither_numpy_nor_mlx(tmp_path):
    learn(new_stream(tmp_path / "s"), 2)
    code = f"import sys; sys.argv = ['mbf', 'status', {str(tmp_path / 's')!r}]\nfrom mbf_mlx.commands import main\n"
    code += "import atexit; atexit.register(lambda: print(*sys.modules, sep='\\n', file=sys.stderr))\nmain()"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, timeout=60)
    assert done.returncode == 0 and "average accuracy" in done.stdout, done.stderr
    loaded = set(done.stderr.split())
    for name in ("mlx", "mlx_lm", "transformers", "numpy", "torch", "matplotlib", "psutil"):
        assert name not in loaded, f"`mbf status` imports {name}"
    ours = {name.split(".")[1] for name in loaded if name.startswith("mbf_mlx.")}
    assert not ours & {"api", "base", "data", "engine", "methods", "serving", "export"}, ours


def test_help_is_instant():
    def seconds(*command):
        start = time.perf_counter()
        subprocess.run(command, capture_output=True, check=True, cwd=ROOT)
        return time.perf_counter() - start

    # 0.2 s on an idle machine, where Python alone takes 0.04; beside other work, as many times as long as Python does.
    for attempt in range(5):
        bare = min(seconds(sys.executable, "-c", "pass") for _ in range(3))
        ours = min(seconds(sys.executable, "cli.py", "--help") for _ in range(3))
        if ours < 0.2 or ours < 6 * bare:
            return
        time.sleep(attempt)
    pytest.fail(f"`mbf --help` took {ours:.2f} s, where Python takes {bare:.2f} s to start")


def command(name):
    """The command as the parser has it."""
    return typer.main.get_command(commands.app).get_command(None, name)


@pytest.mark.parametrize("name", commands.available())
def test_every_command_says_what_it_does_and_what_it_takes(name):
    shown = CliRunner().invoke(commands.app, [name, "--help"], prog_name="mbf")
    assert shown.exit_code == 0, shown.output
    assert shown.output.startswith(f"Usage: mbf {name} ")
    assert shown.output.split("\n\n")[1].strip(), "the function's docstring is what the help says first"
    silent = [each.name for each in command(name).params if not each.help]
    assert silent == [], "arguments and options without a word of help"


@pytest.mark.parametrize("name", commands.available())
def test_every_command_has_an_example_that_its_parser_takes(name):
    example = re.search(r"^Example: mbf (.+)$", command(name).help, re.MULTILINE)
    assert example, f"the docstring of `{name}` has no line 'Example: mbf {name} ...'"
    first, *arguments = shlex.split(example[1])
    assert first == name
    command(name).make_context(name, arguments)  # exits with 2 where the usage is wrong


def test_the_help_names_the_environment_and_the_exit_codes():
    shown = " ".join(CliRunner().invoke(commands.app, ["--help"], prog_name="mbf").output.split())
    for name, words in (commands.ENVIRONMENT | commands.EXIT_CODES).items():
        assert f"{name} {words}" in shown
    sources = "".join(file.read_text("utf-8") for file in (ROOT / "mbf_mlx").rglob("*.py") if file.stem != "__init__")
    assert set(re.findall(r"environ(?:\.get\(|\[)\"(MBF_\w+)\"", sources)) <= set(commands.ENVIRONMENT)


@pytest.mark.parametrize(
    ("shell", "typed", "expected"),
    [
        ("bash", "mbf stat", "status"),
        ("zsh", "mbf stat", "status"),
        ("fish", "mbf stat", "status"),
        ("bash", "mbf learn --batch", "--batch-size"),
    ],
)
def test_the_shell_completes_commands_and_options(shell, typed, expected):
    words = {"COMP_WORDS": typed, "COMP_CWORD": str(typed.count(" "))} if shell == "bash" else {}
    environment = {"_MBF_COMPLETE": f"complete_{shell}", "_TYPER_COMPLETE_ARGS": typed, **words}
    done = mbf(env={**os.environ, **environment, "_TYPER_COMPLETE_FISH_ACTION": "get-args"})
    assert done.returncode == 0, done.stderr
    assert expected in done.stdout and "learn" not in done.stdout.replace(typed, "")


def test_every_module_with_a_function_of_its_name_is_a_command():
    for file in sorted((ROOT / "mbf_mlx" / "commands").glob("*.py")):
        names = {node.name for node in ast.parse(file.read_text("utf-8")).body if isinstance(node, ast.FunctionDef)}
        assert file.stem not in names or file.stem in commands.available()


def test_input_that_does_not_fit_is_one_message_without_a_traceback(trouble):
    done = trouble("unfit")
    assert done.returncode == 1
    assert done.stderr == "error: mail.jsonl:3: expected a prompt, got nothing\nhint: write one\n"
    assert done.stdout == ""


def test_a_bug_keeps_its_traceback(trouble):
    done = trouble("bug")
    assert done.returncode == 1
    assert "Traceback (most recent call last)" in done.stderr
    assert done.stderr.endswith("RuntimeError: our own [fault]\n")
    assert "in bug" in done.stderr


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["nonsense"], "No such command 'nonsense'."),
        (["unfitt"], "Did you mean 'unfit'?"),
        (["lern"], "Did you mean 'learn'?"),
        (["learn", "--learning-rte", "1"], "--learning-rate"),
        (["--nonsense"], "No such option"),
        (["unfit", "--nonsense"], "No such option"),
        (["unfit", "too", "many"], "Got unexpected extra argument"),
        (["say"], "Missing argument"),
    ],
)
def test_wrong_usage_exits_with_2(trouble, arguments, message):
    done = trouble(*arguments)
    assert done.returncode == 2
    assert message in done.stderr and "Traceback" not in done.stderr
    assert done.stdout == ""


def test_without_a_command_the_help_is_shown():
    done = mbf()
    assert done.returncode == 2
    assert "Commands:" in done.stdout + done.stderr


@pytest.mark.parametrize(("name", "code"), [("SIGINT", 130), ("SIGTERM", 143), ("SIGHUP", 129)])
def test_a_stopped_command_cleans_up_and_says_by_its_exit_code_what_stopped_it(trouble, tmp_path, name, code):
    process = trouble("wait", start=True)
    assert process.stdout.readline() == "waiting\n"
    process.send_signal(getattr(signal, name))
    _, stderr = process.communicate(timeout=30)
    assert process.returncode == code
    assert (tmp_path / "cleaned-up").exists()
    assert stderr == f"stopped by {'Ctrl-C' if name == 'SIGINT' else name}; what was saved is kept\n"


def test_nohup_is_respected(trouble, tmp_path):
    process = trouble("wait", start=True, preexec_fn=lambda: signal.signal(signal.SIGHUP, signal.SIG_IGN))
    assert process.stdout.readline() == "waiting\n"
    process.send_signal(signal.SIGHUP)
    with pytest.raises(subprocess.TimeoutExpired):
        process.wait(timeout=1)
    process.terminate()
    process.communicate(timeout=30)
    assert process.returncode == 143


def test_a_reader_that_leaves_ends_the_command_without_a_word(trouble):
    process = trouble("flood", start=True)
    assert process.stdout.readline() == "0\n"
    process.stdout.close()
    assert process.stderr.read() == ""
    assert process.wait(timeout=30) == 141
    process.stderr.close()


def test_a_stderr_that_nobody_reads_changes_no_exit_code(trouble):
    process = trouble("unfit", start=True)
    process.stderr.close()
    assert process.wait(timeout=30) == 1
    process.stdout.close()


def test_words_reach_a_command_as_they_are(trouble):
    done = trouble("say", "[bold]", "--loud", "ä€𝄞")
    assert (done.returncode, done.stdout) == (0, "[bold] ä€𝄞 True\n")


def test_json_is_one_document_and_has_no_nan(capsys):
    console.print_json({"loss": float("nan"), "scores": [[0.5, None], (float("inf"), 1)], "name": "Grüße"})
    printed = capsys.readouterr().out
    assert json.loads(printed) == {"loss": None, "scores": [[0.5, None], [None, 1]], "name": "Grüße"}


def test_json_can_be_printed_where_the_terminal_knows_ascii_alone():
    code = "from mbf_mlx.commands import console; console.print_json({'name': 'Grüße'})"
    environment = {**os.environ, "PYTHONIOENCODING": "ascii"}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, cwd=ROOT, env=environment, timeout=60)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout) == {"name": "Grüße"}


def test_results_go_to_stdout_and_warnings_to_stderr(capsys):
    console.out.print("a [path] of /tmp/" + "x" * 300)
    console.warn("12 rows [stand] in both")
    printed = capsys.readouterr()
    assert printed.out == "a [path] of /tmp/" + "x" * 300 + "\n"
    assert printed.err == "warning: 12 rows [stand] in both\n"


def test_progress_without_a_terminal_is_a_plain_line_now_and_then(capsys, monkeypatch):
    monkeypatch.setattr(console, "LINE_SECONDS", 0.05)
    with console.progress("learning mail", total=4) as update:
        update(1, loss=2.25)  # too early for a line
        time.sleep(0.06)
        update(2, loss=1.23456, tokens_per_second=240.04, memory="1.2 GB")
        update(3)
        update(4, loss=0.5)
    printed = capsys.readouterr()
    assert printed.out == ""
    first, last = printed.err.splitlines()
    assert first == "learning mail: 2/4 steps, loss 1.235, tokens/second 240, memory 1.2 GB, 0 s left"
    assert last == "learning mail: 4/4 steps, loss 0.5"


def test_progress_on_a_terminal_is_a_bar_with_an_eta(monkeypatch):
    screen = io.StringIO()
    terminal = console.Console(file=screen, force_terminal=True, width=100, markup=False, highlight=False)
    monkeypatch.setattr(console, "err", terminal)
    with console.progress("learning [mail]", total=4) as update:
        update(3, loss=0.5)
    shown = re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", screen.getvalue())
    assert "learning [mail]" in shown and "3/4" in shown and "loss 0.5" in shown
    assert re.search(r"\d:\d\d:\d\d|-:--:--", shown)


@pytest.mark.parametrize(
    ("seconds", "words"),
    [(0.2, "0 s"), (59.4, "59 s"), (61, "1 min 01 s"), (3599.7, "1 h 00 min"), (7800, "2 h 10 min")],
)
def test_a_duration_reads_as_a_person_says_it(seconds, words):
    assert units.duration(seconds) == words


@pytest.mark.parametrize(
    ("count", "words"),
    [(0, "0 bytes"), (999, "999 bytes"), (1000, "1.0 kB"), (999_999, "1.0 MB"), (1.25e9, "1.2 GB"), (5e15, "5000 TB")],
)
def test_a_size_reads_as_a_person_says_it(count, words):
    assert units.size(count) == words


def test_doctor_says_where_mlx_computes_and_how_fast(mx):
    done = mbf("doctor", "--json")
    assert (done.returncode, done.stderr) == (0, "")
    report = json.loads(done.stdout)
    assert report["mbf"] == __version__
    assert report["device"]["kind"] in ("cpu", "metal", "cuda")
    assert report["matmul_gflops"] > 0 and report["problem"] is None
    assert report["memory_bytes"] >= report["available_bytes"] > 0 and report["disk_free_bytes"] > 0
    assert report["packages"]["mlx"] and "mlx" not in report["missing"]


def test_doctor_can_be_pasted_without_telling_who_and_where(mx, tmp_path):
    done = mbf("doctor", cwd=tmp_path, env={**os.environ, "HF_TOKEN": "hf_secret", "MBF_DEVICE": "cpu"})
    assert done.returncode == 0, done.stderr
    for secret in (str(Path.home()), str(tmp_path), str(ROOT), "hf_secret", os.uname().nodename):
        assert secret not in done.stdout
    for heading in ("system", "processor", "memory", "device", "because", "matmul", "packages"):
        assert re.search(rf"^{heading} +\S", done.stdout, re.MULTILINE)
    assert "MBF_DEVICE=cpu" in done.stdout


def test_doctor_without_mlx_says_what_still_works_and_what_to_install(tmp_path):
    for package in ("mlx", "mlx_lm"):
        (tmp_path / package).mkdir()
        (tmp_path / package / "__init__.py").write_text("raise ImportError('blocked')")
    done = mbf("doctor", env={**os.environ, "PYTHONPATH": str(tmp_path)})
    assert done.returncode == 0, done.stderr
    assert re.search(r"^device +none: this needs mlx", done.stdout, re.MULTILINE)
    assert re.search(r"^still +check, merging", done.stdout, re.MULTILINE)
