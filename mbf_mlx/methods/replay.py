"""Experience replay: some rows of old tasks are kept and trained on again with every new one.

The reservoir has a fixed number of bytes. A hash of a row's tokens and the seed decides which rows stay: rows with
the smallest hash come first, the tasks take turns, and what no longer fits is dropped. A dropped row could never come
back, so the reservoir holds what one would have chosen with all rows at hand.

It goes on top of any other method (`method`), sequential LoRA by default. The rows are the user's data: they stay in
the stream's own state and are never exported.

Keeps: what the other method keeps, and the reservoir. Constant in the number of tasks, if the other method is.

Source: Chaudhry et al. 2019, arXiv:1902.10486, for tiny episodic memories. Public code (`er` of aimagelab/mammoth)
draws old rows into every batch, from a reservoir of so many rows that each row seen enters by chance. Here old rows
are mixed into the task's rows once, the reservoir has so many bytes, and each task has the same share of it.
"""

import hashlib
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from mbf_mlx.errors import InputError
from mbf_mlx.methods import kept_rows as packed
from mbf_mlx.methods.base import Inputs, Method, TokenRow, Tuned
from mbf_mlx.methods.checks import check_number
from mbf_mlx.methods.factors import Factors
from mbf_mlx.methods.state import State
from mbf_mlx.reference import Array

TOKENS_PER_ROW = 16  # the reservoir has room for the lengths and tasks of its rows where they are this long on average
LONGEST = 1 / 8  # of the reservoir; a longer row never enters


class Replay(Method):
    """A reservoir of rows on top of another method.

    Args:
        method: The other method, made by `make`; one that does not need rows or gradients itself.
        bytes: Size of the reservoir.
        share: Old rows trained on with a task, as a share of the task's own rows; all that are kept, if they are fewer.

    Raises:
        InputError: an argument outside its choices.
    """

    name = "replay"

    def __init__(self, method: Method, bytes: int, share: float) -> None:
        self.method = method
        self.options: dict[str, Any] = {
            "method": method.name,
            "method_options": method.options,
            "bytes": bytes,
            "share": share,
        }
        check_number(self.name, "bytes", bytes, 1000)
        check_number(self.name, "share", share, 0)
        if clash := method.needs - {"inputs"}:
            raise InputError(f"replay: method: {method.name} needs a task's {min(clash)} itself; choose another one")
        self.needs = method.needs | {"rows"}
        self.grows = method.grows
        self.tokens = int(bytes / (packed.BYTES_PER_TOKEN + packed.BYTES_PER_ROW / TOKENS_PER_ROW)) // 8 * 8

    def start(self, state: State) -> Tuned:
        """Return what the other method starts from."""
        return self.method.start(state)

    def rates(self, state: State) -> dict[str, float]:
        """Return the other method's rates."""
        return self.method.rates(state)

    def effective(self, tuned: Tuned, state: State) -> Factors:
        """Return what the other method lets the model apply."""
        return self.method.effective(tuned, state)

    def penalty(self, tuned: Tuned, state: State) -> Array | None:
        """Return the other method's penalty."""
        return self.method.penalty(tuned, state)

    def extra_rows(self, state: State, count: int) -> list[TokenRow]:
        """Return old rows to train on with the `count` rows of the next task, drawn without repetition."""
        rows, _ = packed.unpack(state)
        generator = np.random.default_rng([state.seed, state.t])
        chosen = generator.permutation(len(rows))[: round(self.options["share"] * count)]
        return [rows[i] for i in sorted(chosen)]

    def measure(self, state: State, tuned: Tuned) -> dict[str, Array]:
        """Return the directions that the other method asks for."""
        return self.method.measure(state, tuned)

    def finish(self, state: State, tuned: Tuned, inputs: Inputs | None = None) -> State:
        """Return the other method's state, with the reservoir as it was."""
        mine = {key: value for key, value in state.kept.items() if key in packed.NAMES}
        others = {key: value for key, value in state.kept.items() if key not in packed.NAMES}
        state = self.method.finish(replace(state, kept=others), tuned, inputs)
        return replace(state, kept=state.kept | mine)

    def after_task(self, state: State, rows: Sequence[TokenRow], gradients: Tuned) -> State:
        """Let the rows of task state.t into the reservoir."""
        old, tasks = packed.unpack(state)
        everything = [*zip(old, tasks, strict=True), *((row, state.t) for row in rows)]
        everything.sort(key=lambda entry: _hash(entry[0], state.seed))
        turn: Counter[int] = Counter()
        in_turns = []
        for row, task in everything:
            turn[task] += 1
            in_turns.append((turn[task], task, row))
        in_turns.sort(key=lambda entry: entry[:2])
        kept: list[TokenRow] = []
        kept_tasks: list[int] = []
        left = self.tokens
        for _, task, row in in_turns:
            if len(row.tokens) > LONGEST * self.tokens:
                continue
            if len(row.tokens) > left or len(kept) == self.tokens // TOKENS_PER_ROW:
                break
            kept.append(row)
            kept_tasks.append(task)
            left -= len(row.tokens)
        reservoir = packed.pack(kept, kept_tasks, self.tokens, self.tokens // TOKENS_PER_ROW)
        return replace(state, kept=state.kept | reservoir)


def _hash(row: TokenRow, seed: int) -> bytes:
    return hashlib.blake2b(row.tokens.tobytes(), digest_size=8, key=seed.to_bytes(8, "little", signed=True)).digest()
