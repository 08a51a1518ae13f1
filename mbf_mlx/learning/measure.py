"""What a method asks to have measured of a task's rows, with the tuned factors in place."""

from collections.abc import Callable, Iterator, Sequence
from threading import Lock
from typing import Any

import mlx.core as mx
import numpy as np

from mbf_mlx.data.batches import Batch
from mbf_mlx.data.encode import Encoded
from mbf_mlx.engine.engine import Arrays, Engine
from mbf_mlx.engine.lora_layers import lora_layers
from mbf_mlx.learning.tuning import Tuning
from mbf_mlx.methods import Pair, Seen, measured_rows

TINY = 1e-37  # of squared gradients: what float32 can still divide by


Advance = Callable[[int, int], None]  # rows done, of so many


def squared_gradients(
    tuning: Tuning,
    engine: Engine,
    rows: Sequence[Encoded],
    batch_size: int,
    advance: Advance = lambda done, total: None,
) -> dict[str, Any]:
    """Return, of each array that trained, the mean over `rows` of the squared gradient of the row's mean loss.

    A row's gradients follow from the inputs of the layers and the gradients with respect to their outputs, which many
    rows have in one pass.
    """
    sums: Arrays = {name: mx.zeros_like(array) for name, array in tuning.arrays.items()}
    found: dict[tuple[int, int], dict[str, Pair]] = {}  # of a batch and a row of it: the gradients of the applied pairs
    layers, lock = lora_layers(tuning.model), Lock()
    tuning.apply(tuning.arrays)

    def note(place: int, name: str, x: mx.array, gradients: mx.array, row_of: np.ndarray) -> None:
        layer, x, g = layers[name], x.astype(mx.float32), gradients.astype(mx.float32)
        turned, back = layer.scale * (x @ layer.lora_a), layer.scale * (g @ layer.lora_b.T)
        for row in np.unique(row_of):
            at = mx.array(np.flatnonzero(row_of == row))
            pair = Pair(back[at].T @ x[at], g[at].T @ turned[at])
            mx.eval(pair)
            with lock:
                found.setdefault((place, int(row)), {})[name] = pair

    for batches, done in _together(engine, rows, batch_size):
        engine.watch(batches, note, logarithm=False)
        for each in sorted(found):
            for name, gradient in tuning.pull_back(found.pop(each)).items():
                sums[name] = sums[name] + mx.square(gradient)
            mx.eval(sums)
        advance(done, len(rows))
    return tuning.named({name: total / len(rows) for name, total in sums.items()})


def seen(
    tuning: Tuning,
    engine: Engine,
    rows: Sequence[Encoded],
    directions: dict[str, Any],
    batch_size: int,
    advance: Advance = lambda done, total: None,
) -> dict[str, Seen]:
    """Return `input_moments` of the rows that stand for all."""
    return input_moments(tuning, engine, [rows[i] for i in measured_rows(len(rows))], directions, batch_size, advance)


def input_moments(
    tuning: Tuning,
    engine: Engine,
    rows: Sequence[Encoded],
    directions: dict[str, Any],
    batch_size: int,
    advance: Advance = lambda done, total: None,
) -> dict[str, Seen]:
    """Return what each layer's inputs are in `rows`, by how much it matters what the layer makes of them.

    That is the mean over rows of the sum of w (P x) x^T over a row's tokens x. w is the token's share of the row's
    squared gradients: |g|^2 over its sum, g (out) being the gradient of the row's loss with respect to what the layer
    makes of x. Most tokens matter to hardly anything.

    Args:
        tuning: As training left it.
        engine: Of its model.
        rows: Token rows.
        directions: P (k, in) of each layer.
        batch_size: How many rows there is memory for at the same time.
        advance: Told how many rows are done.
    """
    sums = {name: np.zeros(p.shape, np.float32) for name, p in directions.items()}
    found: dict[str, dict[int, np.ndarray]] = {name: {} for name in sums}
    lock = Lock()
    tuning.apply(tuning.arrays)

    def add(name: str) -> None:  # in the rows' order, whichever thread was first: a sum's last bits depend on it
        for place in sorted(found[name]):
            sums[name] += found[name].pop(place)

    def note(place: int, name: str, x: mx.array, gradients: mx.array, row_of: np.ndarray) -> None:
        if name in sums:
            x, weights = x.astype(mx.float32), np.array(mx.square(gradients.astype(mx.float32)).sum(axis=-1))
            shares = weights / np.maximum(np.bincount(row_of, weights), TINY)[row_of]
            turned = x @ mx.array(np.asarray(directions[name], np.float32)).T
            product = np.array((mx.array(shares.astype(np.float32))[:, None] * turned).T @ x)
            with lock:
                found[name][place] = product
                if len(found[name]) == len(batches):
                    add(name)

    for batches, done in _together(engine, rows, batch_size):
        engine.watch(batches, note)
        for name in found:
            add(name)
        advance(done, len(rows))
    return {name: Seen(directions[name], total / len(rows)) for name, total in sums.items()}


def _together(engine: Engine, rows: Sequence[Encoded], batch_size: int) -> Iterator[tuple[list[Batch], int]]:
    """Yield the batches that are watched at the same time, and how many rows are done with them."""
    done = 0
    while done < len(rows):
        batches = engine.watched_together(rows, done, batch_size)
        done += sum(len(batch.indices) for batch in batches)
        yield batches, done
