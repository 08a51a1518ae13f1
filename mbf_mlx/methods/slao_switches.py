"""The switches of `slao`: their choices, and which combinations have no meaning."""

from collections.abc import Mapping
from typing import Any

from mbf_mlx.errors import InputError
from mbf_mlx.methods.checks import check_choices
from mbf_mlx.methods.factors import FIRST_A

CHOICES = {
    "start_a": ("qr", "qr-preserving", "keep", "random"),
    "first_a": FIRST_A,
    "start_b": ("tuned", "merged", "zero"),
    "merged": ("b", "b moved", "a", "a and b", "none"),
    "train": ("a and b", "a", "b"),
}
WEIGHTS = ("1/sqrt(t)", "1/t")


def check_switches(name: str, settings: Mapping[str, Any]) -> None:
    """Refuse switches of the method `name` that are outside their choices, or that have no meaning together.

    Raises:
        InputError: it names the method, the switches and what to use instead.
    """
    check_choices(name, settings, CHOICES)
    weight, merged, train = settings["weight"], settings["merged"], settings["train"]
    constant = isinstance(weight, (int, float)) and not isinstance(weight, bool) and 0 < weight <= 1
    if weight not in WEIGHTS and not constant:
        raise InputError(f"{name}: weight: expected {', '.join(WEIGHTS)} or a constant in (0, 1], got {weight!r}")
    start_a, start_b = settings["start_a"], settings["start_b"]
    preserving, plain_weight = start_a == "qr-preserving", weight == WEIGHTS[0]
    kept_start = start_a == "keep" and start_b == "tuned"
    without_meaning = [
        (
            start_a == "random" and start_b != "zero",
            "a random start of A has no meaning for a B tuned with another A; use start_b 'zero'",
        ),
        (
            preserving and start_b == "zero",
            "a start that keeps the function needs B; use start_b 'tuned' or start_a 'qr'",
        ),
        (
            preserving and merged in ("a", "a and b"),
            "with A merged, too, merged B has no basis to be moved to; use merged 'b' or 'none'",
        ),
        (
            preserving and merged == "b moved",
            "a start that keeps the function moves merged B itself; use merged 'b'",
        ),
        (
            merged == "none" and (start_b == "merged" or not plain_weight),
            "with nothing merged there is neither a merged B to start from nor a weight",
        ),
        (
            merged == "a" and start_b == "merged",
            "with A alone merged there is no merged B to start from; use start_b 'tuned'",
        ),
        (
            train != "a and b" and not kept_start,
            "a factor that does not train stays as it is; use start_a 'keep' and start_b 'tuned'",
        ),
        (
            train != "a and b" and merged not in (train, "none"),
            f"only {train!r} trains, so nothing else can be merged; use merged {train!r} or 'none'",
        ),
    ]
    for holds, why in without_meaning:
        if holds:
            raise InputError(f"{name}: {why}")
