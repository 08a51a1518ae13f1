"""A task in training, saved in `STREAM/working/` so that a killed run goes on where it was.

A save is a folder, complete before it gets its name: `step-000120/` with `progress.json` and `tensors.safetensors`. The
newest whole one counts. `run` is everything that decides the result; a save of another run is not continued.
"""

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from mbf_mlx import adapter
from mbf_mlx.errors import InputError
from mbf_mlx.storage import Files

PROGRESS, TENSORS = "progress.json", "tensors.safetensors"


@dataclass(frozen=True, kw_only=True)
class Saved:
    """What was saved last."""

    run: dict[str, Any]
    machine: dict[str, Any]
    progress: dict[str, Any]
    tensors: dict[str, np.ndarray]


class Working:
    """The `working/` folder of one stream."""

    def __init__(self, folder: Path, files: Files) -> None:
        self.folder, self.files = folder, files

    def save(
        self, step: int, run: dict[str, Any], machine: dict[str, Any], progress: dict[str, Any], tensors: dict[str, Any]
    ) -> None:
        """Keep this place of the run in place of the one before."""
        data = adapter.encode_tensors(tensors)
        document = {
            "run": run,
            "machine": machine,
            "progress": progress,
            "tensors_sha256": hashlib.sha256(data).hexdigest(),
        }
        building, final = self.folder / "building", self.folder / f"step-{step:08d}"
        self.files.make_folder(self.folder)
        self.files.remove(building)
        self.files.make_folder(building)
        try:
            self.files.write(building / TENSORS, data)
            self.files.write(building / PROGRESS, json.dumps(document).encode())
            self.files.sync_folder(building)
            self.files.remove(final)
            self.files.rename(building, final)
            self.files.sync_folder(self.folder)
        except BaseException:
            self.files.remove(building)
            raise
        for old in self._saves()[:-1]:
            self.files.remove(old)

    def load(self) -> Saved | None:
        """Return the newest save that is whole, or None."""
        for folder in reversed(self._saves()):
            try:
                document = json.loads((folder / PROGRESS).read_bytes())
                data = (folder / TENSORS).read_bytes()
                if hashlib.sha256(data).hexdigest() != document["tensors_sha256"]:
                    continue
                tensors = adapter.read_tensors(folder / TENSORS)
                return Saved(
                    run=document["run"],
                    machine=document["machine"],
                    progress=document["progress"],
                    tensors=tensors,
                )
            except (OSError, ValueError, KeyError, TypeError):
                continue
        return None

    def drop(self) -> None:
        """Forget the run."""
        self.files.remove(self.folder)

    def _saves(self) -> list[Path]:
        return sorted(self.folder.glob("step-*")) if self.folder.is_dir() else []


def check_same_run(saved: Saved, run: dict[str, Any], working: Path) -> None:
    """Refuse to continue a run with other data or settings.

    Raises:
        InputError: names what differs.
    """
    if saved.run == run:
        return
    differ = sorted(key for key in saved.run.keys() | run.keys() if saved.run.get(key) != run.get(key))
    lines = "\n".join(f"  {key}: {saved.run.get(key)!r} was saved, {run.get(key)!r} is asked for" for key in differ)
    raise InputError(
        f"{working}: a run of task {saved.run.get('task')!r} was interrupted, and this one differs:\n{lines}\nhint: run"
        " it as before to finish it, or add --restart to drop what it had done"
    )
