"""A file of JSON lines that only grows, shared by processes."""

import json
import os
from pathlib import Path
from typing import Any

from filelock import FileLock

from mbf_mlx.files.storage import refusal


class Log:
    """A JSONL file that is only ever added to; each line is on the disk when `add` returns."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def read(self) -> list[dict[str, Any]]:
        """Return every whole line."""
        rows = []
        for line in self.path.read_bytes().splitlines() if self.path.exists() else []:
            try:
                rows.append(json.loads(line))
            except (ValueError, RecursionError):
                continue  # a killed run's last line
        return [row for row in rows if isinstance(row, dict)]

    def add(self, row: dict[str, Any]) -> None:
        """Add one line.

        Raises:
            InputError: the disk is full, or the file cannot be written.
        """
        try:
            with FileLock(self.path.with_suffix(".lock")), open(self.path, "a+b") as file:
                end = file.seek(0, os.SEEK_END)
                file.seek(max(0, end - 1))
                torn = end and file.read(1) != b"\n"
                file.write((b"\n" if torn else b"") + json.dumps(row, ensure_ascii=False).encode() + b"\n")
                file.flush()
                os.fsync(file.fileno())
        except OSError as error:
            raise refusal(error, self.path) from error
