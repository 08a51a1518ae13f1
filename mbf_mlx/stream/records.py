"""What a stream writes down about itself: its identity, one manifest a generation, one line of history a task.

pydantic checks what is read from disk; its errors become one InputError. Fields have the names of `mbf status --json`.
"""

import hashlib
import json
import os
from dataclasses import fields
from pathlib import Path
from typing import Any, TypeVar

from pydantic import BaseModel, ConfigDict, ValidationError

from mbf_mlx.config import DataConfig
from mbf_mlx.errors import InputError, quoted
from mbf_mlx.files.storage import read_file

FORMAT_VERSION = 1
IDENTITY, MANIFEST, HISTORY, STATE = "stream.json", "manifest.json", "history.jsonl", "state.safetensors"
CHANGED = "its content is not what was committed"
LINE_BYTES = 2000  # the longest line of history, without its scores
SCORE_DIGITS = 6

R = TypeVar("R", bound="Record")


class NewerFormatError(InputError):
    """A later version of mbf-mlx wrote this file."""


class Record(BaseModel):
    """A JSON object with exactly these fields."""

    model_config = ConfigDict(extra="forbid", frozen=True)

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
    checksum: str = ""

    def to_json(self) -> bytes:
        """Return the manifest in one line of JSON, as `Record.to_json` does; without `base_files` if there are none."""
        return _line(self.model_dump(mode="json", exclude=None if self.base_files else {"base_files"}))

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
    scores: list[float | None]
    losses: list[float | None]

    @property
    def data(self) -> DataConfig:
        """How the task's rows were turned into tokens. A task that was trained elsewhere gets our defaults."""
        known = {each.name for each in fields(DataConfig)}
        return DataConfig(**{name: value for name, value in self.settings.items() if name in known})

    def to_json(self) -> bytes:
        """Return the line of history. If it is too long, the labels become a hash, then the curve loses points."""
        bare = self.model_copy(update={"scores": [], "losses": []})
        record = self
        if len(Record.to_json(bare)) > LINE_BYTES and not isinstance(self.labels, str):
            digest = hashlib.sha256(json.dumps(self.labels).encode()).hexdigest()
            record = record.model_copy(update={"labels": f"sha256:{digest}"})
        while len(Record.to_json(record.model_copy(update={"scores": [], "losses": []}))) > LINE_BYTES and record.curve:
            record = record.model_copy(update={"curve": record.curve[::2] if len(record.curve) > 2 else []})
        return Record.to_json(record)


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
    if isinstance(version, int) and version > FORMAT_VERSION:
        writer = document.get("written_by", "a newer mbf-mlx")
        raise NewerFormatError(
            f"{where}: format version {version}, written by {writer}; this mbf-mlx reads versions up to"
            f" {FORMAT_VERSION}\nhint: upgrade with: pip install -U mbf-mlx"
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
