"""Few bits without losing a small update: codes chosen together, on the grid that the base has already.

A base that was quantized lies exactly on its grid, and an update smaller than half a step is rounded straight back. Two
ways out, both of the base's own size. `Rounder` knows the layer's inputs: it rounds one input after the other and makes
up for each rounding error with the inputs that are still free, so that tr(E H E^T), the mean square of what the layer
puts out wrongly, stays small. `by_chance` knows nothing: it rounds up or down at random, right on average.

Letters: W' = W + delta (rows, in), the target; E = stored - W'; H (in, in), the mean of x x^T over the layer's inputs;
U the upper Cholesky factor of the inverse of H.

Source: making up for errors is GPTQ's, Frantar et al. 2022, arXiv:2210.17323. Its grid is fitted anew; ours is kept.
"""

from collections.abc import Callable

import numpy as np

DAMPING = 0.01  # share of the mean of H's diagonal added to it: inputs that calibration did not see count a little
BLOCK = 64  # inputs whose errors are handed on together
SWEEPS = 3  # over all codes after the first rounding
Grid = tuple[np.ndarray, np.ndarray]  # scales and offsets, (rows, groups) float32


class Rounder:
    """Rounds rows of layers that have the same inputs.

    Args:
        moment: H, (in, in), times any number.
        damping: See DAMPING.
    """

    def __init__(self, moment: np.ndarray, damping: float = DAMPING) -> None:
        h = moment.astype(np.float64)
        mean = float(np.diagonal(h).mean())
        h += damping * (mean if mean > 0 else 1.0) * np.eye(len(h))
        # Inputs that matter most come first, while there are others left to make up for them.
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
        """Round one input after the other; `left` holds what is still wanted of those to come."""
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
        """Move single codes, in place, while that lowers tr(E H E^T)."""
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


Rounders = Callable[[str], Rounder | None]  # layer -> what rounds it for the inputs that it has


def no_rounder(layer: str) -> Rounder | None:
    """Round every layer by chance."""
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
