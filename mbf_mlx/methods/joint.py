"""Joint training: train from the first draw on all rows of all tasks so far. It is the ceiling, not a rival.

Keeps: the deployed pair and every row that was ever trained on. It grows with the number of tasks, and so does the time
that a task takes.

Source: multi-task training, as every paper of the field reports it.
"""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from mbf_mlx.methods import kept_rows as packed
from mbf_mlx.methods.base import Inputs, Method, Need, TokenRow, Tuned
from mbf_mlx.methods.checks import check_choices
from mbf_mlx.methods.factors import FIRST_A, Factors
from mbf_mlx.methods.state import State, first_factors


class Joint(Method):
    """All tasks at once.

    Args:
        start: "first", the same draw every time; "tuned", the last tuned pair.
        first_a: "uniform" as in LoRA, or "orthonormal".

    Raises:
        InputError: an argument outside its choices.
    """

    name = "joint"
    grows = True
    needs: frozenset[Need] = frozenset({"rows"})

    def __init__(self, start: str = "first", first_a: str = "uniform") -> None:
        self.options: dict[str, Any] = {"start": start, "first_a": first_a}
        check_choices(self.name, self.options, {"start": ("first", "tuned"), "first_a": FIRST_A})
        self.from_scratch = start == "first"

    def start(self, state: State) -> Factors:
        """Return the first draw, or the last tuned pair."""
        if state.t == 0 or self.options["start"] == "first":
            return first_factors(replace(state, t=0), self.options["first_a"])
        return dict(state.deployed)

    def extra_rows(self, state: State, count: int) -> list[TokenRow]:
        """Return every row of every task so far."""
        return packed.unpack(state)[0]

    def finish(self, state: State, tuned: Factors, inputs: Inputs | None = None) -> State:
        """Deploy the tuned pair as it is."""
        return replace(state, t=state.t + 1, deployed=dict(tuned))

    def after_task(self, state: State, rows: Sequence[TokenRow], gradients: Tuned) -> State:
        """Keep the rows of task state.t, too."""
        old, tasks = packed.unpack(state)
        return replace(state, kept=packed.pack([*old, *rows], [*tasks, *[state.t] * len(rows)]))
