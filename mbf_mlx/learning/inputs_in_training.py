"""Measures layers' inputs in the last backward passes of a training, where they meet the outputs' gradients anyway.

It is the mean that `measure.input_moments` describes, over the rows of the last steps: as many as would be measured
after training. Two things differ. The factors are still being trained, at the end of the learning rate's decay. And a
prefix that R rows share is computed once, so only the sum of the rows' gradients is known for its tokens; each row is
given an R-th of their squared length, and the prefix counts once for each row.

Letters: R rows of a batch; T tokens of one of its parts; g (out) the gradient of a batch's loss with respect to a
layer's output for a token x (in); P (k, in) the directions.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from threading import Lock

import mlx.core as mx
import numpy as np

from mbf_mlx.config import TrainConfig
from mbf_mlx.engine.cpu_ops import view
from mbf_mlx.engine.engine import Engine
from mbf_mlx.learning.measure import TINY
from mbf_mlx.learning.progress import Progress, Tensors
from mbf_mlx.learning.step_rules import steps_of
from mbf_mlx.learning.team import Team
from mbf_mlx.methods import MEASURED_ROWS, Method, Seen, State, Tuned

_PREFIX, _ROWS = "measured.", "measured rows"


@dataclass(frozen=True, kw_only=True)
class _Part:
    """What one part of a batch brings to a layer."""

    x: mx.array  # (T, in)
    squares: np.ndarray  # |g|^2 of each token, (T,)
    row_of: np.ndarray  # the part's row of each token, -1 for the prefix, (T,)


class InputsInTraining:
    """Sums of a task's inputs over the last steps of its training.

    Args:
        directions: P (k, in) for each layer.
        since: The first optimizer step, from 1, that is measured.

    Attributes:
        directions, since: As above.
    """

    def __init__(self, directions: Mapping[str, np.ndarray], since: int) -> None:
        self.since = since
        self.directions = {name: np.asarray(p, np.float32) for name, p in directions.items()}
        self._turned = {name: mx.array(p).T for name, p in self.directions.items()}
        mx.eval(self._turned)
        self._sums = {name: np.zeros(p.shape, np.float32) for name, p in self.directions.items()}
        self._rows = {name: 0 for name in self.directions}
        self._parts: dict[str, dict[int, _Part]] = {name: {} for name in self.directions}
        self._lock = Lock()
        self._is_whole = True

    def note(self, part: int, parts: int, name: str, x: mx.array, gradients: mx.array, row_of: np.ndarray) -> None:
        """Take what a backward pass has of a layer; the parts of a batch may do so at the same time.

        Args:
            part: The part's number, from 0.
            parts: How many parts the batch has. The layer's inputs are summed when all have come.
            name: The layer.
            x: Its inputs (T, in), evaluated. They must stay as they are until the last part has come.
            gradients: The gradients with respect to its outputs, (T, out), evaluated.
            row_of: The part's row of each token, -1 for a token of the prefix, (T,).
        """
        if name not in self._sums:
            return
        g = view(gradients)
        mine = _Part(x=x, squares=np.einsum("to,to->t", g, g), row_of=row_of)
        with self._lock:
            self._parts[name][part] = mine
            complete = len(self._parts[name]) == parts
            found = self._parts[name] if complete else {}
            if complete:
                self._parts[name] = {}
        if complete:
            self._add(name, [found[number] for number in range(parts)])

    def _add(self, name: str, parts: list[_Part]) -> None:
        rows = [int(each.row_of.max(initial=-1)) + 1 for each in parts]
        prefix = sum(float(each.squares[each.row_of < 0].sum()) for each in parts) / max(1, sum(rows))  # of each row
        inverses = []
        for part, count in zip(parts, rows, strict=True):
            own = part.row_of >= 0
            sums = np.bincount(part.row_of[own], part.squares[own], minlength=count)
            inverses.append(np.where(sums > 0, 1 / np.maximum(sums + prefix, TINY), 0.0))  # a row without targets: 0
        of_prefix = sum(float(each.sum()) for each in inverses) / max(1, sum(rows))
        for part, inverse in zip(parts, inverses, strict=True):
            shares = part.squares * np.where(part.row_of < 0, of_prefix, np.append(inverse, 0.0)[part.row_of])
            turned = part.x @ self._turned[name]
            product = (mx.array(shares.astype(np.float32))[:, None] * turned).T @ part.x
            self._sums[name] += view(product)
        self._rows[name] += sum(rows)

    def tensors(self) -> Tensors:
        """Return what continues the sums in another process."""
        sums = {f"{_PREFIX}{name}": total.copy() for name, total in self._sums.items()}
        return sums | {_ROWS: np.array([self._rows[name] for name in sorted(self._rows)], np.float32)}

    def take(self, progress: Progress, tensors: Tensors) -> Tensors:
        """Go on from a save; return its arrays without ours.

        A save of before has none. If its run had come to the measured steps, `seen` will be None.
        """
        own = {name: array for name, array in tensors.items() if name.startswith(_PREFIX) or name == _ROWS}
        names = sorted(self._sums)
        if own.keys() == {_ROWS, *(f"{_PREFIX}{name}" for name in names)}:
            self._sums = {name: own[f"{_PREFIX}{name}"].copy() for name in names}
            self._rows = dict(zip(names, own[_ROWS].astype(int).tolist(), strict=True))
        elif progress.step >= self.since:
            self._is_whole = False
        return {name: array for name, array in tensors.items() if name not in own}

    def seen(self) -> dict[str, Seen] | None:
        """Return what was measured; None if some of the measured steps were taken before a save that lacks them."""
        if not self._is_whole or not all(self._rows.values()):
            return None
        return {name: Seen(p, self._sums[name] / self._rows[name]) for name, p in self.directions.items()}


def inputs_in_training(
    method: Method, state: State, start: Tuned, engine: Engine, config: TrainConfig, rows: int, team: Team | None
) -> InputsInTraining | None:
    """Return what measures a task's inputs while it trains; None where they are measured after training.

    Args:
        method, state: The method, and the state after the task before.
        start: What training starts from.
        engine: Computes the training.
        config: How the task is trained; without validation rows, for then an earlier step's factors may be kept.
        rows: How many rows it is trained on.
        team: The processes that share each step.
    """
    if not method.measures_in_training or not engine.notes_training or team is not None:
        return None
    per_step = min(rows, config.batch_size * config.grad_accumulation_steps)
    measured = math.ceil(min(rows, MEASURED_ROWS) / per_step)
    return InputsInTraining(method.measure(state, start), max(1, steps_of(config, rows) - measured + 1))
