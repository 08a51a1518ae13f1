"""Several processes that share the rows of each training step, started by mlx.launch or mpirun.

Process 0 does what a process alone does: it reads tasks, trains, validates, scores, writes and prints. The others hold
the base model (worker.py). Before each step process 0 tells them the factors and the step's rows; every process takes
its share of each batch, and the sums of losses and gradients over supervised tokens are added up. Nobody else's
optimizer or rounding counts, so processes on different machines cannot drift apart.

A message is one safetensors file, as bytes, that process 0 says to all. What travels between processes is mlx's own.
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

# What mlx.launch (ring, NCCL, JACCL), Open MPI and MPICH say to the processes that they start: which of them one is.
PLACES = ("MLX_RANK", "OMPI_COMM_WORLD_RANK", "PMI_RANK")
END = "end"

Tensors = dict[str, np.ndarray]


@dataclass(frozen=True)
class Message:
    """What process 0 says to all others."""

    kind: str
    values: dict[str, Any] = field(default_factory=dict)  # as JSON has them
    tensors: Tensors = field(default_factory=dict)

    def to_bytes(self) -> bytes:
        """Return a safetensors file, in which the tensor without a name is the JSON text."""
        text = json.dumps({"kind": self.kind, "values": self.values}).encode()
        named = {f".{name}": np.ascontiguousarray(each) for name, each in self.tensors.items()}
        data: bytes = safetensors.numpy.save({"": np.frombuffer(text, dtype=np.uint8), **named})
        return data

    @classmethod
    def from_bytes(cls, data: bytes) -> "Message":
        """Return what `to_bytes` was given."""
        tensors = safetensors.numpy.load(data)
        document = json.loads(tensors.pop("").tobytes())
        return cls(document["kind"], document["values"], {name[1:]: each for name, each in tensors.items()})


class Team:
    """The processes of one run, as one of them sees it.

    Args:
        group: mlx's own.
    """

    def __init__(self, group: Any) -> None:
        self._group = group
        self.rank, self.size = int(group.rank()), int(group.size())
        self._in_step = False  # between a step's message and its sum, where no other message is understood

    def share(self, indices: Sequence[int]) -> list[int]:
        """Return the rows of a batch that this process computes; there may be none."""
        return share(indices, self.rank, self.size)

    def say(self, message: Message) -> None:
        """Tell all others; process 0 alone does. After "step" comes `add`, with every process."""
        data = message.to_bytes()
        self._in_step = message.kind == "step"
        self._sum(np.array([len(data)], dtype=np.int64))
        self._sum(np.frombuffer(data, dtype=np.uint8))

    def hear(self) -> Message:
        """Wait for what process 0 says next."""
        length = int(self._sum(np.zeros(1, dtype=np.int64))[0])
        return Message.from_bytes(self._sum(np.zeros(length, dtype=np.uint8)).tobytes())

    def add(self, arrays: Tensors) -> Tensors:
        """Return the sums over all processes of arrays (any shape, float32) that each of them has, by name."""
        names = sorted(arrays)
        flat = self._sum(np.concatenate([np.asarray(arrays[name], np.float32).reshape(-1) for name in names]))
        self._in_step = False
        parts = np.split(flat, np.cumsum([arrays[name].size for name in names])[:-1])
        return {name: part.reshape(arrays[name].shape) for name, part in zip(names, parts, strict=True)}

    def end(self) -> None:
        """Let the others go; in the midst of a step they notice by themselves that this process is gone."""
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
    """Return the rows of a batch that process `rank` of `size` computes: neighbours, as even in number as can be."""
    return [int(i) for i in np.array_split(np.asarray(indices, dtype=np.int64), size)[rank]]


@contextmanager
def joined() -> Iterator[Team | None]:
    """Join the other processes of this run, if it was started with any; at the end process 0 lets them go.

    Yields:
        The team, or None where this process is alone.

    Raises:
        InputError: it was started as one of several, and cannot reach them.
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
