"""Several processes that share the rows of each training step, started by mlx.launch or mpirun.

Process 0 does everything that a single process does: it reads tasks, trains, validates, scores, writes and prints. The
other processes hold the base model (worker.py). Before each step, process 0 sends them the factors and the step's rows.
Every process computes its share of each batch, and the sums of losses and gradients over supervised tokens are added
up. Only process 0 has an optimizer, so processes on different machines cannot drift apart.

A message is one safetensors file, as bytes, that process 0 sends to all. mlx.distributed carries it.
"""

import json
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import safetensors.numpy

from mbf_mlx.device import backend
from mbf_mlx.errors import InputError

# The variables in which mlx.launch (ring, NCCL, JACCL), Open MPI and MPICH tell a process its number.
PLACES = ("MLX_RANK", "OMPI_COMM_WORLD_RANK", "PMI_RANK")
END = "end"

Tensors = dict[str, np.ndarray]


@dataclass(frozen=True)
class Message:
    """A message from process 0 to all others."""

    kind: str
    values: dict[str, Any] = field(default_factory=dict)  # plain JSON values
    tensors: Tensors = field(default_factory=dict)

    def to_bytes(self) -> bytes:
        """Return a safetensors file; its tensor with the empty name holds kind and values as JSON text."""
        text = json.dumps({"kind": self.kind, "values": self.values}).encode()
        named = {f".{name}": np.ascontiguousarray(each) for name, each in self.tensors.items()}
        data: bytes = safetensors.numpy.save({"": np.frombuffer(text, dtype=np.uint8), **named})
        return data

    @classmethod
    def from_bytes(cls, data: bytes) -> "Message":
        """Return the message that `to_bytes` was called on."""
        tensors = safetensors.numpy.load(data)
        document = json.loads(tensors.pop("").tobytes())
        return cls(document["kind"], document["values"], {name[1:]: each for name, each in tensors.items()})


class Team:
    """The processes of one run, as one of them sees it.

    Args:
        group: The group that mx.distributed.init returns.
    """

    def __init__(self, group: Any) -> None:
        self._group = group
        self.rank, self.size = int(group.rank()), int(group.size())
        self._in_step = False  # between a step's message and its sum, where no other message is understood

    def share(self, indices: Sequence[int]) -> list[int]:
        """Return the indices of a batch's rows that this process computes; there may be none."""
        return share(indices, self.rank, self.size)

    def say(self, message: Message) -> None:
        """Send a message to all others; only process 0 does so. After a "step", every process calls `add`."""
        data = message.to_bytes()
        self._in_step = message.kind == "step"
        self._sum(np.array([len(data)], dtype=np.int64))
        self._sum(np.frombuffer(data, dtype=np.uint8))

    def hear(self) -> Message:
        """Wait for the next message of process 0."""
        length = int(self._sum(np.zeros(1, dtype=np.int64))[0])
        return Message.from_bytes(self._sum(np.zeros(length, dtype=np.uint8)).tobytes())

    def add(self, arrays: Tensors) -> Tensors:
        """Return sums over all processes, by name; each process calls this with arrays of the same names and shapes."""
        names = sorted(arrays)
        flat = self._sum(np.concatenate([np.asarray(arrays[name], np.float32).reshape(-1) for name in names]))
        self._in_step = False
        parts = np.split(flat, np.cumsum([arrays[name].size for name in names])[:-1])
        return {name: part.reshape(arrays[name].shape) for name, part in zip(names, parts, strict=True)}

    def end(self) -> None:
        """End the run of the others. In the middle of a step they notice on their own that process 0 is gone."""
        if self.rank == 0 and not self._in_step:
            self.say(Message(END))

    def _sum(self, array: np.ndarray) -> np.ndarray:
        import mlx.core as mx

        here = mx.array(array)
        mx.eval(here)
        try:
            # No stream is named: the ring and MPI work on the CPU, NCCL on the GPU.
            total = mx.distributed.all_sum(here, group=self._group)
            mx.eval(total)  # not in np.array, which would wait for ever where the ring is broken
        except RuntimeError as error:
            raise InputError(
                f"process {self.rank} of {self.size}: another process of this run is gone ({error}); the stream is as"
                " it was before this task\nhint: start it again as before: it goes on from the last save"
            ) from error
        return np.array(total)


def share(indices: Sequence[int], rank: int, size: int) -> list[int]:
    """Return the indices that process `rank` of `size` computes: neighbours, split as evenly as possible."""
    return [int(i) for i in np.array_split(np.asarray(indices, dtype=np.int64), size)[rank]]


@contextmanager
def joined() -> Iterator[Team | None]:
    """Join the other processes of this run, if there are any. At the end, process 0 ends their run.

    Yields:
        The team, or None if this process is alone.

    Raises:
        InputError: this process was started as one of several and cannot reach the others.
    """
    place = next((os.environ[name] for name in PLACES if os.environ.get(name)), None)
    if place is None:
        yield None
        return
    backend.setup()
    import mlx.core as mx

    try:
        group = mx.distributed.init()
    except RuntimeError as error:
        raise InputError(f"process {place}: cannot reach the other processes of this run: {error}") from error
    if group.size() == 1 and place != "0":
        raise InputError(f"process {place}: it was started as one of several, but mlx finds no other")
    team = Team(group) if group.size() > 1 else None
    try:
        yield team
    except InputError:
        _end_quietly(team)
        raise
    if team is not None:
        team.end()


def _end_quietly(team: Team | None) -> None:
    try:
        if team is not None:
            team.end()
    except InputError:
        pass  # the first error is the one to tell
