"""Continual fine-tuning of one quantized Llama on one's own machine: learn task after task, merge before forget."""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from mbf_mlx.api import Stream as Stream
    from mbf_mlx.errors import InputError as InputError
    from mbf_mlx.experiment.results import CellRow as CellRow
    from mbf_mlx.experiment.results import read_results as read_results
    from mbf_mlx.experiment.run import Experiment as Experiment

__version__ = "0.1.0"
__all__ = ["CellRow", "Experiment", "InputError", "Stream", "__version__", "read_results"]

# `mbf --help` imports this package, too, and must not wait for what these need.
_HOMES = {
    "CellRow": "mbf_mlx.experiment.results",
    "Experiment": "mbf_mlx.experiment.run",
    "InputError": "mbf_mlx.errors",
    "Stream": "mbf_mlx.api",
    "read_results": "mbf_mlx.experiment.results",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    if name == "Experiment":
        from mbf_mlx.device import backend

        backend.setup()  # loads the fast BLAS; mlx takes it only if it is there first
    return getattr(importlib.import_module(_HOMES[name]), name)
