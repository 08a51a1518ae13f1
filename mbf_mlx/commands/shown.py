"""What commands that learn and score show on stderr."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mbf_mlx import units
from mbf_mlx.commands import console
from mbf_mlx.errors import InputError

if TYPE_CHECKING:
    from mbf_mlx.learning.events import Step
    from mbf_mlx.stream.records import TaskRecord


def read_all(paths: Sequence[Path], name: str | None = None) -> list[Any]:
    """Read and check every row of every task, before any model is loaded.

    Raises:
        InputError: all that does not fit, of all tasks at once.
    """
    from mbf_mlx.data.task import read_task, read_tasks

    if name is None:
        return list(read_tasks(paths))
    if len(paths) != 1:
        raise InputError(f"--name: expected one task to name, got {len(paths)}")
    return [read_task(paths[0], name=name)]


@contextmanager
def show_progress() -> Iterator[Any]:
    """Yield events that show on stderr what happens: one bar for training a task, one for scoring each."""
    from mbf_mlx.learning.events import Events

    class Shown(Events):
        def __init__(self) -> None:
            self.bars = ExitStack()
            self.update: Callable[..., None] | None = None
            self.title = ""

        def bar(self, title: str, total: int, unit: str) -> Callable[..., None]:
            if title != self.title or self.update is None:
                self.bars.close()
                self.title, self.update = title, self.bars.enter_context(console.progress(title, total, unit))
            return self.update

        def task(self, name: str, t: int, rows: int, notes: Sequence[str]) -> None:
            self.bars.close()
            self.title = ""
            console.err.print(f"task {t}, {name}: {rows} rows")
            for note in notes:
                console.warn(f"{name}: {note}")

        def step(self, name: str, step: "Step", peak_memory: int) -> None:
            values = {"loss": step.loss, "tokens_per_second": step.tokens_per_second, "peak": units.size(peak_memory)}
            if step.valid_loss is not None:
                values["valid"] = step.valid_loss
            self.bar(f"learning {name}", step.steps, "steps")(step.step, **values)

        def scoring(self, name: str, done: int, total: int) -> None:
            self.bar(f"scoring {name}", total, "rows")(done)

        def measuring(self, name: str, done: int, total: int) -> None:
            self.bar(f"measuring {name}", total, "rows")(done)

        def note(self, message: str) -> None:
            console.warn(message)

        def learned(self, record: "TaskRecord") -> None:
            self.bars.close()
            self.title = ""
            value = record.scores[-1]
            scored = f"scores {100 * value:.1f} %" if value is not None else f"loss {record.losses[-1]}"
            console.err.print(
                f"learned {record.name} in {units.duration(record.seconds)}: loss {record.loss_before:.3f} ->"
                f" {record.loss_after:.3f}, {scored} on {record.test_rows} test rows"
            )

    events = Shown()
    with events.bars:
        yield events
