"""Continual fine-tuning of one quantized Llama on one's own machine: learn task after task, merge before forget."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from mbf_mlx.api import Stream as Stream

__version__ = "0.1.0"
__all__ = ["Stream", "__version__"]


def __getattr__(name: str) -> Any:
    # `mbf --help` imports this package, too, and must not wait for what a stream needs.
    if name == "Stream":
        from mbf_mlx.api import Stream

        return Stream
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
