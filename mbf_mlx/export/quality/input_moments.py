"""The second moments of layers' inputs: the mean of x x^T over the tokens of some rows.

Layers that get the very same array (q, k and v of a block) share one matrix. The matrices of one pass over the rows
keep to a memory budget; a model with more layers is run again for the next ones.
"""

import tempfile
import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from mbf_mlx.engine.taps import called_by
from mbf_mlx.files.storage import refusal

BUDGET_BYTES = 256 << 20  # for matrices at a time
TOKENS = 1024  # in one forward pass


class Shelf:
    """Keeps a matrix (in, in) float32 for each layer in a nameless temporary file, which vanishes with the process.

    Args:
        folder: The folder whose disk holds the file.

    Raises:
        InputError: the disk is full or may not be written, here and in `put`.
    """

    def __init__(self, folder: Path) -> None:
        self._folder, self._places = folder, dict[str, tuple[int, int]]()
        with self._refusing():
            self._file = tempfile.TemporaryFile(dir=folder)
        weakref.finalize(self, self._file.close)

    def put(self, names: Sequence[str], matrix: np.ndarray) -> None:
        """Keep one matrix for the layers that share it."""
        with self._refusing():
            place = self._file.seek(0, 2)
            self._file.write(np.ascontiguousarray(matrix, np.float32).data)
            self._file.flush()
        self._places.update(dict.fromkeys(names, (place, len(matrix))))

    def place(self, name: str) -> int | None:
        """Return the place of a layer's matrix, the same for all layers that share it; None if there is none."""
        return self._places[name][0] if name in self._places else None

    def get(self, name: str) -> np.ndarray:
        """Return a layer's matrix."""
        place, size = self._places[name]
        self._file.seek(place)
        return np.frombuffer(self._file.read(4 * size * size), np.float32).reshape(size, size)

    @contextmanager
    def _refusing(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise refusal(error, self._folder) from error


def moments(
    model: nn.Module, layers: dict[str, nn.Module], rows: Sequence[Any], advance: Callable[[int], None] = lambda n: None
) -> Iterator[tuple[list[str], np.ndarray]]:
    """Yield groups of layers that have the same inputs, each with its matrix (in, in) float32.

    Args:
        model: Called as `model(tokens)`.
        layers: The layers to watch by their path in the model, in the order in which they run.
        rows: Objects with `tokens`.
        advance: Called with the number of rows just done; each pass counts every row once.
    """
    left = dict(layers)
    while left:
        part = _affordable(left)
        yield from _one_pass(model, part, rows, advance)
        left = {name: layer for name, layer in left.items() if name not in part}


def _affordable(layers: dict[str, nn.Module]) -> dict[str, nn.Module]:
    """Return the first layers whose matrices fit the budget; at least one layer."""
    part: dict[str, nn.Module] = {}
    spent = 0
    for name, layer in layers.items():
        spent += 4 * layer.lora_a.shape[0] ** 2
        if part and spent > BUDGET_BYTES:
            break
        part[name] = layer
    return part


def _one_pass(
    model: nn.Module, layers: dict[str, nn.Module], rows: Sequence[Any], advance: Callable[[int], None]
) -> list[tuple[list[str], np.ndarray]]:
    sums: dict[str, mx.array] = {}
    leader: dict[str, str] = {}  # layer -> the first of those with the same input
    mask = mx.array(0.0)
    last: tuple[mx.array, str] | None = None

    def call(name: str, layer: nn.Module, x: mx.array) -> mx.array:
        nonlocal last
        if last is not None and last[0] is x:
            leader[name] = last[1]
        else:
            leader[name] = name
            last = (x, name)
            flat = x.reshape(-1, x.shape[-1]).astype(mx.float32) * mask
            sums[name] = sums.get(name, mx.array(0.0)) + flat.T @ flat
        y: mx.array = layer(x)
        return y

    with called_by(call, model, layers):
        for tokens, real in _batches(rows):
            mask, last = mx.array(real.reshape(-1, 1)), None
            out = model(mx.array(tokens))
            mx.eval(sums)
            del out  # never evaluated, because nothing after the last watched layer is needed
            advance(len(tokens))
    count = max(1, sum(len(row.tokens) for row in rows))
    groups: dict[str, list[str]] = {}
    for name in layers:
        groups.setdefault(leader[name], []).append(name)
    return [(names, np.array(sums.pop(first)) / count) for first, names in groups.items()]


def _batches(rows: Sequence[Any]) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Yield tokens (rows, length) int32 and a mask of the real ones (rows, length) float32, shortest rows first."""
    order = sorted((np.asarray(row.tokens) for row in rows), key=len)
    while order:
        count = 1
        while count < len(order) and (count + 1) * len(order[count]) <= TOKENS:
            count += 1
        part, order = order[:count], order[count:]
        tokens = np.zeros((count, len(part[-1])), np.int32)
        for place, row in enumerate(part):
            tokens[place, : len(row)] = row
        yield tokens, (np.arange(tokens.shape[1]) < np.array([[len(row)] for row in part])).astype(np.float32)
