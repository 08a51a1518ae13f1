"""All printing of the commands: results to stdout, progress and warnings to stderr.

Control characters are spelled out, as names may come from strangers. rich's markup is off, so a path or a prompt with
[brackets] is printed as it is; colours come from the `style` argument. On a terminal, lines are wrapped between words;
elsewhere never, so that other programs can read them.
"""

import json
import math
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from rich.console import Console, ConsoleOptions, RenderableType
from rich.segment import Segment

from mbf_mlx import units
from mbf_mlx.commands.escapes import visible, visible_json

LINE_SECONDS = 5.0  # between two progress lines if there is no terminal


class _Console(Console):
    """A console on which no text moves the cursor: control characters in names and messages are spelled out."""

    def render(self, renderable: RenderableType, options: ConsoleOptions | None = None) -> Iterator[Segment]:
        """Yield the pieces of what is printed; only rich's own controls stay controls."""
        for segment in super().render(renderable, options):
            yield segment if segment.control else segment._replace(text=visible(segment.text))


def _console(stderr: bool) -> Console:
    # Without a terminal rich assumes 80 columns and would cut wide tables; lines for programs are never wrapped.
    terminal = (sys.stderr if stderr else sys.stdout).isatty()
    width = None if terminal else 200
    return _Console(stderr=stderr, markup=False, highlight=False, emoji=False, soft_wrap=not terminal, width=width)


out = _console(stderr=False)
err = _console(stderr=True)


def warn(message: str) -> None:
    """Print one warning on stderr."""
    err.print(f"warning: {message}", style="yellow")


def say_loading(stream: Path, fused: Path | None = None) -> None:
    """Say on stderr what is about to be loaded, from the stream's own file alone: loading itself takes seconds.

    Args:
        stream: The stream's folder; of one that cannot be read nothing is said here.
        fused: The export that is loaded in place of the base.
    """
    try:
        base = json.loads((stream / "stream.json").read_bytes())["base"]["name"]
    except (OSError, ValueError, LookupError, TypeError, RecursionError):
        return  # whoever opens the stream says what is wrong
    err.print(f"{stream}: loading {fused or base} ...")


def print_json(document: Any) -> None:
    """Print `document` on stdout as one JSON document; NaN and infinity, which JSON lacks, become null."""
    ascii_only = (sys.stdout.encoding or "ascii").lower().replace("-", "") != "utf8"
    text = json.dumps(_finite(document), indent=2, ensure_ascii=ascii_only, allow_nan=False)
    print(visible_json(text), flush=True)


def print_piece(text: str) -> None:
    """Print a piece of a model's answer: to a terminal with control characters spelled out, to a file as it is."""
    print(visible(text) if sys.stdout.isatty() else text, end="", flush=True)


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {str(key): _finite(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


@contextmanager
def progress(title: str, total: int | None = None, unit: str = "steps") -> Iterator[Callable[..., None]]:
    """Show progress: a bar with the time left on a terminal, else one plain line every few seconds.

    Args:
        title: What is being done, such as "learning mail".
        total: How many units there are in all; None if that is not known.
        unit: The word for what is counted, in the plural.

    Yields:
        `update(done, **values)`, to be called with the units done so far; the values are shown beside them, in this
        order: `update(12, loss=0.31, tokens_per_second=243.0, memory="1.2 GB")`.
    """
    show = _bar if err.is_terminal else _lines
    with show(title, total, unit) as update:
        yield update


@contextmanager
def _bar(title: str, total: int | None, unit: str) -> Iterator[Callable[..., None]]:
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    name, values = (TextColumn(text, markup=False) for text in ("{task.description}", "{task.fields[values]}"))
    with Progress(name, BarColumn(), MofNCompleteColumn(), values, TimeRemainingColumn(), console=err) as bar:
        task = bar.add_task(title, total=total, values="")

        def update(done: int, **values: Any) -> None:
            bar.update(task, completed=done, values=_words(values))

        yield update


@contextmanager
def _lines(title: str, total: int | None, unit: str) -> Iterator[Callable[..., None]]:
    begin = last = time.monotonic()

    def update(done: int, **values: Any) -> None:
        nonlocal last
        now = time.monotonic()
        if now - last < LINE_SECONDS and done != total:
            return
        last = now
        parts = [f"{done}/{total} {unit}" if total else f"{done} {unit}", _words(values)]
        if total and 0 < done < total:
            parts.append(f"{units.duration((now - begin) / done * (total - done))} left")
        err.print(f"{title}: " + ", ".join(part for part in parts if part))

    yield update


def _words(values: dict[str, Any]) -> str:
    return ", ".join(
        f"{name.replace('_per_', '/').replace('_', ' ')} {_number(value)}" for name, value in values.items()
    )


def _number(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)
