"""What decides a result, as hashes: of a training, of a score, of a cell of an experiment.

A hash takes everything that its result depends on: settings, rows as tokens, arrays to their last bit, and what is the
same for a whole experiment (base model, versions, device). It takes nothing that the result does not depend on, such as
labels. A new setting may enter only where it is not at its default: the hashes of earlier results stay theirs.
"""

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

import numpy as np

from mbf_mlx.config import settings_of
from mbf_mlx.data.encode import Encoded
from mbf_mlx.experiment.plan_file import Cell, ExperimentPlan
from mbf_mlx.learning.tuning import Tuning
from mbf_mlx.methods import Method, State


def digest(*parts: Any) -> str:
    """Return a hash of plain values and arrays, nested in lists and dictionaries."""
    sha = hashlib.sha256()

    def take(value: Any) -> None:
        if isinstance(value, dict):
            for name in sorted(value):
                sha.update(f"{name}=".encode())
                take(value[name])
            sha.update(b"}")
        elif isinstance(value, (list, tuple)):
            for item in value:
                take(item)
            sha.update(b"]")
        elif isinstance(value, np.ndarray):
            sha.update(f"{value.dtype}{value.shape}".encode())
            sha.update(np.ascontiguousarray(value).tobytes())
        else:
            sha.update(json.dumps(value).encode() + b";")

    take(parts)
    return sha.hexdigest()[:32]


def of_cell(always: dict[str, Any], plan: ExperimentPlan, cell: Cell) -> str:
    """Return the hash of all that determines a cell's result; `always` is the same for the whole experiment."""
    file = plan.file
    return digest(
        always,
        {"method": cell.method, "options": cell.options, "seed": cell.seed},
        *([{"only_last": True}] if cell.only_last else []),
        settings_of_cell(cell),
        [(name, plan.tasks[name].sha256) for name in cell.tasks],
        [file.train_rows, file.valid_rows, file.test_rows, file.score_on, file.metric, file.forward_transfer],
    )


def of_training(
    always: dict[str, Any],
    cell: Cell,
    method: Method,
    state: State,
    tuning: Tuning,
    rows: Sequence[Encoded],
    valid: Sequence[Encoded],
    directions: Mapping[str, np.ndarray],
) -> str:
    """Return the hash of all that determines the result of a training; `directions` is what it measures inputs in."""
    start = tuning.named()
    added = tuning.has_penalty or not tuning.is_plain
    lora = {name: value for name, value in settings_of(cell.lora).items() if name != "rank"}
    return digest(
        always,
        lora,
        _train_settings(cell),
        of_rows(rows),
        of_rows(valid),
        {layer: fields._asdict() for layer, fields in start.items()},
        {name: rate for name, rate in tuning.rates.items() if rate != 1},
        # What a method adds to training is a function of its options and of all that it keeps.
        [method.name, method.options, _of_state(state)] if added else [],
        *([dict(directions)] if directions else []),
    )


def settings_of_cell(cell: Cell) -> dict[str, Any]:
    """Return the settings of a cell that decide its result, as plain values."""
    return {
        "lora": settings_of(cell.lora),
        "train": _train_settings(cell),
        "data": settings_of(cell.data),
    }


def _train_settings(cell: Cell) -> dict[str, Any]:
    """Return the training settings that decide a result; how often it is saved is none of them."""
    left_out = {"save_every"} if cell.train.precision == "bfloat16" else {"save_every", "precision"}
    return {name: value for name, value in asdict(cell.train).items() if name not in left_out}


def of_rows(rows: Sequence[Encoded]) -> list[Any]:
    """Return everything that training and scoring see of some rows."""
    return [(row.tokens, row.supervised, row.prompt_length, row.row.answers) for row in rows]


def _of_state(state: State) -> list[Any]:
    deployed = {layer: pair._asdict() for layer, pair in state.deployed.items()}
    return [state.t, state.seed, state.rank, deployed, state.kept]
