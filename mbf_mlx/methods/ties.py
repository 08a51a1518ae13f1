"""TIES: trim each task's change to its largest entries, elect a sign for every entry, average the values that agree.

In each task the share `density` of entries with the largest magnitude stays. For each entry, the sign with the larger
total over all tasks wins. Deployed is the mean over the tasks with that sign, times a coefficient.

For one entry this needs only the sum and number of its positive values, and the same of its negative ones. So it can be
computed exactly in constant memory. `memory` has two choices:
- "streamed": the entries are those of A - A0 and of B; four arrays for each factor.
- "exact": the entries are those of B @ A, as published. Every task's pair is kept, and the result, which can have any
  rank, is cut to the best approximation of the stream's rank.

Keeps: streamed: five pairs' worth, constant. Exact: the deployed pair and one pair a task; it grows.

Source: Yadav et al. 2023, arXiv:2306.01708 (density 0.2, coefficient about 1). There the entries of all layers are
ranked together; here each array by itself, so that one layer is in memory at a time.
"""

from dataclasses import replace
from typing import Any

import numpy as np

from mbf_mlx.methods.base import Inputs, Method
from mbf_mlx.methods.checks import check_choices, check_number
from mbf_mlx.methods.factors import FIRST_A, Factors, Pair, in_double
from mbf_mlx.methods.state import State, first_factors
from mbf_mlx.reference import Array, namespace, split_delta

SUMS = ("sum_up", "sum_down", "count_up", "count_down")


class Ties(Method):
    """Trim, elect, average.

    Args:
        density: Share of entries that stay, in (0, 1].
        coefficient: What the average is multiplied by when it is deployed.
        memory: "streamed" or "exact".
        first_a: "uniform" as in LoRA, or "orthonormal". Every task starts from this draw, as published.

    Raises:
        InputError: an argument outside its choices.
    """

    name = "ties"
    absorbs = True

    def __init__(
        self, density: float = 0.2, coefficient: float = 1.0, memory: str = "streamed", first_a: str = "uniform"
    ) -> None:
        self.options: dict[str, Any] = {
            "density": density,
            "coefficient": coefficient,
            "memory": memory,
            "first_a": first_a,
        }
        check_choices(self.name, self.options, {"memory": ("streamed", "exact"), "first_a": FIRST_A})
        check_number(self.name, "density", density, 1e-6, 1)
        check_number(self.name, "coefficient", coefficient, 0)
        self.grows = memory == "exact"

    def start(self, state: State) -> Factors:
        """Return the first draw, for every task."""
        return first_factors(replace(state, t=0), self.options["first_a"])

    def finish(self, state: State, tuned: Factors, inputs: Inputs | None = None) -> State:
        """Add the vector of task state.t + 1 and merge again."""
        kept = {key: dict(tensors) for key, tensors in state.kept.items()}
        first, deployed = self.start(state), {}
        for name, pair in tuned.items():
            if self.options["memory"] == "exact":
                kept.setdefault(f"a_{state.t + 1}", {})[name] = pair.a
                kept.setdefault(f"b_{state.t + 1}", {})[name] = pair.b
                pairs = [(kept[f"a_{t}"][name], kept[f"b_{t}"][name]) for t in range(1, state.t + 2)]
                deployed[name] = Pair(*in_double(self._merge_deltas(state.rank), *(x for p in pairs for x in p)))
                continue
            start_a = namespace(pair.a).asarray(first[name].a)
            a = self._add(kept, name, "a", pair.a - start_a)
            deployed[name] = Pair(start_a + a, self._add(kept, name, "b", pair.b))
        return replace(state, t=state.t + 1, deployed=deployed, kept=kept)

    def _add(self, kept: dict[str, dict[str, Array]], name: str, factor: str, vector: Array) -> Array:
        """Add a vector to the four sums of one factor, and return the merged vector."""
        sums = self._parts(vector)
        for i, key in enumerate(SUMS):
            sums[i] = sums[i] + kept.setdefault(f"{key}_{factor}", {}).get(name, 0 * vector)
            kept[f"{key}_{factor}"][name] = sums[i]
        return self._elect(*sums)

    def _merge_deltas(self, rank: int) -> Any:
        def merge(*factors: Array) -> tuple[Array, Array]:
            sums: list[Any] = [0.0] * 4
            for a, b in zip(factors[::2], factors[1::2], strict=True):
                sums = [total + part for total, part in zip(sums, self._parts(b @ a), strict=True)]
            return split_delta(self._elect(*sums), rank)

        return merge

    def _parts(self, vector: Array) -> list[Array]:
        """Return what the trimmed vector adds to the four sums: positive, negative, and the counts of both."""
        xp, size = namespace(vector), abs(vector)
        count = max(1, round(self.options["density"] * int(np.prod(vector.shape))))
        trimmed = xp.where(size >= xp.sort(size.reshape(-1))[-count], vector, 0 * vector)
        up, down = (trimmed > 0).astype(vector.dtype), (trimmed < 0).astype(vector.dtype)
        return [trimmed * up, -trimmed * down, up, down]

    def _elect(self, sum_up: Array, sum_down: Array, count_up: Array, count_down: Array) -> Array:
        """Return the mean over the winning sign, times the coefficient; 0 where the two signs tie."""
        xp, c = namespace(sum_up), self.options["coefficient"]
        up, down = sum_up / xp.maximum(count_up, 1), sum_down / xp.maximum(count_down, 1)
        return c * xp.where(sum_up > sum_down, up, xp.where(sum_down > sum_up, -down, 0 * up))
