"""From a task's tuned factors to the next state: measured where the method asks for it, merged, and shown the task.

The hooks `extra_rows`, `measure` and `after_task` are called here and nowhere else. Shapes: A (rank, in), B (out,
rank), P (k, in) of a layer. Nothing is trained and nothing written.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from mbf_mlx.data import row as task_rows
from mbf_mlx.data.encode import Encoded
from mbf_mlx.engine.engine import Engine
from mbf_mlx.learning.measure import Advance, seen, squared_gradients
from mbf_mlx.learning.tuning import Tuning
from mbf_mlx.methods import Method, Row, State

KEPT = Path("(a row that the stream keeps)")


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
    batch_size: int,
    advance: Advance = lambda done, total: None,
) -> State:
    """Return the state after a task.

    Args:
        method, state: As the task was started with.
        tuning: As training left it.
        engine: Of the model.
        rows: The task's own training rows.
        batch_size: How many of them trained together.
        advance: Told how far a method's measuring of the rows is, where it does any.
    """
    tuned, asks, needs = tuning.named(), getattr(method, "measure", None), getattr(method, "needs", None)
    tuning.model.eval()
    inputs = seen(tuning, engine, rows, asks(state, tuned), batch_size, advance) if asks else None
    what: Any = None
    if needs == "rows":
        what = [Row(row.tokens, row.supervised) for row in rows]
    elif needs == "gradients":
        what = squared_gradients(tuning, engine, rows, batch_size, advance)
    finish: Any = method.finish
    after = finish(state, tuned) if inputs is None else finish(state, tuned, inputs=inputs)
    show: Any = getattr(method, "after_task", None)
    return show(after, what) if show and needs else after
