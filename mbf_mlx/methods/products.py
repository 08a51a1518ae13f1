"""Merging products: deploy a mean of the tasks' updates B @ A, not a mean of their B under the newest A.

After task t the update is exactly (1 - w) merged_B merged_A + w tuned_B tuned_A, cut back to a pair of the stream's
rank; w = t ** -exponent. So an old B is never used with an A that it was not tuned with.

The options cost no more memory:
- where the next task starts: at the tuned pair, at the merged one (then nothing else is kept), or between them;
- in which basis it starts: see `basis`;
- `metric`: whether the cut is judged by weights, as here, or by the tasks' own inputs, as in `products_by_inputs`;
- `rate_a`: how fast A learns after the first task, compared with B. The less A moves, the less the cut takes away.

Keeps: two pairs (merged and tuned), or one where tasks start from the merged one. Constant in the number of tasks.

Source: ours. Algorithm 1 of arXiv:2512.23017, which merges only B, is `slao`.
"""

from dataclasses import replace
from typing import Any

from mbf_mlx.errors import InputError
from mbf_mlx.methods.base import Inputs, Method
from mbf_mlx.methods.checks import check_choices, check_number, check_sizes
from mbf_mlx.methods.factors import FIRST_A, Factors, Pair, each_layer, in_double, pad_rank
from mbf_mlx.methods.state import State, first_factors, keep_factors
from mbf_mlx.reference import Array, cut_rank, in_basis, merge_products, stack_pairs

CHOICES = {"basis": ("qr", "qr-preserving", "balanced", "keep"), "first_a": FIRST_A}


class Products(Method):
    """The merge of products.

    Args:
        exponent: w = t ** -exponent is the weight of task t, in [0, 2]; 0.5 as in the paper, 1 is the plain mean.
        rank: Rank of what is merged and deployed; None takes the stream's.
        start: The pair that the next task starts from: "tuned", "merged", or the tuned one's share in between.
        basis: Basis of the start, as in `reference.in_basis`: "qr" as in Algorithm 1, "qr-preserving", "balanced" or
            "keep". A merged pair has no basis of its own, so it cannot start with "qr".
        rate_a: A's learning rate as a share of B's, after the first task, in [0, 1].
        first_a: A of the first task: "orthonormal", or "uniform" as in LoRA.

    Raises:
        InputError: an argument outside its choices, or a combination without meaning.
    """

    name = "products"

    def __init__(
        self,
        exponent: float = 0.5,
        rank: int | None = None,
        start: str | float = "tuned",
        basis: str = "qr",
        rate_a: float = 1.0,
        first_a: str = "orthonormal",
    ) -> None:
        chosen = {"exponent": exponent, "rank": rank, "start": start, "basis": basis}
        self.options: dict[str, Any] = chosen | {"rate_a": rate_a, "first_a": first_a}
        check_choices(self.name, self.options, CHOICES)
        check_number(self.name, "exponent", exponent, 0, 2)
        if rank is not None and (not isinstance(rank, int) or isinstance(rank, bool) or rank < 1):
            raise InputError(f"products: rank: expected a whole number of at least 1, got {rank!r}")
        check_number(self.name, "rate_a", rate_a, 0, 1)
        if start not in ("tuned", "merged"):
            check_number(self.name, "start ('tuned', 'merged' or the tuned pair's share)", start, 0, 1)
        self._share = float({"tuned": 1, "merged": 0}.get(str(start), start))
        if self._share < 1 and basis == "qr":
            raise InputError(
                "products: a merged pair's A is one of many that give its product, so an orthonormal basis with B as it"
                " is would be another function; use basis 'qr-preserving' or 'balanced'"
            )
        self.absorbs = rate_a == 1

    def start(self, state: State) -> Factors:
        """Return the factors that task state.t + 1 starts from."""
        if state.t == 0:
            rank = self._rank(state)
            check_sizes("products", state.layers, rank, rank, "the rank of what is merged")
            return first_factors(state, self.options["first_a"])
        start = self._start(state.rank)
        return each_layer(lambda name: Pair(*in_double(start, *self._pairs(state, name))), state.deployed)

    def rates(self, state: State) -> dict[str, float]:
        """Return the learning rates of A and B as shares of the task's own."""
        return {"a": self.options["rate_a"] if state.t else 1.0, "b": 1.0}

    def _rank(self, state: State) -> int:
        return self.options["rank"] or state.rank

    def _pairs(self, state: State, name: str) -> list[Array]:
        """Return merged A and B, and tuned A and B where they are kept."""
        tuned = [state.kept[key][name] for key in ("tuned_a", "tuned_b") if key in state.kept]
        return [*state.deployed[name], *tuned]

    def _start(self, rank: int) -> Any:
        def start(a: Array, b: Array, *tuned: Array) -> tuple[Array, Array]:
            if self._share == 1:
                a, b = tuned
            elif self._share > 0:
                a, b = stack_pairs([(a, b), (tuned[0], tuned[1])], [1 - self._share, self._share])
            if a.shape[0] > rank:
                a, b = cut_rank(a, b, rank)
            return in_basis(a, b, self.options["basis"])

        return start

    def finish(self, state: State, tuned: Factors, inputs: Inputs | None = None) -> State:
        """Merge the tuned factors of task state.t + 1 into the deployed ones."""
        rank = self._rank(state)

        def merge(old_a: Array, old_b: Array, a: Array, b: Array) -> tuple[Array, Array]:
            return merge_products(old_a, old_b, a, b, self._weight(state), rank)

        def merged(name: str) -> Pair:
            return Pair(*in_double(merge, *state.deployed[name], *tuned[name]))

        deployed = each_layer(merged, tuned) if state.t else {n: pad_rank(p, rank) for n, p in tuned.items()}
        return replace(state, t=state.t + 1, deployed=deployed, kept=self._kept(tuned))

    def _weight(self, state: State) -> float:
        return float((state.t + 1) ** -float(self.options["exponent"]))

    def _kept(self, tuned: Factors) -> dict[str, dict[str, Array]]:
        """Return the tuned pairs if the next task needs them for its start."""
        return keep_factors("tuned", tuned) if self._share else {}
