"""Anchored, then merged: what training still did to old inputs is taken back where the new task has no use for it.

The penalty of `anchored` makes a change that old inputs see dear, not impossible: M becomes M + D while the next task
trains. Once it has trained, its own inputs are known, too, and the update that is deployed is the W that minimizes

    (1 - w) E_old |(W - M) x|^2 + w E_new |(W - M - D) x|^2

each token counting as its row's loss depends on it. In a direction that only one side's inputs have, that side decides;
where both have it, it is a compromise. The minimum has a closed form in the few directions that the two A's span
(`reference.merge_by_inputs`), is cut to the stream's rank in the same metric, and costs no training. The next task
starts from it, with A orthonormal and the function kept.

Keeps: what `anchored` keeps, one pair and the sketch, together no more than two pairs. Constant in the number of tasks.

Source: ours; for one layer with full Grams the closed form is RegMean, Jin et al. 2023, arXiv:2212.09849.
"""

from mbf_mlx.methods.anchored import Anchored
from mbf_mlx.methods.base import Factors, Seen, State, check_number, check_two_pairs


class AnchoredMerge(Anchored):
    """Anchored, and every task merged by inputs.

    Args:
        strength: Of the penalty, in units of the loss (nats).
        weight: w, how much the newest task's inputs count, in [0, 1]; 1 is `anchored` where nothing is cut.
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
        check_two_pairs(self.name, state)
        return super().start(state)

    def finish(self, state: State, tuned: Factors, inputs: dict[str, Seen] | None = None) -> State:
        """Merge what was tuned with what was deployed; `inputs` are the task's, as `measure` asks for them."""
        return self.merge(state, tuned, inputs, self.options["weight"])
