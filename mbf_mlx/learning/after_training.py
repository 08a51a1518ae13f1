"""After training: measure inputs or gradients if the method asks, merge, call `after_task`.

Also what comes just before training: the rows that the method mixes in. Shapes: A (rank, in), B (out, rank). Nothing is
trained here and nothing is written.
"""

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from mbf_mlx.data import row as task_rows
from mbf_mlx.data.encode import Encoded
from mbf_mlx.engine.engine import Engine
from mbf_mlx.learning.measure import Advance, measured_inputs, squared_gradients
from mbf_mlx.learning.tuning import Tuning
from mbf_mlx.methods import Inputs, Method, State, TokenRow, Tuned

KEPT = Path("(a row that the stream keeps)")


def with_extra(method: Method, state: State, rows: Sequence[Encoded]) -> Sequence[Encoded]:
    """Return the rows that a task trains on: its own, and those that the method mixes in."""
    kept = [
        Encoded(
            tokens=np.asarray(row.tokens, np.int32),
            supervised=np.asarray(row.supervised, bool),
            prompt_length=int(np.argmax(row.supervised)),
            cut=0,
            row=task_rows.Row("text", KEPT, number),
        )
        for number, row in enumerate(method.extra_rows(state, len(rows)), start=1)
    ]
    return [*rows, *kept] if kept else rows


def after_training(
    method: Method,
    state: State,
    tuning: Tuning,
    engine: Engine,
    rows: Sequence[Encoded],
    batch_size: int,
    advance: Advance = lambda done, total: None,
    inputs: Inputs | None = None,
) -> State:
    """Return the state after a task.

    Args:
        method, state: The same that the task was started with.
        tuning: The result of training.
        engine: The engine of the model.
        rows: The task's own training rows, without those that the method mixed in.
        batch_size: How many rows there is memory for at the same time.
        advance: Called with the number of rows that are measured, and of all that will be, if the method measures any.
        inputs: The layers' inputs, if they were measured in training.
    """
    tuned = tuning.named()
    tuning.model.eval()
    shown = list[TokenRow]()
    gradients: Tuned = {}
    if "inputs" in method.needs and inputs is None:
        inputs = measured_inputs(method, state, tuning, engine, rows, batch_size, advance)
    if "rows" in method.needs:
        shown = [TokenRow(row.tokens, row.supervised) for row in rows]
    if "gradients" in method.needs:
        gradients = squared_gradients(tuning, engine, rows, batch_size, advance)
    after = method.finish(state, tuned, inputs)
    return method.after_task(after, shown, gradients) if method.needs - {"inputs"} else after
