"""Token rows packed into a few flat arrays, so that a stream can keep them beside its factors."""

from collections.abc import Sequence

import numpy as np

from mbf_mlx.methods.base import TokenRow
from mbf_mlx.methods.state import STREAM, State
from mbf_mlx.reference import Array

NAMES = ("rows_tokens", "rows_supervised", "rows_length", "rows_task")
BYTES_PER_TOKEN = 4 + 1 / 8
BYTES_PER_ROW = 4 + 4


def pack(
    rows: Sequence[TokenRow], tasks: Sequence[int], tokens: int = 0, count: int = 0
) -> dict[str, dict[str, Array]]:
    """Return rows with their tasks' numbers, in the form that `State.kept` holds.

    Args:
        rows: Token rows.
        tasks: The number of each row's task.
        tokens: Make room for at least this many tokens, so that what is kept has one size however full it is.
        count: Make room for at least this many rows.
    """
    lengths = np.array([len(row.tokens) for row in rows], dtype=np.int32)
    tokens, count = max(tokens, int(lengths.sum())), max(count, len(rows))
    flat, supervised = np.zeros(tokens, dtype=np.int32), np.zeros(tokens, dtype=bool)
    if rows:
        flat[: lengths.sum()] = np.concatenate([row.tokens for row in rows])
        supervised[: lengths.sum()] = np.concatenate([row.supervised for row in rows])
    arrays = (flat, np.packbits(supervised), _padded(lengths, count), _padded(np.asarray(tasks, dtype=np.int32), count))
    return {name: {STREAM: array} for name, array in zip(NAMES, arrays, strict=True)}


def unpack(state: State) -> tuple[list[TokenRow], list[int]]:
    """Return the rows that a state keeps, and the number of each row's task."""
    if NAMES[0] not in state.kept:
        return [], []
    tokens, bits, lengths, tasks = (np.asarray(state.kept[name][STREAM]) for name in NAMES)
    supervised = np.unpackbits(bits, count=len(tokens)).astype(bool)
    count = int((lengths > 0).sum())
    ends = np.cumsum(lengths[:count])
    rows = [TokenRow(tokens[end - n : end], supervised[end - n : end]) for n, end in zip(lengths, ends, strict=False)]
    return rows, tasks[:count].tolist()


def _padded(values: np.ndarray, count: int) -> np.ndarray:
    return np.pad(values, (0, count - len(values)))
