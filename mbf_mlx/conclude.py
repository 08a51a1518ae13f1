"""From a task's tuned factors to the next state: measured where the method asks for it, merged, and shown the task.

The hooks `extra_rows`, `measure` and `after_task` are called here and nowhere else. Shapes: A (rank, in), B (out,
rank), P (k, in) of a layer. Nothing is trained and nothing written.
"""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx.utils import tree_unflatten

from mbf_mlx import rows as task_rows
from mbf_mlx.batches import lengths_of, make_batch, plan_batches
from mbf_mlx.encode import Encoded
from mbf_mlx.engine import Arrays, Engine
from mbf_mlx.methods import Method, Row, State
from mbf_mlx.model import lora_layers
from mbf_mlx.tuning import Tuning

BATCH_ROWS = 8  # of a pass that only looks
MEASURED_ROWS = 128  # that a method's `measure` is shown of a task at most, evenly drawn: means of thousands of tokens
KEPT = Path("(a row that the stream keeps)")

Advance = Callable[[int, int], None]  # rows done, of so many


def with_extra(method: Method, state: State, rows: Sequence[Encoded]) -> Sequence[Encoded]:
    """Return the rows that a task trains on: its own, and those that the method mixes in."""
    extra: list[Row] = getattr(method, "extra_rows", lambda *_: [])(state, len(rows))
    kept = [
        Encoded(
            tokens=np.asarray(row.tokens, np.int32),
            supervised=np.asarray(row.supervised, bool),
            prompt_length=int(np.argmax(row.supervised)),
            cut=0,
            row=task_rows.Row("text", KEPT, number),
        )
        for number, row in enumerate(extra, start=1)
    ]
    return [*rows, *kept] if kept else rows


def conclude(
    method: Method,
    state: State,
    tuning: Tuning,
    engine: Engine,
    rows: Sequence[Encoded],
    advance: Advance = lambda done, total: None,
) -> State:
    """Return the state after a task.

    Args:
        method, state: As the task was started with.
        tuning: As training left it.
        engine: Of the model.
        rows: The task's own training rows.
        advance: Told how far a method's measuring of the rows is, where it does any.
    """
    tuned, asks, needs = tuning.named(), getattr(method, "measure", None), getattr(method, "needs", None)
    tuning.model.eval()
    inputs = None
    if asks:
        some = [rows[i] for i in range(0, len(rows), -(-len(rows) // MEASURED_ROWS))]
        inputs = input_moments(tuning.model, engine, some, asks(state, tuned), advance)
    what: Any = None
    if needs == "rows":
        what = [Row(row.tokens, row.supervised) for row in rows]
    elif needs == "gradients":
        what = squared_gradients(tuning, engine, rows, advance)
    finish: Any = method.finish
    after = finish(state, tuned) if inputs is None else finish(state, tuned, inputs=inputs)
    show: Any = getattr(method, "after_task", None)
    return show(after, what) if show and needs else after


def squared_gradients(
    tuning: Tuning, engine: Engine, rows: Sequence[Encoded], advance: Advance = lambda done, total: None
) -> dict[str, Any]:
    """Return, of each array that trained, the mean over `rows` of the squared gradient of the row's mean loss."""
    sums: Arrays = {name: mx.zeros_like(array) for name, array in tuning.arrays.items()}

    def loss(arrays: Arrays, batch: Any) -> mx.array:
        tuning.apply(arrays)
        return engine.loss_sum(batch) / len(batch.targets)

    gradient = mx.grad(loss)
    for index in range(len(rows)):
        found = gradient(tuning.arrays, make_batch(rows, [index]))
        sums = {name: total + mx.square(found[name]) for name, total in sums.items()}
        mx.eval(sums)
        advance(index + 1, len(rows))
    tuning.apply(tuning.arrays)
    return tuning.named({name: total / len(rows) for name, total in sums.items()})


class Watching(nn.Module):
    """Stands in for a layer, computes what it computes and notes its inputs."""

    def __init__(self, layer: nn.Module, note: Callable[[mx.array], None]) -> None:
        super().__init__()
        self.layer = layer
        self._note = note

    def __call__(self, x: mx.array) -> mx.array:
        self._note(x)
        return self.layer(x)


def input_moments(
    model: nn.Module,
    engine: Engine,
    rows: Sequence[Encoded],
    directions: dict[str, Any],
    advance: Advance = lambda done, total: None,
) -> dict[str, np.ndarray]:
    """Return, for each layer, the mean of (P x) x^T over the tokens x that reach it in `rows`, (k, in).

    Args:
        model: As it stands; padding is not counted, nor what follows a row's last supervised token.
        engine: Of that model.
        rows: Token rows.
        directions: P (k, in) of each layer.
        advance: Told how many rows are done.
    """
    layers = {name: layer for name, layer in lora_layers(model).items() if name in directions}
    turned = {name: mx.array(np.asarray(p, np.float32)).T for name, p in directions.items()}
    sums = {name: mx.zeros((p.shape[1], p.shape[0])) for name, p in turned.items()}
    mask = mx.array(0.0)
    way = engine.forward  # made when first asked for, and it runs the model then: not while we watch

    def watch(name: str) -> Callable[[mx.array], None]:
        def note(x: mx.array) -> None:
            tokens = x.reshape(-1, x.shape[-1]).astype(mx.float32) * mask
            sums[name] = sums[name] + (tokens @ turned[name]).T @ tokens

        return note

    model.update_modules(tree_unflatten([(name, Watching(layer, watch(name))) for name, layer in layers.items()]))
    count = done = 0
    try:
        for indices in plan_batches(lengths_of(rows), BATCH_ROWS, 0, 0):
            batch = make_batch(rows, indices, share_prefix=False)
            mask = mx.array((np.arange(batch.tokens.shape[1]) < batch.lengths[:, None]).reshape(-1, 1), mx.float32)
            out = way.hidden(batch) if way.picks_positions else way.logits(batch)
            mx.eval(sums)
            del out  # never evaluated: what lies behind the last watched layer is not needed
            count, done = count + int(batch.lengths.sum()), done + len(indices)
            advance(done, len(rows))
    finally:
        model.update_modules(tree_unflatten(list(layers.items())))
    return {name: np.array(total / max(1, count)) for name, total in sums.items()}
