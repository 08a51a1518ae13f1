"""Where a training run stands, and when it is saved."""

from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np

CURVE_POINTS = 24


@dataclass(frozen=True, kw_only=True)
class Progress:
    """Where a run stands: all that, with the saved tensors, continues it exactly."""

    step: int = 0  # optimizer steps taken
    first_loss: float | None = None  # of the first step
    high_steps: int = 0  # steps in a row whose loss was far above the first
    best_loss: float | None = None  # of the best validation
    best_step: int = 0
    validations_since: int = 0  # without a better one
    loss_before: float | None = None  # on the sample rows, before the first step
    losses: list[float] = field(default_factory=list)  # of every step
    real_tokens: int = 0
    computed_tokens: int = 0
    seconds: float = 0.0  # in training steps and their batches
    stopped: bool = False  # patience ran out


@dataclass(frozen=True, kw_only=True)
class Trained:
    """The end of a run: `tuning` holds what was tuned, the best of it where there was validation."""

    progress: Progress
    loss_after: float | None

    @property
    def curve(self) -> list[tuple[int, float]]:
        """At most 24 (step, mean loss) points of the training loss."""
        losses = self.progress.losses
        parts = np.array_split(np.arange(len(losses)), min(CURVE_POINTS, max(1, len(losses))))
        return [(int(p[-1]) + 1, round(float(np.mean([losses[i] for i in p])), 4)) for p in parts if len(p)]


def progress_to_json(progress: Progress) -> dict[str, Any]:
    """Return a run's place as plain JSON values."""
    return asdict(progress)


SAVE_SHARE = 0.02  # of a run's time, at most, goes into saves that come every so many seconds


class SaveClock:
    """Says when a run is saved next: after so many steps, or seconds, and then no sooner than keeps saves cheap.

    Args:
        steps, seconds: Between two saves; None where the other counts, or nothing does.
        now: Seconds on any clock that only goes forward.
    """

    def __init__(self, steps: int | None, seconds: float | None, now: float) -> None:
        self.steps, self.seconds, self.pause, self.last = steps, seconds, seconds or 0.0, now

    def is_due(self, step: int, now: float) -> bool:
        """Return whether to save after `step`."""
        return bool(self.steps and step % self.steps == 0) or bool(self.seconds and now - self.last >= self.pause)

    def saved(self, began: float, ended: float) -> None:
        """Take note of a save; a slow one (large factors, a slow disk) puts off the next."""
        self.last, self.pause = ended, max(self.seconds or 0.0, (ended - began) * (1 / SAVE_SHARE - 1))
