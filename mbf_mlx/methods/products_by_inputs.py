"""The merge of products, judged by the layers' outputs on the tasks' own inputs instead of by weights.

It is `products` with `metric` "inputs". The cut to the stream's rank takes away what changes old and new outputs
least; a token counts as much as its row's loss depends on it (`reference.merge_by_inputs`).

Keeps: what `products` keeps, and for each layer a Gram matrix of the old tasks' inputs, rank x rank. Constant in the
number of tasks.

Source: ours.
"""

from dataclasses import replace

from mbf_mlx.methods.base import Inputs, Need
from mbf_mlx.methods.checks import check_number, check_two_pairs
from mbf_mlx.methods.factors import Factors, Pair, each_layer, in_double
from mbf_mlx.methods.products import Products
from mbf_mlx.methods.state import State
from mbf_mlx.reference import Array, input_basis, merge_by_inputs, orthogonal_init


class ProductsByInputs(Products):
    """The merge of products, judged by inputs.

    Args:
        exponent, start, basis, rate_a, first_a: As for `Products`; the rank is the stream's.
        ridge: How much of the judgement stays with the weights: `reference.merge_by_inputs`.

    Raises:
        InputError: an argument outside its choices, or a combination without meaning.
    """

    needs: frozenset[Need] = frozenset({"inputs"})

    def __init__(
        self,
        exponent: float = 0.5,
        start: str | float = "tuned",
        basis: str = "qr",
        ridge: float = 0.1,
        rate_a: float = 1.0,
        first_a: str = "orthonormal",
    ) -> None:
        super().__init__(exponent, None, start, basis, rate_a, first_a)
        self.options |= {"ridge": ridge}
        check_number(self.name, "ridge", ridge, 0)

    def start(self, state: State) -> Factors:
        """Return the factors that task state.t + 1 starts from."""
        if state.t == 0:
            check_two_pairs("products", state.layers, state.rank)
        return super().start(state)

    def measure(self, state: State, tuned: Factors) -> dict[str, Array]:
        """Return the directions in which each layer's Gram is needed: (rank, in), after the first task (2 rank, in)."""
        if state.t == 0:
            return {name: in_double(orthogonal_init, pair.a) for name, pair in tuned.items()}
        return {name: in_double(input_basis, state.deployed[name].a, pair.a) for name, pair in tuned.items()}

    def finish(self, state: State, tuned: Factors, inputs: Inputs | None = None) -> State:
        """Merge the tuned factors of task state.t + 1 into the deployed ones, judged by `inputs`.

        Raises:
            ValueError: no inputs.
        """
        if inputs is None:
            raise ValueError("products: metric 'inputs' needs the inputs that `measure` asks for")
        grams = {name: seen.moments @ seen.directions.T for name, seen in inputs.items()}
        kept = {**self._kept(tuned), "inputs_gram": grams}
        if state.t == 0:
            return replace(state, t=1, deployed=dict(tuned), kept=kept)

        def merge(old_a: Array, old_b: Array, a: Array, b: Array, old: Array, new: Array) -> tuple[Array, ...]:
            ridge = self.options["ridge"]
            return merge_by_inputs((old_a, old_b), (a, b), self._weight(state), state.rank, old, new, ridge)

        def merged(name: str) -> Pair:
            both = state.kept["inputs_gram"][name], grams[name]
            a, b, grams[name] = in_double(merge, *state.deployed[name], *tuned[name], *both)
            return Pair(a, b)

        return replace(state, t=state.t + 1, deployed=each_layer(merged, tuned), kept=kept)
