"""The continual methods by name: ours, and those that installed packages add (installed.py)."""

import inspect
from collections.abc import Callable
from typing import Any

from mbf_mlx.errors import InputError
from mbf_mlx.methods import installed
from mbf_mlx.methods.anchored import Anchored
from mbf_mlx.methods.anchored_merge import AnchoredMerge
from mbf_mlx.methods.base import Method
from mbf_mlx.methods.c_lora import CLora
from mbf_mlx.methods.checks import check_choices, check_number
from mbf_mlx.methods.dare import Dare
from mbf_mlx.methods.ewc import Ewc
from mbf_mlx.methods.frozen_a import FrozenA
from mbf_mlx.methods.inclora import IncLora
from mbf_mlx.methods.joint import Joint
from mbf_mlx.methods.l2 import L2
from mbf_mlx.methods.lorac import Lorac
from mbf_mlx.methods.magmax import MagMax
from mbf_mlx.methods.nmt_lora import NmtLora
from mbf_mlx.methods.o_lora import OLora
from mbf_mlx.methods.opcm import Opcm
from mbf_mlx.methods.products import Products
from mbf_mlx.methods.products_by_inputs import ProductsByInputs
from mbf_mlx.methods.replay import Replay
from mbf_mlx.methods.running_mean import RunningMean
from mbf_mlx.methods.sequential import Sequential
from mbf_mlx.methods.slao import Slao
from mbf_mlx.methods.task_arithmetic import TaskArithmetic
from mbf_mlx.methods.ties import Ties

# Keeps no rows, and did better than the paper's method on the five tasks that we measured: docs/experiments.md.
DEFAULT_METHOD = "anchored"
UNLOADED_METHOD = "slao"  # for a stream whose first task is trained elsewhere: it needs neither model nor rows


def _replay(
    method: str = "sequential",
    method_options: dict[str, Any] | None = None,
    bytes: int = 1_000_000,
    share: float = 1.0,
) -> Method:
    if not isinstance(method, str) or not isinstance(method_options or {}, dict):
        raise InputError(
            f"replay: expected a method's name and its options by name, got {method!r}, {method_options!r}"
        )
    return Replay(make(method, method_options), bytes, share)


def _products(
    exponent: float = 0.5,
    rank: int | None = None,
    start: str | float = "tuned",
    basis: str = "qr",
    metric: str = "weights",
    ridge: float = 0.1,
    rate_a: float = 1.0,
    first_a: str = "orthonormal",
) -> Method:
    check_choices("products", {"metric": metric}, {"metric": ("weights", "inputs")})
    check_number("products", "ridge", ridge, 0)
    if metric == "inputs" and rank is not None:
        raise InputError("products: metric 'inputs' knows the inputs in the stream's rank alone; leave out rank")
    made = (
        Products(exponent, rank, start, basis, rate_a, first_a)
        if metric == "weights"
        else ProductsByInputs(exponent, start, basis, ridge, rate_a, first_a)
    )
    made.options |= {"metric": metric, "ridge": ridge}  # a stream remembers all of them
    return made


# The paper's method and what it is compared with, then those that merge, hold parameters back, see rows again, grow.
_METHODS: dict[str, Callable[..., Method]] = {
    "slao": Slao,
    "sequential": Sequential,
    "products": _products,
    "frozen-a": FrozenA,
    "running-mean": RunningMean,
    "task-arithmetic": TaskArithmetic,
    "magmax": MagMax,
    "ties": Ties,
    "dare": Dare,
    "opcm": Opcm,
    "anchored": Anchored,
    "anchored-merge": AnchoredMerge,
    "ewc": Ewc,
    "l2": L2,
    "nmt-lora": NmtLora,
    "c-lora": CLora,
    "replay": _replay,
    "joint": Joint,
    "inclora": IncLora,
    "o-lora": OLora,
    "lorac": Lorac,
}


def names() -> list[str]:
    """Return the names that `make` knows: ours, the paper's method first, then those of installed packages."""
    return [*_METHODS, *(name for name in installed.names() if name not in _METHODS)]


def make(name: str, options: dict[str, Any] | None = None) -> Method:
    """Return the method called `name`.

    One of our own names always means our method. Installed packages are looked at only for other names.

    Raises:
        InputError: no such method, options that it does not take, or an installed method that cannot be loaded.
    """
    options = options or {}
    factory = _METHODS.get(name) or installed.load(name)
    if factory is None:
        raise InputError(f"method: expected one of {', '.join(names())}, got {name!r}")
    known = list(inspect.signature(factory).parameters)
    if unknown := [key for key in options if key not in known]:
        raise InputError(f"method {name}: expected options of {', '.join(known)}, got {unknown[0]!r}")
    return factory(**options)
