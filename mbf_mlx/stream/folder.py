"""A stream on disk: one folder, complete generations, one atomic commit, one writer, any number of readers.

    STREAM/stream.json            what never changes
    STREAM/current                link to the generation that counts; replacing it is the only commit
    STREAM/adapter                link to current/adapter, the deployed adapter
    STREAM/generations/000007/    manifest.json, stream.json again, history.jsonl, state.safetensors, adapter/
    STREAM/history/               the record of tasks that are long past, in a stream of hundreds
    STREAM/working/               a task in training

The current and the previous generation are kept. After a crash the current one is the old or the new one, and at most
one unfinished folder is left, which the next writer removes. This file knows no model.
"""

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mbf_mlx.adapters.layout import WEIGHTS
from mbf_mlx.errors import InputError
from mbf_mlx.files.safetensors_file import read_header
from mbf_mlx.files.storage import Files, refusal, require_space
from mbf_mlx.stream import links
from mbf_mlx.stream.generations import Generation, Generations, HistoryFiles
from mbf_mlx.stream.history import HistoryReader
from mbf_mlx.stream.lock import HOLDER, LOCK, hold_lock
from mbf_mlx.stream.records import (
    IDENTITY,
    MANIFEST,
    STATE,
    Identity,
    NewerFormatError,
    TaskRecord,
    read_identity,
)
from mbf_mlx.stream.saves import Working
from mbf_mlx.stream.task_scores import TaskScores
from mbf_mlx.stream.unfinished import HALF_MADE, is_unfinished

if TYPE_CHECKING:  # importing it loads NumPy, and `mbf status` must answer at once
    from mbf_mlx.methods import State


class StreamFolder:
    """A stream on disk. Reading needs no lock; `writer()` takes the one lock under which it changes."""

    def __init__(self, path: Path, identity: Identity, files: Files) -> None:
        self.path, self.identity, self.files = path, identity, files
        self.generations = Generations(path, identity, files)
        self.working = path / "working"
        self.saves = Working(self.working, files)
        self._reader = HistoryReader(self.generations)
        self._made: str | None = None  # what this object created: the stream in an existing "folder", or "all" of it

    # Making and opening

    @classmethod
    def create(
        cls, path: Path, identity: Identity, base_path: str, seed: int, files: Files | None = None
    ) -> "StreamFolder":
        """Create a stream that has learned nothing.

        Raises:
            InputError: `path` holds something else, or cannot be written.
        """
        from mbf_mlx.stream import state_files

        files = files or Files()
        stream, there = cls(path, identity, files), os.path.lexists(path)
        try:
            if there and not is_unfinished(path):
                if any((path / "generations").glob(f"[0-9]*/{MANIFEST}")):
                    read_identity(path)  # it is missing: this says how to restore it
                raise InputError(f"{path}: expected a new or empty folder for a stream, got something else")
        except OSError as error:
            raise refusal(error, path) from error
        files.make_folder(path)
        with stream.writer():
            if (path / IDENTITY).exists():
                raise InputError(f"{path}: another process has just created this stream\nhint: run the command again")
            try:
                state = state_files.empty(identity, seed)
                files.discard(stream.generations.folder(0))
                stream.generations.write(0, state, HistoryFiles(), base_path, {})
                files.replace_link(path / "adapter", "current/adapter")
                stream.generations.make_current(0)
                files.replace(path / IDENTITY, identity.to_json())
            except BaseException:
                made = (IDENTITY, "current", "adapter", "generations")
                for place in [path / name for name in made] if there else [path]:
                    files.discard(place)
                raise
        stream._made = "folder" if there else "all"
        return stream

    @contextmanager
    def kept_if_used(self) -> Iterator[None]:
        """If the block fails, remove the stream again, provided that this object created it and nothing uses it.

        It is in use once it has learned a task or holds the save of a run that can go on.
        """
        try:
            yield
        except BaseException:
            if self._made:
                self._remove_unused()
            raise

    def _remove_unused(self) -> None:
        """Remove an unused stream, stream.json first: if we are killed, the rest looks like a killed `create`."""
        try:
            with self.writer():
                if self.current().number or read_identity(self.path) != self.identity or self.working.exists():
                    return
                for name in (IDENTITY, "current", "adapter", "generations", HOLDER, LOCK):
                    self.files.remove(self.path / name)
                if self._made == "all":
                    self.path.rmdir()
        except (InputError, OSError):
            return  # another process uses it, or the user put something into the folder

    @classmethod
    def open(cls, path: Path, files: Files | None = None) -> "StreamFolder":
        """Open a stream. Links that a copy has lost are made again, unless another process is writing.

        Raises:
            InputError: there is no stream, its format is newer than ours, or a file is damaged; the message names it.
        """
        stream = cls(path, read_identity(path), files or Files())
        stream.current()
        if not links.are_right(stream.generations):
            # If it is read-only, or another process is writing, the stream can be read without its links.
            with suppress(InputError, OSError), stream.writer(clean=False):
                links.restore(stream.generations)
        return stream

    # Reading

    def current(self) -> Generation:
        """Return the generation that counts, after the fast check: sizes of all files, content of the small ones.

        Raises:
            InputError: it is damaged; the message names the file and how to repair it.
        """
        return self.generations.read(lambda generation: generation)

    def previous(self) -> Generation | None:
        """Return the generation before the current one, or None if it is not kept.

        Raises:
            InputError: it is damaged.
        """
        folder = self.generations.folder(self.current().number - 1)
        return self.generations.open(folder) if folder.exists() else None

    def verify(self, generation: Generation | None = None) -> None:
        """Check every byte of a generation, of the current one by default, and of the earlier history that it names.

        Raises:
            InputError: a file does not hold what was committed.
        """
        generation = generation or self.current()
        self.generations.verify(generation)
        self._reader.verify(generation)

    def state(self) -> "State":
        """Return the state of the current generation.

        Raises:
            InputError: a byte of it is not what was committed.
        """
        return self.generations.read(self.state_of)

    def state_of(self, generation: Generation) -> "State":
        """Return the state of a generation.

        Raises:
            InputError: a byte of it is not what was committed.
        """
        from mbf_mlx.stream import state_files

        manifest = generation.manifest
        if manifest.t == 0:
            return state_files.empty(self.identity, manifest.seed)
        from mbf_mlx.device.threads import side_by_side

        names = (f"adapter/{WEIGHTS}", STATE)
        found = side_by_side(lambda name: self.generations.content(generation, name), names, products=False)
        weights, kept = zip(found, (generation.folder / name for name in names))
        return state_files.read(self.identity, manifest.t, manifest.seed, weights, kept)

    def kept_bytes(self) -> int:
        """Return the bytes of all arrays in `state()`, the deployed pair included, without reading the arrays."""
        return self.generations.read(_kept_bytes)

    def history(self) -> list[TaskRecord]:
        """Return the records of all learned tasks, in order."""
        return self.generations.read(self._reader.all)

    def newest_tasks(self) -> list[TaskRecord]:
        """Return the records of the newest tasks, in order: all of a short stream, the last hundreds of a long one."""
        return self.generations.read(self._reader.newest)

    def tasks(self, spans: Sequence[tuple[int, int]]) -> list[TaskRecord]:
        """Return the records of the tasks in `spans`, each of them the first and the last task, counted from 1."""
        return self.generations.read(lambda generation: self._reader.tasks(generation, spans))

    def task_scores(self) -> TaskScores:
        """Return the newest score of every task, and what else the averages over all tasks need."""
        return self.generations.read(self._reader.scores)

    def date(self) -> str:
        """Return the day that the chat template writes into this stream's prompts; "" if none is kept."""
        return str(self.current().manifest.settings.get("data", {}).get("date") or "")

    def interrupted(self) -> dict[str, Any] | None:
        """Return the task and step of an interrupted run that can go on, or None."""
        try:
            saved = self.saves.load()
        except NewerFormatError:
            return None
        if saved is None or self._is_committed(saved.run):
            return None
        return {"task": saved.run.get("task"), "step": saved.progress.get("step")}

    def _is_committed(self, run: dict[str, Any]) -> bool:
        """Return whether a saved run's task is the newest commit: the run was killed before it removed its save."""
        if run.get("generation") != self.current().number - 1:
            return False
        last = self.newest_tasks()[-1]
        return (last.name, last.sha256) == (run.get("task"), run.get("sha256"))

    # Writing

    @contextmanager
    def writer(self, clean: bool = True) -> Iterator["StreamFolder"]:
        """Hold the stream's one lock while the block runs. It ends with the process.

        Args:
            clean: Whether to remove first what a crash left behind. False if the current generation may be damaged.

        Raises:
            InputError: another process holds the lock; the message says which one and since when.
        """
        with hold_lock(self.path, self.files):
            if clean and (self.path / IDENTITY).exists():
                self.clean()
            yield self

    def tidy(self) -> None:
        """Remove what a crash left behind, if no process is writing and the folder is writable."""
        with suppress(InputError, OSError), self.writer():
            pass

    def clean(self) -> None:
        """Remove old generations, half-made files and the save of a run that cannot go on. Needs the lock."""
        if self.working.is_dir():
            try:
                saved = self.saves.load()
                if saved is None or self._is_committed(saved.run):
                    self.saves.drop()
            except NewerFormatError:
                pass  # the newer mbf-mlx goes on with it
        self.generations.remove_old(self.current().number)
        for name in HALF_MADE:
            self.files.discard(self.path / name)

    def _clean_after_commit(self) -> None:
        """Clean if possible. The commit stands even if this fails; the next writer then reports what is in the way."""
        with suppress(InputError, OSError):
            self.clean()

    def commit(
        self, started: Generation, state: "State", record: TaskRecord, base_path: str, settings: dict[str, Any]
    ) -> Generation:
        """Make the state after a task the current one. Needs the lock.

        Args:
            started: The generation that the task was learned on.
            state: What the method returned after the task.
            record: The task's line of history.
            base_path: Where the base model lies.
            settings: What the task was learned with.

        Raises:
            InputError: it cannot be written, or another process has changed the stream meanwhile; the stream is as it
                was.
        """
        self._check_unchanged(started)
        number = started.number + 1
        try:
            history = self._reader.extended(started, record, self.files)
            self.generations.write(number, state, history, base_path, settings)
            self._check_unchanged(started)
            self.generations.make_current(number)
        except BaseException:
            new = self.generations.folder(number)
            if self.generations.current_folder() != new:
                self.files.discard(new)
            raise
        self._clean_after_commit()
        return self.current()

    def _check_unchanged(self, started: Generation) -> None:
        """Refuse to commit on anything but the generation that a task was learned on: a lock can be removed by hand.

        Raises:
            InputError: another generation counts now.
        """
        now = self.current()
        if now.manifest.checksum != started.manifest.checksum:
            raise InputError(
                f"{self.path}: expected to go on from generation {started.number}, but another process has changed the"
                f" stream meanwhile (it has learned {now.manifest.t} tasks now); nothing was committed"
                "\nhint: run the same command again, and remove no lock of a running command"
            )

    def undo(self) -> TaskRecord:
        """Go back to the generation before the last task and return that task's record. Needs the lock.

        Raises:
            InputError: no task was learned yet, or the generation before is gone or damaged.
        """
        current = self.current()
        if current.number == 0:
            raise InputError(f"{self.path}: nothing to undo: it has learned no task")
        undone = self.newest_tasks()[-1]
        previous = self.previous()
        if previous is None:
            raise InputError(
                f"{self.path}: cannot undo task {undone.t} ({undone.name!r}): only one step back is kept, and it is"
                " used up\nhint: to go back further, take a copy of the folder that you made earlier"
            )
        self.verify(previous)
        self.saves.drop()
        self.generations.make_current(previous.number)
        self._clean_after_commit()
        return undone

    def require_space(self) -> None:
        """Refuse to start a task whose result could not be committed.

        Raises:
            InputError: the disk has no room for two saves of training and one generation.
        """
        pairs = sum(4 * self.identity.rank * (out + inner) for out, inner in self.identity.layers.values())
        now = sum(record.bytes for record in self.current().manifest.files.values())
        # A save holds the factors, the best ones and two moments of each; a first generation is three pairs at most.
        require_space(self.path, 8 * pairs + max(3 * pairs, now) + (1 << 20), "learning a task")


def _kept_bytes(generation: Generation) -> int:
    names = [name for name in (f"adapter/{WEIGHTS}", STATE) if name in generation.manifest.files]
    headers = [read_header(generation.folder / name)[0] for name in names]
    return sum(entry.nbytes for header in headers for entry in header.values())
