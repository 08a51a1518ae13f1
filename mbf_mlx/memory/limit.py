"""Stops a run before a batch that would take too much memory, instead of letting the system end it."""

from pathlib import Path

from mbf_mlx import units
from mbf_mlx.config import LoRAConfig
from mbf_mlx.data.batches import Batch
from mbf_mlx.device import backend, machine
from mbf_mlx.errors import InputError, MemoryLimitError
from mbf_mlx.memory.formula import Load, Memory, Run, Shape, predict, ways_to_fit
from mbf_mlx.memory.shapes import SHARE, run_of, shape_of_folder


def memory_limit(given: int) -> int:
    """Return how many bytes this process may hold on its device.

    Args:
        given: The user's limit in bytes. 0 means four fifths of what the device reports on a GPU. On a CPU it means
            four fifths of what is available now, together with what the process already holds.
    """
    device = backend.setup()
    if given:
        return given
    if device.kind == "cpu":
        return int(SHARE * (machine.available_memory() + machine.resident_memory()))
    return device.memory_limit


class Limit:
    """Called before each batch; raises if the formula says that the batch would not fit.

    Args:
        shape, run: The model and the run, as formula.py describes them.
        limit: How many bytes the process may hold.
    """

    def __init__(self, shape: Shape, run: Run, limit: int):
        self.shape, self.run, self.limit = shape, run, limit
        self._fitted = -1  # bytes of the largest batch that was let through

    def __call__(self, batch: Batch, training: bool) -> None:
        """Check a batch, if it is larger than all before it.

        Args:
            batch: The batch that is about to be computed.
            training: Whether it is trained on, or only scored.

        Raises:
            MemoryLimitError: the batch would not fit.
        """
        load = Load.of(batch)
        needed = predict(self.shape, self.run, load, training=training)
        if needed.batch <= self._fitted:
            return
        held = backend.held_memory()
        if held + needed.batch > self.limit:
            raise MemoryLimitError(self._message(load, needed, held))
        self._fitted = needed.batch

    def room(self) -> int:
        """Return how many bytes the process may still take."""
        return max(0, self.limit - backend.held_memory())

    def _message(self, load: Load, needed: Memory, held: int) -> str:
        ways = ways_to_fit(self.shape, self.run, load, self.limit - (held - needed.held))
        hint = f"\nhint: it would fit with {'; or '.join(ways)}" if ways else "\nhint: this takes a larger machine"
        return (
            f"a batch of {load.rows} rows and {load.tokens} tokens needs {units.size(needed.batch)} more than the"
            f" {units.size(held)} that are in use, and the limit is {units.size(self.limit)} (--memory-limit);"
            f" what was learned before is kept{hint}"
        )


def limit_of(
    folder: Path, lora: LoRAConfig, by_hand: bool, packed: bool, checkpoint: bool, bfloat16: bool, given: int
) -> Limit | None:
    """Return the limit of a run, or None if the formula does not cover the architecture.

    Args:
        folder: The base model's folder.
        lora: Which layers have factors.
        by_hand, packed, checkpoint, bfloat16: As `formula.Run` explains.
        given: As `memory_limit` takes it.
    """
    try:
        shape = shape_of_folder(folder)
    except InputError:
        return None
    run = run_of(shape, lora, by_hand=by_hand, packed=packed, checkpoint=checkpoint, bfloat16=bfloat16)
    return Limit(shape, run, memory_limit(given))
