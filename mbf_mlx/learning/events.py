"""What learning reports while it runs. No mlx here, so that a display is ready before anything loads."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from mbf_mlx.stream.records import TaskRecord

if TYPE_CHECKING:
    from mbf_mlx.methods import State


@dataclass(frozen=True, kw_only=True)
class Step:
    """The figures after an optimizer step."""

    step: int
    steps: int
    loss: float
    learning_rate: float
    tokens_per_second: float
    valid_loss: float | None = None


class Events:
    """Called while learning runs. A subclass overrides what it wants to show; here every method does nothing."""

    def task(self, name: str, t: int, rows: int, notes: Sequence[str]) -> None:
        """Task number `t` begins; `notes` say what was cut, held out, dropped or continued."""

    def step(self, name: str, step: Step, peak_memory: int) -> None:
        """An optimizer step is done."""

    def scoring(self, name: str, done: int, total: int) -> None:
        """`done` of `total` test rows of a task are scored."""

    def measuring(self, name: str, done: int, total: int) -> None:
        """`done` of `total` training rows are measured, for a method that asks for it."""

    def merged(self, name: str, state: "State") -> None:
        """A task is trained and merged, and not yet scored; `state` is what the next task would start from."""

    def note(self, message: str) -> None:
        """Something that the user should know."""

    def learned(self, record: TaskRecord, seconds: float) -> None:
        """A task is committed; it took `seconds`, from reading its rows to the commit."""
