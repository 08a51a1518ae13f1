"""Anchored, then merged: take back what training did to old inputs where the new task does not need it.

The penalty of `anchored` makes a change that old inputs notice expensive, not impossible: M becomes M + D while the
next task trains. After training, the new task's inputs are known, too. Deployed is the update W that minimizes

    (1 - w) E_old |(W - M) x|^2 + w E_new |(W - M - D) x|^2

where a token counts as much as its row's loss depends on it. In a direction that only one side's inputs have, that
side decides; where both have it, W is a compromise. The minimum has a closed form in the few directions that the two
A's span (`reference.merge_by_inputs`). It is cut to the stream's rank in the same metric, and costs no training. The
next task starts from it, with an orthonormal A and the same function.

Keeps: what `anchored` keeps: one pair and the sketch, together at most two pairs. Constant in the number of tasks.

Source: ours; for one layer with full Grams the closed form is RegMean, Jin et al. 2023, arXiv:2212.09849.
"""

from mbf_mlx.methods.anchored import Anchored
from mbf_mlx.methods.base import Inputs
from mbf_mlx.methods.checks import check_number, check_two_pairs
from mbf_mlx.methods.factors import Factors
from mbf_mlx.methods.state import State


class AnchoredMerge(Anchored):
    """Anchored, with every task merged by inputs.

    Args:
        strength: Weight of the penalty, in units of the loss (nats).
        weight: w, how much the newest task's inputs count, in [0, 1]; with 1 it is `anchored`, if nothing is cut.
        first_a: A of the first task: "orthonormal", or "uniform" as in LoRA.

    Raises:
        InputError: an argument outside its choices.
    """

    name = "anchored-merge"

    def __init__(self, strength: float = 10.0, weight: float = 0.5, first_a: str = "orthonormal") -> None:
        super().__init__(strength, first_a)
        self.options = {"strength": strength, "weight": weight, "first_a": first_a}
        check_number(self.name, "weight", weight, 0, 1)

    def start(self, state: State) -> Factors:
        """Return the factors that task state.t + 1 starts from.

        Raises:
            InputError: a layer with fewer inputs than two pairs have rows.
        """
        check_two_pairs(self.name, state.layers, state.rank)
        return super().start(state)

    def finish(self, state: State, tuned: Factors, inputs: Inputs | None = None) -> State:
        """Merge what was tuned with what was deployed, by the inputs of both.

        Raises:
            ValueError: no inputs.
        """
        return self.merge(state, tuned, inputs, self.options["weight"])
