"""The rows that an export is fitted to and measured on: rows of the stream's own tasks, or of a file from the user.

The rounding is fitted to training rows, and models are compared on held-out rows. A task is found again by its path and
content; a task that has moved or changed is named and left out. No row goes into the export.
"""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from mbf_mlx.config import DataConfig
from mbf_mlx.data.encode import Encoded, Encoder
from mbf_mlx.data.row import Row
from mbf_mlx.data.task import find_again, read_task
from mbf_mlx.errors import InputError
from mbf_mlx.export.job import ExportRows
from mbf_mlx.stream.records import TaskRecord

FIT_ROWS = 96  # of all tasks together
COMPARE_ROWS = 64  # of all tasks together
MAX_LENGTH = 512  # tokens of a row


def rows_of_tasks(records: Sequence[TaskRecord], tokenizer: Any, data: DataConfig, stream: Path) -> ExportRows:
    """Return rows of the tasks that a stream has learned, the same number of each."""
    found, notes = [], []
    newest = {record.name: record for record in records}
    for record in newest.values():
        task = find_again(record.name, Path(record.path), record.sha256, stream)
        if isinstance(task, str):
            notes.append(task)
        else:
            found.append((record, task))
    if not found:
        return ExportRows(notes=tuple(notes))
    fit, compare = [], []
    for record, task in found:
        own = record.data
        learned_with = replace(own, template=data.template, mask_prompt=True, date=own.date or data.date)
        encoder = Encoder(tokenizer, learned_with)
        fit += _encoded(encoder, task.train, FIT_ROWS // len(found) + 1)
        compare += _encoded(encoder, task.test, COMPARE_ROWS // len(found) + 1)
    source = f"held-out rows of {len(found)} task{'' if len(found) == 1 else 's'}"
    return ExportRows(fit, compare, source, tuple(notes))


def rows_of_file(path: Path, tokenizer: Any, data: DataConfig) -> ExportRows:
    """Return rows of a task file or folder, or the paragraphs of a text file; every other one is for fitting.

    Raises:
        InputError: no such file, or bad rows in it.
    """
    if path.suffix == ".txt":
        text = path.read_text(encoding="utf-8") if path.is_file() else None
        if text is None:
            raise InputError(f"{path}: no such file")
        pieces = [piece.strip() for piece in text.split("\n\n") if piece.strip()]
        rows: Sequence[Row] = [Row("text", path, line, text=piece) for line, piece in enumerate(pieces, 1)]
    else:
        task = read_task(path)
        rows = [*task.train, *task.valid, *task.test]
    encoder = Encoder(tokenizer, replace(data, max_seq_length=MAX_LENGTH))
    encoded = _encoded(encoder, rows, FIT_ROWS + COMPARE_ROWS)
    if len(encoded) < 2:
        raise InputError(f"{path}: expected at least 2 rows or paragraphs that fit, got {len(encoded)}")
    return ExportRows(encoded[::2][:FIT_ROWS], encoded[1::2][:COMPARE_ROWS], f"rows of {path.name}")


def _encoded(encoder: Encoder, rows: Sequence[Row], count: int) -> list[Encoded]:
    """Return up to `count` rows, evenly spaced, without long ones and those that do not fit.

    No row is cut shorter than it was learned. If all rows are long, only the shortest is returned.
    """
    step = max(1, len(rows) // count)
    chosen = [rows[place] for place in range(0, len(rows), step)][:count]
    encoded = [found for _, found in encoder.stream(chosen) if isinstance(found, Encoded)]
    return [row for row in encoded if len(row.tokens) <= MAX_LENGTH] or sorted(encoded, key=_length)[:1]


def _length(row: Encoded) -> int:
    return len(row.tokens)
