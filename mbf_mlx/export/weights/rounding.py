"""Rounding to few bits that keeps a small update: codes are chosen together, on the grid of the base.

The weights of a quantized base lie exactly on its grid, so nearest rounding undoes an update smaller than half a step.
There are two ways to keep the update, both without more bytes. `Rounder` knows the layer's inputs. It rounds one input
after the other and corrects each rounding error with the inputs that are still free. This keeps tr(E H E^T), the mean
square error of the layer's outputs, small. `by_chance` knows no inputs: it rounds up or down at random, and is right on
average.

Letters: W' = W + delta (rows, in), the target; E = stored - W'; H (in, in), the mean of x x^T over the layer's inputs;
U the upper Cholesky factor of the inverse of H.

Source: GPTQ, Frantar et al. 2022, arXiv:2210.17323. It fits a new grid; we keep the base's.
"""

from collections.abc import Callable

import numpy as np

DAMPING = 0.01  # share of the mean of H's diagonal that is added to it, so that inputs never seen count a little
BLOCK = 64  # inputs whose errors are passed on together
SWEEPS = 3  # passes over all codes after the first rounding
Grid = tuple[np.ndarray, np.ndarray]  # scales and offsets, (rows, groups) float32


class Rounder:
    """Rounds rows of layers that have the same inputs.

    Args:
        moment: H, (in, in), times any number.
        damping: As DAMPING says.
    """

    def __init__(self, moment: np.ndarray, damping: float = DAMPING) -> None:
        h = moment.astype(np.float64)
        mean = float(np.diagonal(h).mean())
        h += damping * (mean if mean > 0 else 1.0) * np.eye(len(h))
        # The inputs that matter most come first, while others are left to correct their errors.
        self._order = np.argsort(-np.diagonal(h), kind="stable")
        h = h[np.ix_(self._order, self._order)]
        self._u = np.linalg.cholesky(np.linalg.inv(h)).T.astype(np.float32)
        self._h = h.astype(np.float32)

    def __call__(self, target: np.ndarray, grid: Grid, bits: int) -> np.ndarray:
        """Return codes (rows, in) uint8 for W' on a given grid."""
        scales, offsets = (np.repeat(part, target.shape[1] // part.shape[1], axis=1) for part in grid)
        scales, offsets, wanted = (each[:, self._order] for each in (_divisible(scales), offsets, target))
        codes = self._compensate(wanted.copy(), scales, offsets, 2**bits - 1)
        self._improve(codes, wanted, scales, offsets, 2**bits - 1)
        result = np.empty(target.shape, np.uint8)
        result[:, self._order] = codes
        return result

    def _compensate(self, left: np.ndarray, scales: np.ndarray, offsets: np.ndarray, top: int) -> np.ndarray:
        """Round one input after the other; `left` is the remaining target, with the corrections so far."""
        u, codes = self._u, np.empty(left.shape, np.float32)
        for first in range(0, left.shape[1], BLOCK):
            last = min(first + BLOCK, left.shape[1])
            errors = np.empty((len(left), last - first), np.float32)
            for i in range(first, last):
                codes[:, i] = np.clip(np.rint((left[:, i] - offsets[:, i]) / scales[:, i]), 0, top)
                error = (left[:, i] - codes[:, i] * scales[:, i] - offsets[:, i]) / u[i, i]
                left[:, i + 1 : last] -= error[:, None] * u[i, i + 1 : last]
                errors[:, i - first] = error
            left[:, last:] -= errors @ u[first:last, last:]
        return codes

    def _improve(
        self, codes: np.ndarray, target: np.ndarray, scales: np.ndarray, offsets: np.ndarray, top: int
    ) -> None:
        """Change single codes, in place, as long as that lowers tr(E H E^T)."""
        h = self._h
        slope = (codes * scales + offsets - target) @ h
        for _ in range(SWEEPS):
            moved = False
            for i in range(codes.shape[1]):
                best = np.clip(codes[:, i] - np.rint(slope[:, i] / (scales[:, i] * h[i, i])), 0, top)
                rows = np.flatnonzero(best != codes[:, i])
                if len(rows):
                    step = best[rows] - codes[rows, i]
                    codes[rows, i] = best[rows]
                    slope[rows] += (step * scales[rows, i])[:, None] * h[i]
                    moved = True
            if not moved:
                return


Rounders = Callable[[str], Rounder | None]  # layer -> the rounder of its inputs


def no_rounder(layer: str) -> Rounder | None:
    """Return None: every layer is rounded at random."""
    return None


def by_chance(target: np.ndarray, grid: Grid, bits: int, seed: list[int]) -> np.ndarray:
    """Return codes (rows, in) uint8, each rounded up with the probability that makes it right on average."""
    scales, offsets = (np.repeat(part, target.shape[1] // part.shape[1], axis=1) for part in grid)
    place = (target - offsets) / _divisible(scales)
    below = np.floor(place)
    up = np.random.default_rng(seed).random(target.shape, np.float32) < place - below
    codes: np.ndarray = np.clip(below + up, 0, 2**bits - 1).astype(np.uint8)
    return codes


def _divisible(scales: np.ndarray) -> np.ndarray:
    """Return scales without zeros: a group of scale 0 has one value, whatever its codes."""
    return np.where(scales == 0, np.float32(1), scales)
