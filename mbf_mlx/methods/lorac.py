"""LoRAC-IPC: orthogonal LoRA composition, and no more changes where earlier tasks depend on it most.

In every layer that is still free, task t trains a new pair, and one weight for each old pair: delta = sum over i < t
of omega_i B_i A_i + B_t A_t. Omega starts at 1; the old pairs are frozen. The loss also has `orthogonal` * |Q Q^T -
I|, where Q is all A's of a layer stacked. After the task a layer's importance is the mean of |x| * (root of the mean
squared gradient of x) over its new A, plus the same over its new B. The `freeze` share of layers with the highest
importance is closed: later tasks neither add a pair there nor change its weights.

Keeps: one pair a task (zeros where a layer is closed), omega inside its B, and which layers are closed. It grows.

Source: Ling et al. 2025, arXiv:2504.13407, and its public code (orthogonal 1, omega's rate 0.1 of the others' or
less). What agrees: the composition; the norm that is penalized (not squared, the first task included); whole matrices
are closed by rank of importance, more after every task. What differs: there importance is followed step by step, as a
smoothed |x * gradient| times its smoothed deviation; here it is measured once, after the task. There omega goes on
from its last value; here that value is multiplied into B and omega starts at 1 again, which gives the same sum. One
layer always stays free. There the model is a vision transformer with a classifier trained on class statistics; here
there is neither.
"""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import numpy as np

from mbf_mlx.methods.base import Inputs, Method, Need, TokenRow, Tuned
from mbf_mlx.methods.checks import check_choices, check_number
from mbf_mlx.methods.factors import FIRST_A, Factors, Pair, pad_rank
from mbf_mlx.methods.o_lora import safe_norm
from mbf_mlx.methods.state import State, first_factors
from mbf_mlx.reference import Array, namespace, stack_pairs


class Composed(NamedTuple):
    """What trains in a layer from the second task on."""

    a: Array  # (rank, in)
    b: Array  # (out, rank)
    omega: Array  # (t - 1,), the weight of each old pair


class Lorac(Method):
    """LoRA composition with important-parameter constraints.

    Args:
        orthogonal: Weight of the orthogonality term.
        freeze: Share of all layers that is closed after each task, in [0, 1]; a share below one layer closes none.
        rate_omega: Omega's learning rate as a share of the others'.
        first_a: A of every new pair: "uniform" as in LoRA, or "orthonormal".

    Raises:
        InputError: an argument outside its choices.
    """

    name = "lorac"
    grows = True
    needs: frozenset[Need] = frozenset({"gradients"})

    def __init__(
        self, orthogonal: float = 1.0, freeze: float = 0.1, rate_omega: float = 0.1, first_a: str = "uniform"
    ) -> None:
        self.options: dict[str, Any] = {
            "orthogonal": orthogonal,
            "freeze": freeze,
            "rate_omega": rate_omega,
            "first_a": first_a,
        }
        check_choices(self.name, self.options, {"first_a": FIRST_A})
        check_number(self.name, "orthogonal", orthogonal, 0)
        check_number(self.name, "freeze", freeze, 0, 1)
        check_number(self.name, "rate_omega", rate_omega, 0)

    def start(self, state: State) -> Tuned:
        """Return a new pair, and from the second task on the old pairs' weights, for every layer that is free."""
        pairs = first_factors(state, self.options["first_a"])
        if state.t == 0:
            return dict(pairs)
        closed, ones = state.kept.get("closed", {}), np.ones(state.t, dtype=np.float32)
        return {name: Composed(*pair, ones.copy()) for name, pair in pairs.items() if name not in closed}

    def rates(self, state: State) -> dict[str, float]:
        """Return omega's learning rate as a share of the task's own."""
        return {"omega": self.options["rate_omega"]}

    def effective(self, tuned: Tuned, state: State) -> Factors:
        """Return the weighted sum of all pairs as one; for a closed layer, the old pair padded with zeros."""
        if state.t == 0:
            return tuned
        rank = state.rank * (state.t + 1)
        pairs = {}
        for name, (old_a, old_b) in state.deployed.items():
            if name in tuned:
                a, b, omega = tuned[name]
                weights = namespace(omega).repeat(omega, state.rank)
                pairs[name] = Pair(*stack_pairs([(old_a, old_b * weights), (a, b)]))
            else:
                pairs[name] = pad_rank(Pair(old_a, old_b), rank)
        return pairs

    def penalty(self, tuned: Tuned, state: State) -> Array:
        """Return how far every layer's stacked A is from orthonormal rows."""
        total: Any = 0.0
        for name, fields in tuned.items():
            xp = namespace(fields.a)
            q = xp.concatenate([state.deployed[name].a, fields.a], axis=0) if state.t else fields.a
            total = total + safe_norm(q @ q.T - xp.eye(q.shape[0], dtype=q.dtype))
        return self.options["orthogonal"] * total

    def finish(self, state: State, tuned: Tuned, inputs: Inputs | None = None) -> State:
        """Freeze what the model applies at the end of the task."""
        return replace(state, t=state.t + 1, deployed=self.effective(tuned, state))

    def after_task(self, state: State, rows: Sequence[TokenRow], gradients: Tuned) -> State:
        """Close the layers that the task depends on most."""
        importance = {}
        for name, squares in gradients.items():
            a, b = state.deployed[name]
            parts = (a[-state.rank :], squares.a), (b[:, -state.rank :], squares.b)
            importance[name] = sum(float((abs(x) * namespace(x).sqrt(g)).mean()) for x, g in parts)
        count = min(int(self.options["freeze"] * len(state.layers)), len(importance) - 1)
        closed = dict(state.kept.get("closed", {}))
        for name in sorted(importance, key=lambda name: -importance[name])[:count]:
            closed[name] = np.ones(1, dtype=np.int8)
        return replace(state, kept={"closed": closed} if closed else {})
