"""The continual methods by name."""

from collections.abc import Callable
from typing import Any

from mbf_mlx.errors import InputError
from mbf_mlx.methods.base import Method
from mbf_mlx.methods.sequential import Sequential
from mbf_mlx.methods.slao import Slao

_METHODS: dict[str, Callable[..., Method]] = {method.name: method for method in (Slao, Sequential)}


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
