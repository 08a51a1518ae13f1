"""What several commands read and show alike: task files, progress on stderr, a stream's status."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mbf_mlx import units
from mbf_mlx.commands import console
from mbf_mlx.errors import InputError
from mbf_mlx.learning.events import Events, Step

if TYPE_CHECKING:
    from mbf_mlx.data.task import Task
    from mbf_mlx.stream.records import TaskRecord


def read_all(paths: Sequence[Path], name: str | None = None) -> "list[Task]":
    """Read and check every row of every task, before any model is loaded.

    Raises:
        InputError: everything that does not fit, in all tasks at once.
    """
    from mbf_mlx.data.task import read_task, read_tasks

    if name is None:
        return list(read_tasks(paths))
    if len(paths) != 1:
        raise InputError(f"--name: expected one task to name, got {len(paths)}")
    return [read_task(paths[0], name=name)]


@contextmanager
def show_progress() -> Iterator[Events]:
    """Yield events that show on stderr what happens."""
    events = _Progress()
    with events.bars:
        yield events


def print_status(document: dict[str, Any]) -> None:
    """Print a stream's status for a person: the matrix of scores, and a few lines under it."""
    from mbf_mlx.report.terminal import matrix, summary

    if document["tasks"]:
        console.out.print(matrix(document, console.out.width), soft_wrap=True)  # its title may be wider
    for line in summary(document):
        console.out.print(line)


class _Progress(Events):
    """One bar while a task trains, one while each task is scored; a line when a task begins and when it is learned."""

    def __init__(self) -> None:
        self.bars = ExitStack()
        self._update: Callable[..., None] | None = None
        self._title = ""

    def task(self, name: str, t: int, rows: int, notes: Sequence[str]) -> None:
        """Print that a task begins."""
        self._end_bar()
        console.err.print(f"task {t}, {name}: {rows} rows")
        for note in notes:
            console.warn(f"{name}: {note}")

    def step(self, name: str, step: Step, peak_memory: int) -> None:
        """Move the bar of a training task."""
        values = {"loss": step.loss, "tokens_per_second": step.tokens_per_second, "peak": units.size(peak_memory)}
        if step.valid_loss is not None:
            values["valid"] = step.valid_loss
        self._bar(f"learning {name}", step.steps, "steps")(step.step, **values)

    def scoring(self, name: str, done: int, total: int) -> None:
        """Move the bar of a task that is scored."""
        self._bar(f"scoring {name}", total, "rows")(done)

    def measuring(self, name: str, done: int, total: int) -> None:
        """Move the bar of a task whose inputs are measured."""
        self._bar(f"measuring {name}", total, "rows")(done)

    def note(self, message: str) -> None:
        """Print a warning."""
        console.warn(message)

    def learned(self, record: "TaskRecord", seconds: float) -> None:
        """Print what a task has reached."""
        self._end_bar()
        value = record.scores[-1]
        scored = f"scores {100 * value:.1f} %" if value is not None else f"loss {record.losses[-1]}"
        console.err.print(
            f"learned {record.name} in {units.duration(seconds)}: loss {record.loss_before:.3f} ->"
            f" {record.loss_after:.3f}, {scored} on {record.test_rows} test rows"
        )

    def _bar(self, title: str, total: int, unit: str) -> Callable[..., None]:
        """Return the update of the bar with this title; another title ends the bar before it."""
        if title != self._title or self._update is None:
            self.bars.close()
            self._title, self._update = title, self.bars.enter_context(console.progress(title, total, unit))
        return self._update

    def _end_bar(self) -> None:
        self.bars.close()
        self._title = ""
