"""The command line: its parser, its exit codes, and the table of its commands.

Each command is one module, `commands/NAME.py`, with one public function of the same name; typer reads its signature. A
module is imported only when its command is called: `mbf --help` prints COMMANDS and imports no command.

Exit codes: 0 done; 1 the user's input does not fit, or the operating system refuses; 2 wrong usage; 128 + the signal
that stopped us (130 Ctrl-C, 143 SIGTERM, 129 SIGHUP); 141 the reader of our output closed it. Every other exception is
a bug of ours and keeps its traceback.
"""

import gc
import importlib
import importlib.util
import os
import signal
import sys
import warnings
from io import TextIOWrapper
from pathlib import Path
from types import FrameType
from typing import Annotated, Any, NoReturn, TextIO

import typer
from typer.core import TyperGroup

from mbf_mlx import __version__
from mbf_mlx.errors import InputError

# name -> its line in `mbf --help`, in the order in which users meet them; a command without a module is left out
COMMANDS = {
    "quickstart": "Do everything once with a small model: fetch, three tasks, the matrix, an export, an answer.",
    "fetch": "Put a base model from a recipe into models/ (without a name: list the recipes).",
    "check": "Show what training would see of a task, and every line that does not fit.",
    "plan": "Say how much memory, time and disk learning would take on this machine.",
    "learn": "Learn tasks, in order, into a stream (--model BASE makes a new one).",
    "status": "Show a stream's tasks, its matrix of scores, its sizes and where it stands.",
    "eval": "Score the deployed adapter again.",
    "generate": "Answer one prompt (- reads it from stdin).",
    "chat": "Talk with the model that a stream has taught.",
    "serve": "Serve the model that a stream has taught over HTTP.",
    "export": "Write what a stream has learned for other programs: mlx, peft, gguf, ollama and more.",
    "undo": "Take back the last task.",
    "next": "Write the start of the next task, to be trained elsewhere.",
    "absorb": "Merge an adapter that was tuned elsewhere, as the next task.",
    "experiment": "Compare methods, orders and seeds on sequences of tasks, from one file.",
    "report": "Write a stream or an experiment's results as one HTML page.",
    "doctor": "Show what this machine has, what would run where, and what is missing.",
}
ENVIRONMENT = {
    "MBF_MODELS": "Folder of the fetched models; models/ in the working folder if this is not set.",
    "MBF_DEVICE": "Device to compute on: auto, cpu, gpu, metal or cuda.",
    "OPENBLAS_NUM_THREADS": "Threads for matrix products on a CPU; another number changes the last bits.",
    "MBF_API_KEY": "Key that a request to `mbf serve` must bring, where --api-key is not given.",
    "HF_HUB_OFFLINE": "1: never ask the Hugging Face hub.",
}
EXIT_CODES = {
    "0": "Done.",
    "1": "The input does not fit; one message says what and where. (A traceback is a bug of ours.)",
    "2": "Wrong usage.",
    "130": "Stopped by Ctrl-C (143: by SIGTERM, 129: by SIGHUP); what was saved is kept.",
}


class Stopped(KeyboardInterrupt):
    """SIGTERM or SIGHUP; both end a command as Ctrl-C does. Holds the signal."""


def stopped_by(error: KeyboardInterrupt) -> tuple[str, int]:
    """Return what stopped a command, in words, and the exit code that says so."""
    number = error.args[0] if isinstance(error, Stopped) else signal.SIGINT
    return "Ctrl-C" if number == signal.SIGINT else number.name, 128 + number


class _Commands(TyperGroup):
    """Imports a command of the table when it is called, and turns errors into exit codes."""

    def __init__(self, **settings: Any) -> None:
        super().__init__(**settings)
        # typer suggests from these names when a command is misspelt
        self.commands: dict[str, Any] = dict.fromkeys(available())

    def get_command(self, ctx: Any, cmd_name: str) -> Any:
        """Return the command called `cmd_name`, or None where there is none."""
        if cmd_name not in self.commands:
            return None
        from mbf_mlx.commands.help import Command  # `mbf --help` does without
        from mbf_mlx.device import lighter_imports

        lighter_imports.allow()
        module = importlib.import_module(f"{__name__}.{cmd_name}")
        one = typer.Typer(add_completion=False, rich_markup_mode=None, context_settings=_CONTEXT)
        one.command(cmd_name, cls=Command)(vars(module)[cmd_name])
        return typer.main.get_command(one)

    def format_commands(self, ctx: Any, formatter: Any) -> None:
        """Write the table into `mbf --help`."""
        rows = [(name, COMMANDS[name]) for name in self.commands]
        if rows:
            with formatter.section("Commands"):
                formatter.write_dl(rows)

    def format_epilog(self, ctx: Any, formatter: Any) -> None:
        """Write the tables at the end of `mbf --help`."""
        for title, rows in (("Environment", ENVIRONMENT), ("Exit codes", EXIT_CODES)):
            with formatter.section(title):
                formatter.write_dl(list(rows.items()))

    def invoke(self, ctx: Any) -> Any:
        """Run the command. Exceptions that are no bug become an exit code and have no traceback."""
        try:
            result = super().invoke(ctx)
            sys.stdout.flush()
            return result
        except InputError as error:
            _say(f"error: {error}")
            raise SystemExit(1) from error
        except KeyboardInterrupt as error:
            name, code = stopped_by(error)
            _say(f"stopped by {name}; what was saved is kept")
            raise SystemExit(code) from error
        except BrokenPipeError as error:  # typer would exit with 1
            _silence(sys.stdout, sys.stderr)
            raise SystemExit(141) from error
        except OSError as error:
            _refused(error)
        except RuntimeError as error:
            from mbf_mlx.device import watchdog  # `mbf --help` does without

            if not watchdog.has_stopped(error):
                raise
            _say(f"error: {watchdog.HINT}")
            raise SystemExit(1) from error
        except MemoryError as error:
            _say("error: there is not enough memory\nhint: close other programs, or take less at a time")
            raise SystemExit(1) from error
        except BaseException as error:
            if type(error).__name__ != "PanicException":  # of the tokenizers library; it is no Exception
                raise
            said = " ".join(str(error).split())[:200]
            _say(f"error: the model's tokenizer fails for a text: {said}\nhint: take the model from another source")
            raise SystemExit(1) from error


_CONTEXT: dict[str, Any] = {"help_option_names": ["--help", "-h"], "max_content_width": 100}
app = typer.Typer(
    cls=_Commands,
    context_settings=_CONTEXT,
    rich_markup_mode=None,
    subcommand_metavar="COMMAND ...",
    pretty_exceptions_enable=False,
    no_args_is_help=True,
)


def _print_version(wanted: bool) -> None:
    if wanted:
        print(f"mbf {__version__}")
        raise typer.Exit()


@app.callback()
def mbf(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version and exit.")
    ] = False,
) -> None:
    """Teach one quantized Llama task after task on your own machine, in constant memory.

    Example: mbf learn assistant mail.jsonl --model smollm2-135m-instruct

    mbf COMMAND --help says what a command takes, with an example. To have your shell complete commands and options, run
    mbf --install-completion once.
    """


def available() -> list[str]:
    """Return the names of the commands that are there."""
    return [name for name in COMMANDS if importlib.util.find_spec(f"{__name__}.{name}")]


def main() -> NoReturn:
    """Run the command line on this process's arguments; leaves with an exit code."""
    # Imports make many objects and no garbage. These two lines make `mbf status` a sixth faster.
    gc.set_threshold(20_000)
    os.environ.setdefault("PYDANTIC_DISABLE_PLUGINS", "__all__")  # pydantic would search every installed package
    for stop in (signal.SIGTERM, signal.SIGHUP):
        if signal.getsignal(stop) != signal.SIG_IGN:  # nohup starts us with SIGHUP ignored: it stays ignored
            signal.signal(stop, _stop)
    _open_standard_streams()
    warnings.showwarning = _show_warning
    try:
        app(prog_name="mbf")
    except OSError as error:  # while it printed help
        _refused(error)
    raise AssertionError("typer leaves by SystemExit")


def _refused(error: OSError) -> NoReturn:
    """Say what the operating system refuses, and leave."""
    from mbf_mlx.files.storage import refusal  # `mbf --help` does without

    place = Path(os.fsdecode(error.filename)) if error.filename else "the output"
    _say(f"error: {refusal(error, place, verb='use' if error.filename else 'write')}")
    if not error.filename:
        _silence(sys.stdout)
    raise SystemExit(1) from error


def _open_standard_streams() -> None:
    """Make it possible to print: to nowhere where a stream is closed, and with escapes for what an encoding lacks."""
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):  # each takes the lowest number that is free
        stream = getattr(sys, name)
        if stream is None:
            setattr(sys, name, open(os.devnull, mode))
        elif isinstance(stream, TextIOWrapper) and mode == "w":
            stream.reconfigure(errors="backslashreplace")


def _stop(number: int, frame: FrameType | None) -> None:
    raise Stopped(signal.Signals(number))


def _show_warning(
    message: Warning | str,
    category: type[Warning],
    filename: str,
    lineno: int,
    file: TextIO | None = None,
    line: str | None = None,
) -> None:
    from mbf_mlx.commands.escapes import visible  # `mbf --help` does without

    # Libraries warn with a stranger's words: matplotlib of a letter that its fonts lack.
    print(visible(warnings.formatwarning(message, category, filename, lineno, line)), file=file or sys.stderr, end="")


def _say(message: str) -> None:
    from mbf_mlx.commands.escapes import visible  # `mbf --help` does without

    # stderr may be the pipe that broke.
    try:
        print(visible(message), file=sys.stderr, flush=True)
    except OSError:
        _silence(sys.stderr)


def _silence(*streams: TextIO) -> None:
    # Python flushes these streams at exit. It would complain once more there and exit with a code of its own.
    for stream in streams:
        os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())
