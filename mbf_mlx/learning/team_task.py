"""The message by which process 0 tells the others about a task: rows, method, state, settings.

Its arrays are the tokens of all rows end to end, which of them are supervised, the rows' lengths, and the state's
factors ("deployed FIELD LAYER") and kept arrays ("kept NAME LAYER"). No row's text and no task file's path is sent.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from mbf_mlx.config import LearnConfig
from mbf_mlx.data.encode import Encoded
from mbf_mlx.data.row import Row
from mbf_mlx.learning.team import Message, Tensors
from mbf_mlx.methods import Method, Pair, State

ELSEWHERE = Path("(a row of process 0)")


def task_message(
    base: dict[str, Any], method: Method, state: State, rows: Sequence[Encoded], settings: LearnConfig
) -> Message:
    """Return a message with everything that a task's steps depend on; `base` describes the model that workers load."""
    tensors: Tensors = {
        "tokens": np.concatenate([row.tokens for row in rows]).astype(np.int32),
        "supervised": np.concatenate([row.supervised for row in rows]).astype(np.uint8),
        "lengths": np.array([len(row.tokens) for row in rows], dtype=np.int32),
    }
    for layer, pair in state.deployed.items():
        tensors |= {f"deployed {field} {layer}": np.asarray(each) for field, each in zip("ab", pair, strict=True)}
    for name, layers in state.kept.items():
        tensors |= {f"kept {name} {layer}": np.asarray(each) for layer, each in layers.items()}
    values = {
        "base": base,
        "method": [method.name, method.options],
        "state": {"t": state.t, "rank": state.rank, "seed": state.seed, "layers": state.layers},
        "checkpoint": settings.train.grad_checkpoint,
        "precision": settings.train.precision,
        "memory_limit": settings.memory_limit,
        "seed": settings.train.seed,
    }
    return Message("task", values, tensors)


def rows_of(message: Message) -> list[Encoded]:
    """Return the rows of a "task" message. Only process 0 knows the files they came from."""
    tensors = message.tensors
    ends = np.cumsum(tensors["lengths"])[:-1]
    tokens, supervised = np.split(tensors["tokens"], ends), np.split(tensors["supervised"].astype(bool), ends)
    return [
        Encoded(tokens=each, supervised=labels, prompt_length=0, cut=0, row=Row("text", ELSEWHERE, number))
        for number, (each, labels) in enumerate(zip(tokens, supervised, strict=True), start=1)
    ]


def state_of(message: Message) -> State:
    """Return the state of a "task" message."""
    values: dict[str, Any] = message.values["state"]
    fields: dict[str, Tensors] = {}
    kept: dict[str, Tensors] = {}
    for key, array in message.tensors.items():
        part, _, rest = key.partition(" ")
        name, _, layer = rest.partition(" ")
        if part == "deployed":
            fields.setdefault(layer, {})[name] = array
        elif part == "kept":
            kept.setdefault(name, {})[layer] = array
    deployed = {layer: Pair(**pair) for layer, pair in fields.items()}
    layers = {layer: (int(out), int(inner)) for layer, (out, inner) in values["layers"].items()}
    return State(**{**values, "layers": layers}, deployed=deployed, kept=kept)
