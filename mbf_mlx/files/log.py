"""A file of JSON lines that only grows. Several processes may add to it at once."""

import json
import os
from pathlib import Path
from typing import Any

from filelock import FileLock

from mbf_mlx.files.storage import flush, refusal


class Log:
    """A JSONL file to which lines are added. Each is on the disk when `add` returns."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def read(self) -> list[dict[str, Any]]:
        """Return the objects of all lines, in order. Lines that are not JSON objects are passed over."""
        rows = []
        for line in self.path.read_bytes().splitlines() if self.path.exists() else []:
            try:
                rows.append(json.loads(line))
            except (ValueError, RecursionError):
                continue  # the line that a killed process was writing
        return [row for row in rows if isinstance(row, dict)]

    def add(self, row: dict[str, Any]) -> None:
        """Add one line.

        Raises:
            InputError: the line cannot be written, for example because the disk is full.
        """
        try:
            with FileLock(self.path.with_suffix(".lock"), fallback_to_soft=False), open(self.path, "a+b") as file:
                end = file.seek(0, os.SEEK_END)
                file.seek(max(0, end - 1))
                torn = end and file.read(1) != b"\n"  # a killed process wrote half a line
                file.write((b"\n" if torn else b"") + json.dumps(row, ensure_ascii=False).encode() + b"\n")
                file.flush()
                flush(file.fileno())
        except OSError as error:
            raise refusal(error, self.path) from error
