"""The continual methods by name."""

from collections.abc import Callable
from typing import Any

from mbf_mlx.errors import InputError
from mbf_mlx.methods.base import Method
from mbf_mlx.methods.dare import Dare
from mbf_mlx.methods.frozen_a import FrozenA
from mbf_mlx.methods.magmax import MagMax
from mbf_mlx.methods.opcm import Opcm
from mbf_mlx.methods.products import Products
from mbf_mlx.methods.running_mean import RunningMean
from mbf_mlx.methods.sequential import Sequential
from mbf_mlx.methods.slao import Slao
from mbf_mlx.methods.task_arithmetic import TaskArithmetic
from mbf_mlx.methods.ties import Ties

_ALL: tuple[type[Method], ...] = (
    Slao,
    Sequential,
    Products,
    FrozenA,
    RunningMean,
    TaskArithmetic,
    MagMax,
    Ties,
    Dare,
    Opcm,
)
_METHODS: dict[str, Callable[..., Method]] = {method.name: method for method in _ALL}


def names() -> list[str]:
    """Return the names that `make` knows, the product's own method first."""
    return list(_METHODS)


def make(name: str, options: dict[str, Any] | None = None) -> Method:
    """Return the method called `name`.

    Raises:
        InputError: no such method, or options that it does not take.
    """
    if name not in _METHODS:
        raise InputError(f"method: expected one of {', '.join(names())}, got {name!r}")
    try:
        return _METHODS[name](**(options or {}))
    except TypeError as error:
        raise InputError(f"method {name}: {error}") from error
