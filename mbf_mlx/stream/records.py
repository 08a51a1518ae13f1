"""What a stream writes down about itself: its identity, a generation's manifest, one line of history a task.

Read from disk by pydantic, whose errors become one InputError each. Field names are those of `mbf status --json`.
"""

import hashlib
import json
from dataclasses import fields
from pathlib import Path
from typing import Any, TypeVar

from pydantic import BaseModel, ConfigDict, ValidationError

from mbf_mlx.config import DataConfig
from mbf_mlx.errors import InputError

FORMAT_VERSION = 1
STATE = "state.safetensors"
LINE_BYTES = 2000  # the most that a task's line may take, scores aside
SCORE_DIGITS = 6

R = TypeVar("R", bound="Record")


class NewerFormatError(InputError):
    """Written by a later version of ours."""


class Record(BaseModel):
    """A JSON object with just these fields."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    def to_json(self) -> bytes:
        """Return one line of JSON with sorted keys: the same record gives the same bytes."""
        return (json.dumps(self.model_dump(mode="json"), sort_keys=True, ensure_ascii=False) + "\n").encode()


class BaseRecord(Record):
    """The base model of a stream."""

    name: str
    fingerprint: str
    quantization: str  # in words; "none"
    architecture: str
    num_layers: int


class Identity(Record):
    """What never changes in the life of a stream."""

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
    """Size and content of one file of a generation."""

    bytes: int
    sha256: str


class Manifest(Record):
    """One generation: which stream, which task, what its files hold."""

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
    checksum: str = ""

    def sealed(self) -> "Manifest":
        """Return this manifest with the checksum over everything else in it."""
        bare = self.model_copy(update={"checksum": ""})
        return bare.model_copy(update={"checksum": hashlib.sha256(bare.to_json()).hexdigest()})


class TaskRecord(Record):
    """One learned task. Losses are per supervised token, in nats; seconds are of training alone."""

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
        """How the task's rows became tokens; a task that was tuned elsewhere has our defaults."""
        known = {each.name for each in fields(DataConfig)}
        return DataConfig(**{name: value for name, value in self.settings.items() if name in known})

    def to_json(self) -> bytes:
        """Return the line of history, shortened to its bound: labels to their hash first, then the curve."""
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

    Raises:
        InputError: not JSON, other fields, a format version newer than ours.
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
