"""What a stream writes down about itself: its identity, one manifest a generation, one line of history a task.

pydantic checks what is read from disk; its errors become one InputError. Fields have the names of `mbf status --json`.
"""

import hashlib
import json
import os
from collections.abc import Iterator, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any, ClassVar, TypeVar

from pydantic import BaseModel, ConfigDict, ValidationError, model_validator

from mbf_mlx.config import DataConfig
from mbf_mlx.errors import InputError, quoted
from mbf_mlx.files.storage import read_file

FORMAT_VERSION = 1
LONG_FORMAT_VERSION = 2  # of a generation after more than ALL_SCORED tasks: not every task is scored after every other
IDENTITY, MANIFEST, HISTORY, STATE = "stream.json", "manifest.json", "history.jsonl", "state.safetensors"
TASK_SCORES = "task_scores.safetensors"
ALL_SCORED = 100  # so many tasks are all scored after each new one; of more, as many
NEWEST_SCORED = 50  # of them the newest; the others take turns
CHANGED = "its content is not what was committed"
LINE_BYTES = 2000  # the longest line of history, without its scores
SCORE_DIGITS = 6

R = TypeVar("R", bound="Record")


class NewerFormatError(InputError):
    """A later version of mbf-mlx wrote this file."""


class Record(BaseModel):
    """A JSON object with exactly these fields."""

    model_config = ConfigDict(extra="forbid", frozen=True)
    newest_format: ClassVar[int] = FORMAT_VERSION  # the newest version of the format that we read

    def to_json(self) -> bytes:
        """Return one line of JSON with sorted keys. The same record always gives the same bytes."""
        return _line(self.model_dump(mode="json"))


def _line(document: dict[str, Any]) -> bytes:
    return (json.dumps(document, sort_keys=True, ensure_ascii=False) + "\n").encode()


class BaseRecord(Record):
    """The base model of a stream."""

    name: str
    fingerprint: str
    quantization: str  # in words, or "none"
    architecture: str
    num_layers: int


class Identity(Record):
    """What never changes in a stream."""

    format_version: int
    id: str
    base: BaseRecord
    method: str
    method_options: dict[str, Any]
    rank: int
    scale: float
    keys: list[str]
    num_layers: int
    dropout: float
    template: str
    template_sha256: str
    layers: dict[str, tuple[int, int]]


class FileRecord(Record):
    """The size and the sha256 of one file of a generation."""

    bytes: int
    sha256: str


class Manifest(Record):
    """One generation: its stream, the task it was made after, and its files."""

    newest_format: ClassVar[int] = LONG_FORMAT_VERSION
    format_version: int
    written_by: str
    stream: str
    generation: int
    t: int
    base: BaseRecord
    base_path: str
    method: str
    method_options: dict[str, Any]
    settings: dict[str, Any]
    seed: int
    files: dict[str, FileRecord]
    base_files: dict[str, str] = {}  # hashes of the base's settings and tokenizer; streams made before had none
    earlier: tuple[FileRecord, ...] = ()  # the files in history/, which hold the lines of earlier tasks
    checksum: str = ""

    def to_json(self) -> bytes:
        """Return the manifest in one line of JSON, as `Record.to_json` does; without the last two if they are empty."""
        empty = {name for name in ("base_files", "earlier") if not getattr(self, name)}
        return _line(self.model_dump(mode="json", exclude=empty))

    def sealed(self) -> "Manifest":
        """Return this manifest with a checksum over all its other fields."""
        bare = self.model_copy(update={"checksum": ""})
        return bare.model_copy(update={"checksum": hashlib.sha256(bare.to_json()).hexdigest()})


class TaskRecord(Record):
    """One learned task. Losses are in nats for each supervised token. Seconds count training alone."""

    name: str
    t: int
    path: str
    sha256: str
    format: str
    metric: str
    train_rows: int
    valid_rows: int
    test_rows: int
    held_out: int
    cut_rows: int
    train_tokens: int
    computed_tokens: int
    steps: int
    best_step: int
    seconds: float
    tokens_per_second: float
    loss_before: float | None
    loss_after: float | None
    peak_memory_bytes: int
    settings: dict[str, Any]
    labels: tuple[str, ...] | str
    curve: list[tuple[int, float]]
    machine: dict[str, Any]
    scores: list[float | None]  # of tasks 1 to t, or of those that `scored` names
    losses: list[float | None]
    scored: tuple[tuple[int, int], ...] | None = None  # first and last task of each span that was scored; None: all
    average: float | None = None  # average accuracy after this task, where `scored` is given

    @model_validator(mode="after")
    def _check_spans(self) -> "TaskRecord":
        spans = self.scored or ()
        if any(not 1 <= first <= last <= self.t for first, last in spans):
            raise ValueError(f"scored: expected spans of tasks from 1 to {self.t}")
        count = sum(last - first + 1 for first, last in spans)
        if self.scored is not None and not len(self.scores) == len(self.losses) == count:
            raise ValueError(f"scored: expected {count} scores and losses")
        return self

    def scored_tasks(self) -> Iterator[tuple[int, float | None, float | None]]:
        """Yield every task that was scored after this one, from 1, with its score and its loss."""
        spans = ((1, self.t),) if self.scored is None else self.scored
        return zip((task for first, last in spans for task in range(first, last + 1)), self.scores, self.losses)

    def bounded(self) -> "TaskRecord":
        """Return this record with the scores of at most ALL_SCORED tasks, those that `spans_to_score` names."""
        if self.scored is not None or self.t <= ALL_SCORED:
            return self
        spans = spans_to_score(self.t) if any(score is not None for score in (*self.scores, *self.losses)) else ()
        chosen = [task - 1 for first, last in spans for task in range(first, last + 1)]
        scores, losses = ([values[at] for at in chosen] for values in (self.scores, self.losses))
        return self.model_copy(update={"scores": scores, "losses": losses, "scored": spans})

    @property
    def data(self) -> DataConfig:
        """How the task's rows were turned into tokens. A task that was trained elsewhere gets our defaults."""
        known = {each.name for each in fields(DataConfig)}
        return DataConfig(**{name: value for name, value in self.settings.items() if name in known})

    def to_json(self) -> bytes:
        """Return the line of history. If it is too long, the labels become a hash, then the curve loses points."""
        record = self
        if record._length() > LINE_BYTES and not isinstance(self.labels, str):
            digest = hashlib.sha256(json.dumps(self.labels).encode()).hexdigest()
            record = record.model_copy(update={"labels": f"sha256:{digest}"})
        while record._length() > LINE_BYTES and record.curve:
            record = record.model_copy(update={"curve": record.curve[::2] if len(record.curve) > 2 else []})
        return record._own_line()

    def _own_line(self) -> bytes:
        return _line(self.model_dump(mode="json", exclude={"scored", "average"} if self.scored is None else None))

    def _length(self) -> int:
        """Return the bytes of the line without its scores."""
        return len(self.model_copy(update={"scores": [], "losses": []})._own_line())


def spans_to_score(t: int, newest: int = 0) -> tuple[tuple[int, int], ...]:
    """Return which tasks are scored after task t: the first and the last task of each span, counted from 1.

    Up to ALL_SCORED tasks are all scored. Of more, the newest NEWEST_SCORED are, and the others in turns, so that a
    task costs the same however many there are.

    Args:
        t: How many tasks the stream has learned.
        newest: Score so many of the newest tasks and no others; 0 is the rule above.
    """
    if newest:
        return ((max(1, t - newest + 1), t),)
    if t <= ALL_SCORED:
        return ((1, t),)
    older, turn = t - NEWEST_SCORED, ALL_SCORED - NEWEST_SCORED
    first = 1 + turn * (t % -(-older // turn))
    return ((first, min(first + turn - 1, older)), (older + 1, t))


def without_task(spans: Sequence[tuple[int, int]], t: int) -> tuple[tuple[int, int], ...]:
    """Return spans that end with task t, without that task."""
    return tuple((first, min(last, t - 1)) for first, last in spans if first < t)


def score_columns(t: int, spans: Sequence[tuple[int, int]], values: Sequence[float | None]) -> list[float | None]:
    """Return the scores of the tasks in `spans` as the record of task t holds them.

    The record of one of the first ALL_SCORED tasks has a place for each task so far; a later one has those alone.
    """
    if t > ALL_SCORED:
        return list(values)
    columns: list[float | None] = [None] * t
    for task, value in zip((task for first, last in spans for task in range(first, last + 1)), values, strict=True):
        columns[task - 1] = value
    return columns


def parse(kind: type[R], data: bytes, where: Path | str) -> R:
    """Return the record that `data` holds.

    Args:
        kind: The record's class.
        data: JSON.
        where: The file it comes from, for messages.

    Raises:
        NewerFormatError: its format version is newer than ours.
        InputError: it is not JSON, or its fields do not fit.
    """
    try:
        document = json.loads(data)
    except (ValueError, RecursionError) as error:
        raise InputError(f"{where}: damaged: not JSON ({error})") from error
    version = document.get("format_version", FORMAT_VERSION) if isinstance(document, dict) else FORMAT_VERSION
    if isinstance(version, int) and version > kind.newest_format:
        writer = document.get("written_by", "a newer mbf-mlx")
        raise NewerFormatError(
            f"{where}: format version {version}, written by {writer}; this mbf-mlx reads versions up to"
            f" {kind.newest_format}\nhint: upgrade with: pip install -U mbf-mlx"
        )
    try:
        return kind.model_validate(document)
    except ValidationError as error:
        first = error.errors()[0]
        place = ".".join(str(part) for part in first["loc"])
        raise InputError(f"{where}: damaged: {place or 'document'}: {first['msg'].lower()}") from error


def read_identity(path: Path) -> Identity:
    """Return what the stream.json of a stream's folder says.

    Raises:
        NewerFormatError: a later version of mbf-mlx wrote it.
        InputError: there is no stream, or the file is damaged; the message says how to restore it.
    """
    where = path / IDENTITY
    try:
        data = read_file(where)
    except FileNotFoundError:
        if not os.path.lexists(path):
            raise InputError(
                f"{path}: no such stream\nhint: mbf learn {quoted(path)} TASK --model BASE makes one"
            ) from None
        hint = ""
        if (path / "generations").is_dir():
            hint = f"\nhint: mbf status {quoted(path)} --repair restores it from an undamaged generation"
        raise InputError(f"{path}: not a stream: {IDENTITY} is missing{hint}") from None
    try:
        identity = parse(Identity, data, where)
    except NewerFormatError as error:
        if not _is_in_our_format(path / "current"):
            raise
        raise InputError(
            f"{error}\nhint: this mbf-mlx reads the stream's generations, so the file may be damaged instead:"
            f" mbf status {quoted(path)} --repair restores it"
        ) from error
    except InputError as error:
        raise identity_damage(where, str(error).partition("damaged: ")[2]) from error
    if identity.to_json() != data:
        raise identity_damage(where)
    if (path / MANIFEST).exists():
        stream = path.resolve().parent.parent
        raise InputError(f"{path}: one generation of a stream, not a stream\nhint: give the stream's folder: {stream}")
    return identity


def _is_in_our_format(generation: Path) -> bool:
    """Return whether we can read the format that a generation was written in."""
    try:
        parse(Identity, read_file(generation / IDENTITY), generation)
        parse(Manifest, read_file(generation / MANIFEST), generation)
    except (InputError, FileNotFoundError):
        return False
    return True


def identity_damage(path: Path, what: str = CHANGED) -> InputError:
    """Return the error for a damaged stream.json, which every generation has a copy of."""
    return InputError(
        f"{path}: damaged: {what}"
        f"\nhint: mbf status {quoted(path.parent)} --repair restores it from an undamaged generation"
    )
