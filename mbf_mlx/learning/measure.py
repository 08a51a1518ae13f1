"""Measures a task's rows for a method, while the model applies the tuned factors: squared gradients, layers' inputs."""

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from threading import Lock

import mlx.core as mx
import numpy as np

from mbf_mlx.config import DataConfig
from mbf_mlx.data.batches import Batch
from mbf_mlx.data.encode import Encoded, Encoder
from mbf_mlx.data.task import read_task
from mbf_mlx.engine.engine import Arrays, Engine
from mbf_mlx.engine.lora_layers import lora_layers
from mbf_mlx.learning.learner import Learner
from mbf_mlx.learning.tuning import Tuning
from mbf_mlx.methods import Factors, Method, Pair, Seen, State, Tuned, measured_rows

TINY = 1e-37  # a sum of squared gradients is taken as at least this: float32 can still divide by it

Advance = Callable[[int, int], None]  # called with the rows done, and with how many there are


def squared_gradients(
    tuning: Tuning,
    engine: Engine,
    rows: Sequence[Encoded],
    batch_size: int,
    advance: Advance = lambda done, total: None,
) -> Tuned:
    """Return, for each array that trained, the mean over `rows` of the squared gradient of the row's mean loss.

    One pass gives many rows' layer inputs and gradients of layer outputs; each row's own gradient follows from these.
    Arguments as for `input_moments`.
    """
    sums: Arrays = {name: mx.zeros_like(array) for name, array in tuning.arrays.items()}
    found: dict[tuple[int, int], dict[str, Pair]] = {}  # (batch, row in it) -> the gradients of the applied pairs
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


def measured_inputs(
    method: Method,
    state: State,
    tuning: Tuning,
    engine: Engine,
    rows: Sequence[Encoded],
    batch_size: int,
    advance: Advance = lambda done, total: None,
) -> dict[str, Seen]:
    """Return what the method asks for, measured on those rows of the task that stand for all.

    Args:
        method, state: The same that the task was started with.
        tuning, engine, rows, batch_size, advance: As for `input_moments`.
    """
    chosen = [rows[i] for i in measured_rows(len(rows))]
    return input_moments(tuning, engine, chosen, method.measure(state, tuning.named()), batch_size, advance)


def inputs_of_task(
    learner: Learner, method: Method, state: State, tuned: Factors, source: Path, data: DataConfig, stream: Path
) -> dict[str, Seen]:
    """Return what the method asks for of a task that was trained elsewhere.

    Args:
        learner: The base model, with factors attached.
        method, state: The stream's method, and its state before the task.
        tuned: What was trained elsewhere.
        source: The task file or folder with the rows that it was trained on.
        data: How its rows become tokens.
        stream: The stream's folder; tokens that are too many for memory go there.

    Raises:
        InputError: the task cannot be read, or its rows do not fit the model.
    """
    task = read_task(source)
    rows = Encoder(learner.tokenizer, data, stream).all(task.train, task.path)
    tuning = Tuning(learner.base.model, method, state)
    tuning.take(tuned)
    learner.base.model.eval()
    return measured_inputs(method, state, tuning, learner.engine, rows, batch_size=1)


def input_moments(
    tuning: Tuning,
    engine: Engine,
    rows: Sequence[Encoded],
    directions: dict[str, np.ndarray],
    batch_size: int,
    advance: Advance = lambda done, total: None,
) -> dict[str, Seen]:
    """Return each layer's inputs in `rows`, weighted by how much the loss depends on the layer's output for them.

    That is the mean over rows of the sum of w (P x) x^T over a row's tokens x. w = |g|^2 / (sum of |g|^2 over the row),
    where g (out) is the gradient of the row's loss with respect to the layer's output for x. Most tokens have w near 0.

    Args:
        tuning: The result of training.
        engine: The engine of its model.
        rows: Token rows.
        directions: P (k, in) for each layer.
        batch_size: How many rows there is memory for at the same time.
        advance: Called with the number of rows that are done, and of all.
    """
    sums = {name: np.zeros(p.shape, np.float32) for name, p in directions.items()}
    found: dict[str, dict[int, np.ndarray]] = {name: {} for name in sums}
    lock = Lock()
    tuning.apply(tuning.arrays)

    def add(name: str) -> None:  # in the order of the rows, not of the threads: a sum's last bits depend on the order
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
    """Yield the batches that are watched at the same time, and how many rows are done after them."""
    done = 0
    while done < len(rows):
        batches = engine.watched_together(rows, done, batch_size)
        done += sum(len(batch.indices) for batch in batches)
        yield batches, done
