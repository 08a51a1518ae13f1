"""Where a training run stands, how it ended, and when it is saved."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
from pydantic import ConfigDict, TypeAdapter, ValidationError

from mbf_mlx.errors import InputError
from mbf_mlx.methods import Seen

CURVE_POINTS = 24
SAVE_SHARE = 0.02  # saves that come every so many seconds take at most this share of a run's time

Tensors = dict[str, np.ndarray]


@dataclass(frozen=True, kw_only=True)
class Progress:
    """Where a run stands. Together with the saved tensors it continues the run exactly."""

    __pydantic_config__: ClassVar[ConfigDict] = ConfigDict(extra="forbid")

    step: int = 0  # optimizer steps taken
    first_loss: float | None = None  # loss of the first step
    high_steps: int = 0  # steps in a row whose loss was far above the first
    best_loss: float | None = None  # loss of the best validation
    best_step: int = 0
    validations_since: int = 0  # validations since the best one
    loss_before: float | None = None  # on the sample rows, before the first step
    losses: list[float] = field(default_factory=list)  # one for each step
    real_tokens: int = 0
    computed_tokens: int = 0
    seconds: float = 0.0  # in training steps and their batches
    stopped: bool = False  # patience ran out


def progress_to_json(progress: Progress) -> dict[str, Any]:
    """Return a run's progress as plain JSON values."""
    return asdict(progress)


def progress_of(document: dict[str, Any], where: Path) -> Progress:
    """Return what `progress_to_json` has written.

    Args:
        document: A save's progress.
        where: The save, for the message.

    Raises:
        InputError: unknown fields, or values of another kind.
    """
    try:
        return TypeAdapter(Progress).validate_python(document)
    except ValidationError as error:
        first = error.errors()[0]
        name = ".".join(map(str, first["loc"]))
        raise InputError(
            f"{where}: the saved run cannot go on: progress: {name}: {first['msg'].lower()}"
            "\nhint: add --restart to start the task over"
        ) from error


def check_shapes(tensors: Tensors, expected: dict[str, tuple[int, ...]]) -> None:
    """Refuse saved arrays that are not those of this run.

    Args:
        tensors: The arrays; "best.X" has the shape of "factor.X", and is there only with validation.
        expected: The shape of every other array.

    Raises:
        InputError: the first one that is missing, unknown or of another shape is named.
    """
    found = {name: array.shape for name, array in tensors.items()}
    if any(name.startswith("best.") for name in found):
        factors = {name: shape for name, shape in expected.items() if name.startswith("factor.")}
        expected = expected | {f"best.{name.removeprefix('factor.')}": shape for name, shape in factors.items()}
    for name in sorted(expected.keys() | found.keys()):
        if expected.get(name) != found.get(name):
            raise InputError(
                f"the saved run cannot go on: {name}: expected shape {expected.get(name, 'none')}, got"
                f" {found.get(name, 'none')}\nhint: add --restart to start the task over"
            )


@dataclass(frozen=True, kw_only=True)
class Trained:
    """The end of a run. `tuning` holds the tuned factors, the best ones where there was validation."""

    progress: Progress
    loss_after: float | None
    inputs: Mapping[str, Seen] | None = None  # of the layers, if they were measured in training

    @property
    def curve(self) -> list[tuple[int, float]]:
        """At most 24 (step, mean loss) points of the training loss."""
        losses = self.progress.losses
        parts = np.array_split(np.arange(len(losses)), min(CURVE_POINTS, max(1, len(losses))))
        return [(int(p[-1]) + 1, round(float(np.mean([losses[i] for i in p])), 4)) for p in parts if len(p)]


@dataclass(frozen=True, kw_only=True)
class Training:
    """The figures of a finished training, as a stream's history and an experiment's results hold them."""

    seconds: float  # in training steps and their batches
    steps: int
    best_step: int  # 0 without validation
    tokens: int  # real ones, without padding
    computed_tokens: int
    loss_before: float | None
    loss_after: float | None
    curve: Sequence[tuple[int, float]]
    peak_memory_bytes: int

    @classmethod
    def of(cls, trained: Trained, peak_memory: int) -> "Training":
        """Return the figures of a run that has just ended."""
        progress = trained.progress
        return cls(
            seconds=progress.seconds,
            steps=progress.step,
            best_step=progress.best_step,
            tokens=progress.real_tokens,
            computed_tokens=progress.computed_tokens,
            loss_before=progress.loss_before,
            loss_after=trained.loss_after,
            curve=trained.curve,
            peak_memory_bytes=peak_memory,
        )


class SaveClock:
    """Says when a run is saved next: after so many steps or seconds, but never so often that saves become costly.

    Args:
        steps, seconds: The distance between two saves; None where the other one counts, or none does.
        now: Seconds on any clock that only goes forward.
    """

    def __init__(self, steps: int | None, seconds: float | None, now: float) -> None:
        self.steps, self.seconds, self.pause, self.last = steps, seconds, seconds or 0.0, now

    def is_due(self, step: int, now: float) -> bool:
        """Return whether to save after `step`."""
        return bool(self.steps and step % self.steps == 0) or bool(self.seconds and now - self.last >= self.pause)

    def saved(self, began: float, ended: float) -> None:
        """Note a save. A slow save (large factors, a slow disk) puts off the next one."""
        self.last, self.pause = ended, max(self.seconds or 0.0, (ended - began) * (1 / SAVE_SHARE - 1))
