"""One export as the targets see it: what is exported, where to, how, and which rows it may be measured on."""

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from mbf_mlx.export.card import About
from mbf_mlx.methods import Factors

Show = Callable[[str, int | None, str], AbstractContextManager[Callable[..., None]]]  # title, total, unit -> update


def show_nothing(title: str, total: int | None = None, unit: str = "") -> AbstractContextManager[Callable[..., None]]:
    """Show no progress."""
    return nullcontext(lambda done, **values: None)


@dataclass(frozen=True)
class ExportRows:
    """Encoded rows to look at, and where they are from."""

    fit: Sequence[Any] = ()  # to choose a rounding on
    compare: Sequence[Any] = ()  # to compare with the live model on; none of them is in `fit`
    source: str = "no rows"
    notes: tuple[str, ...] = ()


@dataclass(frozen=True, kw_only=True)
class Job:
    """One export."""

    base: Path  # folder of the base model
    factors: Factors  # the deployed pair of every layer
    scale: float
    num_layers: int  # blocks counted from the last that have factors
    num_blocks: int  # of the model
    about: About
    out: Path
    template: str = "chat"  # "chat", or "none" where it was trained on raw prompts
    bits: int | None = None
    kind: str | None = None  # a GGUF type, or "mlx"
    force: bool = False
    allow_loss: bool = False
    forbidden: tuple[Path, ...] = ()
    read_rows: Callable[[], ExportRows] = ExportRows  # reads files and tokenizes, so only when asked
    show: Show = field(default=show_nothing)

    @cached_property
    def rows(self) -> ExportRows:
        """The rows, read once."""
        return self.read_rows()
