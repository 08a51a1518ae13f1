"""One export as the targets see it: what is exported, where it goes, in which form, and which rows measure it."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from mbf_mlx.errors import InputError
from mbf_mlx.export.card import About
from mbf_mlx.export.weights.checkpoint import Checkpoint
from mbf_mlx.export.weights.half_type import HalfType, choose_half_type
from mbf_mlx.methods import Factors

Show = Callable[[str, int | None, str], AbstractContextManager[Callable[..., None]]]  # title, total, unit -> update
Count = Callable[[int], None]  # takes the bytes of a finished step


def show_nothing(title: str, total: int | None = None, unit: str = "") -> AbstractContextManager[Callable[..., None]]:
    """Show no progress."""
    return nullcontext(lambda done, **values: None)


class LostTooMuchError(InputError):
    """A written export that its check refuses; it is taken away again.

    Args:
        message: What the user is told.
        lost: What was lost, as a part of a sentence.
        allowed: Whether `--allow-loss` would write it all the same.
    """

    def __init__(self, message: str, lost: str, *, allowed: bool = True) -> None:
        super().__init__(message)
        self.lost, self.allowed = lost, allowed


@dataclass(frozen=True)
class ExportRows:
    """Encoded rows to run the models on, and where they come from."""

    fit: Sequence[Any] = ()  # the rounding is fitted to these
    compare: Sequence[Any] = ()  # the export and the live model are compared on these; none of them is in `fit`
    source: str = "no rows"
    notes: tuple[str, ...] = ()


@dataclass(frozen=True, kw_only=True)
class Job:
    """One export: every target takes it whole."""

    base: Path  # folder of the base model: MLX's layout, or Hugging Face's with tensors named as MLX names them
    base_name: str  # as the user called the base; adapter folders name it in their config
    factors: Factors  # the deployed A (rank, in) and B (out, rank) of every layer
    scale: float  # delta = scale * B @ A
    num_layers: int  # blocks that have factors, counted from the last
    num_blocks: int  # all blocks of the model
    about: About
    out: Path  # the folder or file to make; `place` says what is refused
    template: str = "chat"  # "chat", or "none" where the stream was taught on raw prompts
    chat_template: str | None = None  # the one that the export carries; None is the base's own
    bits: int | None = None  # of the layers with factors; None lets the target choose
    half: HalfType | None = None  # what 16 bits are stored in; None lets the writer measure it
    kind: str | None = None  # a GGUF type, or "mlx" for LM Studio's MLX engine
    force: bool = False  # replace an earlier export
    allow_loss: bool = False  # write an export even where it lost too much
    notes: tuple[str, ...] = ()  # what its user should know, whatever the target
    forbidden: tuple[Path, ...] = ()  # folders that the export must stay out of, besides the base: the stream
    read_rows: Callable[[], ExportRows] = ExportRows  # reads files and tokenizes, so it is called only when needed
    show: Show = field(default=show_nothing)

    @cached_property
    def rows(self) -> ExportRows:
        """The rows, read once."""
        return self.read_rows()

    @property
    def off_limits(self) -> tuple[Path, ...]:
        """Folders that the export must lie neither in nor around."""
        return (self.base, *self.forbidden)

    def changed(self, **fields: Any) -> "Job":
        """Return this job with other fields; the rows are still read once."""
        return replace(self, read_rows=lambda: self.rows, **fields)

    def with_half_type(self) -> "Job":
        """Return the job with the type that 16 bits are stored in, measured; with other bits, the job as it is.

        Raises:
            InputError: the adapter does not fit the base.
        """
        if self.bits != 16 or self.half:
            return self
        base = Checkpoint(self.base)
        with self.counting(base.nbytes, "comparing float16 and bfloat16") as count:
            return self.changed(half=choose_half_type(base, self.factors, self.scale, count))

    def float_type(self) -> str:
        """Return the type of an export of 16 or 32 bits; the one of 16 is measured if the job does not name it."""
        if self.bits == 32:
            return "F32"
        half = self.with_half_type().half
        assert half, f"an export of {self.bits} bits has no float type"
        return half.dtype

    @contextmanager
    def counting(self, total: int, title: str = "fusing, writing, reading back") -> Iterator[Count]:
        """Give a function that counts bytes up to `total` and shows the percentage."""
        done = 0
        with self.show(title, 100, "percent") as update:

            def count(nbytes: int) -> None:
                nonlocal done
                done += nbytes
                update(100 * done // max(total, 1))

            yield count
