"""A task in training, saved in `STREAM/working/`, so that a killed run can go on where it was.

A save is a folder, `step-00000120/`, with `progress.json` and `tensors.safetensors`. It gets its name when it is
complete. The newest undamaged save counts. `run` holds everything that decides the result: a save whose `run` differs
is not continued.
"""

import hashlib
import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mbf_mlx.errors import InputError
from mbf_mlx.files.safetensors_file import safetensors_bytes
from mbf_mlx.files.storage import Files, read_file, read_large, sha256
from mbf_mlx.stream.records import NewerFormatError

PROGRESS, TENSORS = "progress.json", "tensors.safetensors"
SAVE_VERSION = 1  # of what a save holds; a save without a number has version 1


@dataclass(frozen=True, kw_only=True)
class Saved:
    """The contents of a save."""

    run: dict[str, Any]
    machine: dict[str, Any]
    progress: dict[str, Any]
    tensors: dict[str, Any]  # NumPy arrays


class Working:
    """The `working/` folder of one stream."""

    def __init__(self, folder: Path, files: Files) -> None:
        self.folder, self.files = folder, files

    def check_place(self) -> None:
        """Check that a run can be saved here.

        Raises:
            InputError: something that is not a folder has the name.
        """
        if os.path.lexists(self.folder) and not self.folder.is_dir():
            raise InputError(
                f"{self.folder}: expected the folder of a task in training, got something else"
                "\nhint: move it away; it holds nothing that was learned"
            )

    def save(
        self, step: int, run: dict[str, Any], machine: dict[str, Any], progress: dict[str, Any], tensors: dict[str, Any]
    ) -> None:
        """Save the run here, replacing the previous save.

        Args:
            step: Training steps done so far.
            run: What decides the result: the task, its data, the settings.
            machine: What the run was computed with.
            progress: How far the run has come.
            tensors: NumPy arrays by name.

        Raises:
            InputError: it cannot be written; the previous save is kept.
        """
        data = safetensors_bytes(tensors)
        document = {
            "format_version": SAVE_VERSION,
            "run": run,
            "machine": machine,
            "progress": progress,
            "tensors_sha256": sha256(data),
        }
        document["checksum"] = _checksum(document)
        building, final = self.folder / "building", self.folder / f"step-{step:08d}"
        self.files.make_folder(self.folder)
        self.files.remove(building)
        self.files.make_folder(building)
        try:
            self.files.write(building / TENSORS, data)
            self.files.write(building / PROGRESS, json.dumps(document).encode())
            self.files.sync_folder(building)
            self._remove(final)
            self.files.rename(building, final)
            self.files.sync_folder(self.folder)
        except BaseException:
            self.files.remove(building)
            raise
        for old in self._saves():
            if old != final:
                self._remove(old)

    def load(self) -> Saved | None:
        """Return the newest undamaged save, or None.

        Raises:
            NewerFormatError: a newer mbf-mlx has written it.
        """
        for folder in reversed(self._saves()):
            try:
                return _read(folder)
            except NewerFormatError:
                raise
            except InputError:
                continue
        return None

    def problems(self) -> list[str]:
        """Return a message for each damaged save."""
        found = []
        for folder in self._saves():
            try:
                _read(folder)
            except InputError as error:
                found.append(f"{error}\nhint: run the same mbf learn again; it starts this task from the beginning")
        return found

    def drop(self) -> bool:
        """Remove all saves, and the folder; return whether there was a save."""
        saves = self._saves()
        for save in saves:
            self._remove(save)
        self.files.remove(self.folder)
        return bool(saves)

    def _remove(self, save: Path) -> None:
        """Remove a save. It is renamed first, so that a folder with a save's name is always complete."""
        doomed = self.folder / "removing"
        self.files.remove(doomed)
        if save.exists():
            self.files.rename(save, doomed)
            self.files.remove(doomed)

    def _saves(self) -> list[Path]:
        return sorted(self.folder.glob("step-*")) if self.folder.is_dir() else []


def _read(folder: Path) -> Saved:
    """Return a save after checking every byte of it.

    Raises:
        InputError: it does not hold what was saved.
    """
    from mbf_mlx.adapters import mlx_lm as adapter  # it loads NumPy, so import it only if there is a save

    try:
        text, data = read_file(folder / PROGRESS), read_large(folder / TENSORS)
        document = json.loads(text)
        canonical = json.dumps(document).encode() == text
        if document.pop("checksum") != _checksum(document) or not canonical:
            raise InputError(f"{folder / PROGRESS}: damaged: its content is not what was saved")
        if document.get("format_version", SAVE_VERSION) > SAVE_VERSION:
            raise NewerFormatError(
                f"{folder}: a newer mbf-mlx has saved this run (format {document['format_version']}, this one reads"
                f" {SAVE_VERSION})\nhint: update mbf-mlx, or add --restart to start the task over"
            )
        if sha256(data) != document["tensors_sha256"]:
            raise InputError(f"{folder / TENSORS}: damaged: its content is not what was saved")
        return Saved(
            run=document["run"],
            machine=document["machine"],
            progress=document["progress"],
            tensors=adapter.decode_tensors(data, folder / TENSORS),
        )
    except InputError:
        raise
    except FileNotFoundError as error:
        raise InputError(f"{error.filename}: damaged: missing") from error
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise InputError(f"{folder / PROGRESS}: damaged: {error}") from error


def _checksum(document: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(document, sort_keys=True).encode()).hexdigest()


def check_same_run(saved: Saved, run: dict[str, Any], working: Path) -> None:
    """Refuse to continue a saved run with other data or settings.

    Args:
        saved: The save.
        run: The run that wants to continue it.
        working: The folder of the save, for the message.

    Raises:
        InputError: the message names everything that differs.
    """
    if saved.run == run:
        return
    before, now = ({"precision": "float32"} | each for each in (saved.run, run))  # float32 is not written down
    differ = sorted(key for key in before.keys() | now.keys() if before.get(key) != now.get(key))
    plain = {
        "sha256": "the task's files have changed since then",
        "generation": "the stream has learned or undone a task since then",
    }
    lines = "\n".join(
        f"  {plain.get(key) or f'{key}: {before.get(key)!r} was saved, {now.get(key)!r} is asked for now'}"
        for key in differ
    )
    raise InputError(
        f"{working}: a run of task {saved.run.get('task')!r} was interrupted, and this run differs from it:\n{lines}\n"
        "hint: repeat the earlier command, with the same files, to finish that run, or add --restart to discard it"
    )
