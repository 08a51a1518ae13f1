"""Running mean: both factors are averaged over all tasks, and every task counts the same.

After task t the deployed factors are those of task t - 1, moved by 1/t towards the tuned ones. A mean of factors is
not a mean of products; for that, use `products` with exponent 1.

Keeps: two pairs (merged and tuned). Constant in the number of tasks.

Source: model soups over time, as in Wortsman et al. 2022, arXiv:2203.05482; here the tasks train one after the other.
"""

from mbf_mlx.methods.slao import Slao


class RunningMean(Slao):
    """`slao` that merges both factors by 1/t and starts the next task from the tuned pair as it is.

    Args:
        first_a: "uniform" as in LoRA, or "orthonormal".

    Raises:
        InputError: another `first_a`.
    """

    name = "running-mean"

    def __init__(self, first_a: str = "uniform") -> None:
        super().__init__(start_a="keep", first_a=first_a, merged="a and b", weight="1/t")
        self.options = {"first_a": first_a}
