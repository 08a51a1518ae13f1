"""A stream on disk: one folder, whole generations, one atomic commit, one writer, any number of readers.

    STREAM/stream.json            what never changes
    STREAM/current                link to the generation that counts; its replacement is the only commit
    STREAM/adapter                link to current/adapter, the deployed adapter
    STREAM/generations/000007/    manifest.json, stream.json again, history.jsonl, state.safetensors, adapter/
    STREAM/working/               a task in training

The current and the previous generation are kept. A crash leaves either the old or the new one as the current one, and
at most a folder that the next writer removes. It knows no model.
"""

import filecmp
import json
import os
import socket
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from mbf_mlx import __version__
from mbf_mlx.adapters.layout import CONFIG, WEIGHTS
from mbf_mlx.errors import InputError
from mbf_mlx.files.safetensors_file import read_header
from mbf_mlx.files.storage import Data, Files, read_file, read_large, refusal, require_space, sha256, sha256_file
from mbf_mlx.stream.records import (
    FORMAT_VERSION,
    STATE,
    FileRecord,
    Identity,
    Manifest,
    NewerFormatError,
    TaskRecord,
    parse,
)
from mbf_mlx.stream.saves import Working

if TYPE_CHECKING:  # NumPy comes with it, and `mbf status` is to be there in an instant
    from mbf_mlx.methods import State

IDENTITY, MANIFEST, HISTORY = "stream.json", "manifest.json", "history.jsonl"
FILES = (IDENTITY, HISTORY, STATE, f"adapter/{WEIGHTS}", f"adapter/{CONFIG}")  # of a generation, beside its manifest
SMALL_FILE = 1 << 20  # bytes; smaller files are hashed at every opening, larger ones on request
# What a run that was killed while making a stream leaves behind: files and links, and in generations/ the empty stream.
_BEFORE_IDENTITY = {"lock", "lock.json", "lock.json.new", "adapter", "adapter.new", "current", "current.new"} | {
    "stream.json.new"
}
_EMPTY_STREAM = {"000000", "building-000000"}
_RETRIES = 20  # a reader's, when generations are pruned under it
_SURE = 2  # looks after which what is wrong is no writer's passing state

T = TypeVar("T")


@dataclass(frozen=True)
class Generation:
    """One complete generation, checked when opened."""

    folder: Path
    manifest: Manifest

    @property
    def number(self) -> int:
        """Its place among the stream's generations; 0 is the empty stream."""
        return self.manifest.generation


class StreamFolder:
    """A stream on disk. Reading needs no lock; `writer()` gives the one lock under which it changes."""

    def __init__(self, path: Path, identity: Identity, files: Files) -> None:
        self.path, self.identity, self.files = path, identity, files
        self.working = path / "working"
        self._parsed: tuple[bytes, list[TaskRecord]] = b"", []  # what of the history was read last, and its records
        self._made: str | None = None  # by this object: the stream in a "folder" that was there, or "all" of it

    @classmethod
    def create(
        cls, path: Path, identity: Identity, base_path: str, seed: int, files: Files | None = None
    ) -> "StreamFolder":
        """Make a stream that has learned nothing.

        Raises:
            InputError: `path` holds something else, or cannot be written.
        """
        from mbf_mlx.stream import state_files

        files = files or Files()
        stream, there = cls(path, identity, files), os.path.lexists(path)
        try:
            if there and not _is_unfinished(path):
                if any((path / "generations").glob(f"[0-9]*/{MANIFEST}")):
                    cls._read_identity(path)  # which is missing, and says what makes it again
                raise InputError(f"{path}: expected a new or empty folder for a stream, got something else")
        except OSError as error:
            raise refusal(error, path) from error
        files.make_folder(path)
        with stream.writer():
            if (path / IDENTITY).exists():
                raise InputError(f"{path}: another process has just made this stream\nhint: run the command again")
            try:
                state = state_files.empty(identity, seed)
                stream._discard(stream._folder(0))
                stream._write_generation(0, state, b"", base_path, {})
                stream._link("adapter", "current/adapter")
                stream._link("current", "generations/000000")
                stream._replace(IDENTITY, identity.to_json())
            except BaseException:
                made = (IDENTITY, "current", "adapter", "generations")
                for place in [path / name for name in made] if there else [path]:
                    stream._discard(place)
                raise
        stream._made = "folder" if there else "all"
        return stream

    @contextmanager
    def kept_if_used(self) -> Iterator[None]:
        """Remove the stream again where this object has made it and the block ends in an error that leaves it unused.

        Used means that a task was learned, or that a run was saved that can go on; a stream that was there before is
        never removed.
        """
        try:
            yield
        except BaseException:
            if self._made:
                self._unmake()
            raise

    def _unmake(self) -> None:
        """Remove an unused stream; it stops to be one at once, and what resists is what a killed `create` leaves."""
        try:
            with self.writer():
                if self.current().number or self._read_identity(self.path) != self.identity or self.working.exists():
                    return
                for name in (IDENTITY, "current", "adapter", "generations"):
                    self.files.remove(self.path / name)
                self.files.remove(self.path / "lock.json")
                self.files.remove(self.path / "lock")
                if self._made == "all":
                    self.path.rmdir()
        except (InputError, OSError):
            return  # somebody else uses it, or has put something beside it

    @classmethod
    def open(cls, path: Path, files: Files | None = None) -> "StreamFolder":
        """Open a stream; lost links are made again where nobody else is writing.

        Raises:
            InputError: no stream there, a newer format, or damage; the message names the file.
        """
        stream = cls(path, cls._read_identity(path), files or Files())
        stream.current()
        if not stream._links_lead():
            stream._repair_links()
        return stream

    @classmethod
    def _read_identity(cls, path: Path) -> Identity:
        where = path / IDENTITY
        try:
            data = read_file(where)
        except FileNotFoundError:
            if not os.path.lexists(path):
                raise InputError(
                    f"{path}: no such stream\nhint: mbf learn {path} TASK --model BASE makes one"
                ) from None
            hint = ""
            if (path / "generations").is_dir():
                hint = f"\nhint: mbf status {path} --repair makes it again from a generation that is whole"
            raise InputError(f"{path}: not a stream: {IDENTITY} is missing{hint}") from None
        try:
            identity = parse(Identity, data, where)
        except NewerFormatError as error:
            if not cls._is_ours(path / "current"):
                raise
            raise InputError(
                f"{error}\nhint: or, where this file is damaged, mbf status {path} --repair makes it again: its"
                " generations are no newer than we read"
            ) from error
        except InputError as error:
            raise _identity_damage(where, str(error).partition("damaged: ")[2]) from error
        if identity.to_json() != data:
            raise _identity_damage(where)
        if (path / MANIFEST).exists():
            stream = path.resolve().parent.parent
            raise InputError(
                f"{path}: one generation of a stream, not a stream\nhint: give the stream's folder: {stream}"
            )
        return identity

    @staticmethod
    def _is_ours(generation: Path) -> bool:
        """Return whether a generation was written in a format that we read."""
        try:
            parse(Identity, read_file(generation / IDENTITY), generation)
            parse(Manifest, read_file(generation / MANIFEST), generation)
        except (InputError, FileNotFoundError):
            return False
        return True

    @classmethod
    def repair(cls, path: Path, files: Files | None = None) -> str:
        """Make the newest whole generation the current one, and stream.json again from it; return what was done.

        Raises:
            InputError: nothing whole is left.
        """
        files, problem = files or Files(), None
        for identity in cls._identities(path):
            if isinstance(identity, InputError):
                problem = problem or identity
                continue
            stream = cls(path, identity, files)
            with stream.writer(clean=False):
                try:
                    return stream._repair()
                except InputError as error:
                    problem = problem or error
        raise problem or InputError(f"{path}: damaged: no whole generation is left in generations/")

    @classmethod
    def _identities(cls, path: Path) -> Iterator[Identity | InputError]:
        """Yield what stream.json says, or why it cannot be read; then what its copies in the generations say."""
        try:
            yield cls._read_identity(path)
        except NewerFormatError:
            raise
        except InputError as error:
            yield error
        for copy in sorted((path / "generations").glob(f"[0-9]*/{IDENTITY}"), reverse=True):
            try:
                yield parse(Identity, read_file(copy), copy)
            except (InputError, FileNotFoundError):
                continue

    def _repair(self) -> str:
        done, before = [], self._current_folder()
        try:
            self.verify(self._open_generation(before))
            found = before
        except InputError:
            found = self._newest_whole()
        try:
            same = self._read_identity(self.path) == self.identity
        except InputError:
            same = False
        if not same:
            self._replace(IDENTITY, self.identity.to_json())
            done.append(f"made {IDENTITY} again from generation {found.name}")
        if found != before:
            self._link("current", f"generations/{found.name}")
            done.append(f"went back from generation {before.name}, which is damaged, to {found.name}")
        self._clean()
        if not done:
            return f"{self.path}: nothing to repair: its current generation is whole"
        return f"{self.path}: {', and '.join(done)}: it has learned {self.current().manifest.t} tasks"

    # Reading

    def current(self) -> Generation:
        """Return the generation that counts, after the fast check (sizes of all files, content of the small ones).

        Raises:
            InputError: it is damaged; the message names the file and what repairs it.
        """
        return self._read(lambda generation: generation)

    def _read(self, action: Callable[[Generation], T]) -> T:
        """Return what `action` makes of the current generation, looking again where a writer changed it meanwhile."""
        for attempt in range(_RETRIES):
            mark = self._mark()
            try:
                return action(self._open_generation(mark[0]))
            except InputError:
                # A writer may have pruned this one, or made it anew, between our two looks.
                if self._mark() == mark and (mark[1] or attempt >= _SURE):
                    raise
                time.sleep(0.01 * attempt)
        raise InputError(f"{self.path}: its generations change faster than they can be read; try again")

    def _mark(self) -> tuple[Path, tuple[int, int] | None]:
        """Return the current generation's folder, and what tells it from another of its number, undone and redone."""
        folder = self._current_folder()
        try:
            found = os.stat(folder)
        except OSError:
            return folder, None
        return folder, (found.st_ino, found.st_ctime_ns)

    def state(self) -> "State":
        """Return the state of the current generation, every byte of it checked."""
        return self._read(self._state_of)

    def _state_of(self, generation: Generation) -> "State":
        from mbf_mlx.stream import state_files

        manifest = generation.manifest
        if manifest.t == 0:
            return state_files.empty(self.identity, manifest.seed)
        from mbf_mlx.device.threads import side_by_side

        names = (f"adapter/{WEIGHTS}", STATE)
        found = side_by_side(lambda name: self._content(generation, name), names, products=False)
        weights, kept = zip(found, (generation.folder / name for name in names))
        return state_files.read(self.identity, manifest.t, manifest.seed, weights, kept)

    def kept_bytes(self) -> int:
        """Return the bytes of the arrays held between tasks, deployed pair included: what `state()` would hold."""
        return self._read(self._kept_bytes_of)

    def _kept_bytes_of(self, generation: Generation) -> int:
        names = [name for name in (f"adapter/{WEIGHTS}", STATE) if name in generation.manifest.files]
        headers = [read_header(generation.folder / name)[0] for name in names]
        return sum(entry.nbytes for header in headers for entry in header.values())

    def history(self) -> list[TaskRecord]:
        """Return one record a learned task, in order."""
        return self._read(self._history_of)

    def _history_of(self, generation: Generation) -> list[TaskRecord]:
        where, content = generation.folder / HISTORY, bytes(self._content(generation, HISTORY))
        known, records = self._parsed
        if not content.startswith(known):
            known, records = b"", []
        records = records + [parse(TaskRecord, line, where) for line in content[len(known) :].splitlines()]
        self._parsed = content, records
        return list(records)

    def _content(self, generation: Generation, name: str) -> memoryview:
        """Return a file of a generation, just as it was committed."""
        path = generation.folder / name
        try:
            data = read_large(path)
        except FileNotFoundError:
            raise self._damage(path, "missing") from None
        record = generation.manifest.files.get(name)
        if record is None or sha256(data) != record.sha256:
            raise self._damage(path, "its content is not what was committed")
        return data

    def verify(self, generation: Generation | None = None) -> None:
        """Check every byte of a generation, the current one by default.

        Raises:
            InputError: a file does not hold what was committed.
        """
        generation = generation or self.current()
        for name, record in generation.manifest.files.items():
            path = generation.folder / name
            if record.bytes >= SMALL_FILE:
                self._check_content(path, record)

    def verify_all(self) -> None:
        """Check every byte of the generations that are kept and of a task in training.

        Raises:
            InputError: a file does not hold what was written; all such generations are named.
        """
        for attempt in range(_RETRIES):
            mark = self._mark()
            problems = self._problems()
            if not problems or (self._mark() == mark and attempt >= _SURE):
                break  # else a writer may have changed it meanwhile
        if problems:
            raise InputError("\n".join(problems))

    def _problems(self) -> list[str]:
        found = []
        for read in (self.current, self.previous):
            try:
                if (generation := read()) is not None:
                    self.verify(generation)
            except InputError as error:
                found.append(str(error))
        return found + Working(self.working, self.files).problems()

    def previous(self) -> Generation | None:
        """Return the generation before the current one, where it is kept."""
        folder = self._folder(self.current().number - 1)
        return self._open_generation(folder) if folder.exists() else None

    def interrupted(self) -> dict[str, Any] | None:
        """Return the task and step of a run that was interrupted and can go on, or None."""
        saved = Working(self.working, self.files).load()
        if saved is None or self._is_committed(saved.run):
            return None
        return {"task": saved.run.get("task"), "step": saved.progress.get("step")}

    def _is_committed(self, run: dict[str, Any]) -> bool:
        """Return whether a saved run's task is what was committed last: it was killed before it could tidy up."""
        if run.get("generation") != self.current().number - 1:
            return False
        last = self.history()[-1]
        return (last.name, last.sha256) == (run.get("task"), run.get("sha256"))

    # Writing

    @contextmanager
    def writer(self, clean: bool = True) -> Iterator["StreamFolder"]:
        """Hold the stream's one lock; it dies with the process. What a crash left behind is removed first.

        Args:
            clean: Whether to remove that; not where the current generation may be damaged.

        Raises:
            InputError: somebody else holds it; the message says who and since when.
        """
        from filelock import FileLock, Timeout  # readers do without, and begin sooner

        holder = self.path / "lock.json"
        try:
            lock = FileLock(self.path / "lock", blocking=False)
            lock.acquire()
        except Timeout:
            raise InputError(f"{self.path}: in use by {_describe(holder)}\nhint: wait for it to finish") from None
        except OSError as error:
            raise refusal(error, self.path / "lock") from error
        try:
            owner = {"process": os.getpid(), "host": socket.gethostname(), "since": time.strftime("%Y-%m-%d %H:%M:%S")}
            try:
                self._replace("lock.json", json.dumps(owner).encode())
            except (InputError, OSError):
                pass  # it only tells others who we are; on a full disk an undo may be what is needed
            if clean and (self.path / IDENTITY).exists():
                self._clean()
            yield self
        finally:
            self._discard(holder)
            lock.release()

    def tidy(self) -> None:
        """Remove what a crash left behind, where nobody is writing and we may."""
        try:
            with self.writer():
                pass
        except (InputError, OSError):
            return

    def commit(self, state: "State", record: TaskRecord, base_path: str, settings: dict[str, Any]) -> Generation:
        """Make the state after a task the current one. Needs the writer's lock.

        Raises:
            InputError: it cannot be written; the stream is as it was.
        """
        current = self.current()
        number = current.number + 1
        history = (current.folder / HISTORY).read_bytes() + record.to_json()
        try:
            self._write_generation(number, state, history, base_path, settings)
            self._link("current", f"generations/{number:06d}")
        except BaseException:
            if self._current_folder() != self._folder(number):
                self._discard(self._folder(number))
            raise
        self._prune()
        return self.current()

    def undo(self) -> TaskRecord:
        """Go back to the generation before the last task; return the record of what was undone. Needs the lock.

        Raises:
            InputError: nothing was learned yet, or the generation before is gone.
        """
        current = self.current()
        if current.number == 0:
            raise InputError(f"{self.path}: nothing to undo: it has learned no task")
        undone = self.history()[-1]
        previous = self.previous()
        if previous is None:
            raise InputError(
                f"{self.path}: cannot undo task {undone.t} ({undone.name!r}): one step back is kept, and it was taken"
                "\nhint: a copy of the folder made before is the only way further back"
            )
        self.verify(previous)
        Working(self.working, self.files).drop()
        self._link("current", f"generations/{current.number - 1:06d}")
        self._prune()
        return undone

    def require_space(self) -> None:
        """Refuse to start a task whose result could not be committed.

        Raises:
            InputError: less is free than two saves of training and one generation take.
        """
        pairs = sum(4 * self.identity.rank * (out + inner) for out, inner in self.identity.layers.values())
        now = sum(record.bytes for record in self.current().manifest.files.values())
        # A save holds the factors, the best ones and two moments of each; a first generation is three pairs at most.
        require_space(self.path, 8 * pairs + max(3 * pairs, now) + (1 << 20), "learning a task")

    # How it is done

    def _write_generation(
        self, number: int, state: "State", history: bytes, base_path: str, settings: dict[str, Any]
    ) -> None:
        from mbf_mlx.stream import state_files

        identity = self.identity
        from concurrent.futures import ThreadPoolExecutor  # `mbf status`, which commits nothing, would wait for it

        contents = {IDENTITY: identity.to_json(), HISTORY: history, **state_files.contents(state, identity)}
        require_space(self.path, sum(map(len, contents.values())) + (1 << 16), "a commit")
        building = self.path / "generations" / f"building-{number:06d}"
        self._discard(building)
        try:
            self.files.make_folder(building / "adapter")
            with ThreadPoolExecutor() as pool:
                records = pool.map(_record, contents.values())  # hashed while they are written
                for name, data in contents.items():
                    self.files.write(building / name, data)
            manifest = Manifest(
                format_version=FORMAT_VERSION,
                written_by=f"mbf-mlx {__version__}",
                stream=identity.id,
                generation=number,
                t=state.t,
                base=identity.base,
                base_path=base_path,
                method=identity.method,
                method_options=identity.method_options,
                settings=settings,
                seed=state.seed,
                files=dict(zip(contents, records)),
            ).sealed()
            self.files.write(building / MANIFEST, manifest.to_json())
            self.files.sync_folder(building / "adapter")
            self.files.sync_folder(building)
            self.files.rename(building, self._folder(number))
            self.files.sync_folder(self.path / "generations")
        except BaseException:
            self._discard(building)
            raise

    def _replace(self, name: str, data: bytes) -> None:
        self._swap(name, lambda path: self.files.write(path, data))

    def _link(self, name: str, target: str) -> None:
        self._swap(name, lambda path: self.files.link(target, path))

    def _swap(self, name: str, make: Any) -> None:
        """Make a neighbour and give it the name at one instant."""
        neighbour = self.path / f"{name}.new"
        self._discard(neighbour)
        try:
            make(neighbour)
            self.files.rename(neighbour, self.path / name)
        except BaseException:
            self._discard(neighbour)
            raise
        self.files.sync_folder(self.path)

    def _discard(self, path: Path) -> None:
        """Remove what is half made; what resists is left to the next writer."""
        try:
            self.files.remove(path)
        except (InputError, OSError):
            pass

    def _prune(self) -> None:
        """Clean up after a commit, which stands whatever becomes of that; the next writer says what resists."""
        try:
            self._clean()
        except (InputError, OSError):
            pass

    def _clean(self) -> None:
        """Remove what is neither the current generation nor the one before; a folder loses its name first."""
        if self.working.is_dir():
            working = Working(self.working, self.files)
            saved = working.load()
            if saved is None or self._is_committed(saved.run):
                working.drop()
        current = self.current().number
        keep = {self._folder(current).name, self._folder(current - 1).name}
        for folder in sorted((self.path / "generations").iterdir()):
            if folder.name in keep:
                continue
            doomed = folder.with_name(f"removing-{folder.name}")
            if not folder.name.startswith("removing-"):
                self.files.remove(doomed)
                self.files.rename(folder, doomed)
            self.files.remove(doomed if doomed.exists() else folder)
        for name in ("current.new", "adapter.new", "stream.json.new", "lock.json.new"):
            self._discard(self.path / name)

    def _folder(self, number: int) -> Path:
        return self.path / "generations" / f"{number:06d}"

    def _current_folder(self) -> Path:
        """Return where `current` leads: a link, the text that a copy made of it, or the newest whole generation."""
        number = self._linked_number()
        return self._newest_whole() if number is None else self._folder(number)

    def _numbers(self) -> list[int]:
        """Return the numbers of the generations that are there, newest first."""
        names = [folder.name for folder in (self.path / "generations").glob("*")]
        return sorted((int(name) for name in names if name.isascii() and name.isdigit()), reverse=True)

    def _linked_number(self) -> int | None:
        link = self.path / "current"
        target = ""
        try:
            if link.is_symlink():
                target = os.readlink(link)
            elif link.is_file() and link.stat().st_size < 100:
                target = link.read_text(errors="replace").strip()
        except FileNotFoundError:
            pass  # a text file that was replaced just now: the caller looks for the newest
        number = target.removeprefix("generations/")
        return int(number) if number.isascii() and number.isdigit() and len(number) < 10 else None

    def _newest_whole(self) -> Path:
        for number in self._numbers():
            try:
                self.verify(self._open_generation(self._folder(number)))
            except InputError:
                continue
            return self._folder(number)
        raise InputError(f"{self.path}: damaged: no whole generation is left in generations/")

    def _links_lead(self) -> bool:
        """Return whether `current` and `adapter` are links that lead where they have to."""
        try:
            current, leads = os.readlink(self.path / "current"), os.readlink(self.path / "adapter")
        except OSError:
            return False
        return current == f"generations/{self._current_folder().name}" and leads == "current/adapter"

    def _repair_links(self) -> None:
        try:
            with self.writer(clean=False):
                target = f"generations/{self._current_folder().name}"
                for name, leads, inside in (("current", target, ""), ("adapter", "current/adapter", "adapter")):
                    place = self.path / name
                    if place.is_dir() and not place.is_symlink():
                        # A copy that followed the links; whatever else has the name stays, and is read without.
                        if not any(_is_copy(place, self._folder(number) / inside) for number in self._numbers()):
                            return
                        self.files.remove(place)
                    self._link(name, leads)
        except (InputError, OSError):
            # Read-only, or somebody is writing: reading works without the links.
            return

    def _open_generation(self, folder: Path) -> Generation:
        where = folder / MANIFEST
        try:
            data = read_file(where)
        except FileNotFoundError:
            raise self._damage(where, "missing") from None
        try:
            manifest = parse(Manifest, data, where)
        except NewerFormatError:
            raise
        except InputError as error:
            raise self._damage(where, str(error).partition("damaged: ")[2]) from error
        if manifest.to_json() != data or manifest.sealed() != manifest:
            raise self._damage(where, "its content is not what was committed")
        if manifest.stream != self.identity.id:
            raise self._damage(folder, "it belongs to another stream")
        if outside := [name for name in manifest.files if name not in FILES]:
            raise self._damage(where, f"files: expected names inside the generation, got {outside[0]!r}")
        if f"{manifest.generation:06d}" != folder.name:
            raise self._damage(folder, f"it holds generation {manifest.generation}")
        if IDENTITY in manifest.files and manifest.files[IDENTITY] != _record(self.identity.to_json()):
            raise _identity_damage(self.path / IDENTITY)
        for name, record in manifest.files.items():
            path = folder / name
            try:
                size = path.stat().st_size if path.is_file() else None
            except FileNotFoundError:
                size = None
            if size is None:
                raise self._damage(path, "missing")
            if size != record.bytes:
                raise self._damage(path, f"expected {record.bytes:,} bytes, got {size:,}")
            if size < SMALL_FILE:
                self._check_content(path, record)
        return Generation(folder, manifest)

    def _check_content(self, path: Path, record: FileRecord) -> None:
        try:
            whole = sha256_file(path) == record.sha256
        except FileNotFoundError:
            raise self._damage(path, "missing") from None
        except OSError as error:
            raise refusal(error, path, verb="read") from error
        if not whole:
            raise self._damage(path, "its content is not what was committed")

    def _damage(self, path: Path, what: str) -> InputError:
        hint = f"mbf status {self.path} --repair goes back to the generation before, where that is whole"
        before = self._folder((self._linked_number() or 0) - 1)
        if path.is_relative_to(before):
            hint = f"mbf undo cannot go back to generation {before.name}; the current one is not affected"
        return InputError(f"{path}: damaged: {what}\nhint: {hint}")


def _is_unfinished(path: Path) -> bool:
    """Return whether a folder holds nothing but what a killed `StreamFolder.create` leaves."""
    for entry in path.iterdir():
        if entry.name == "generations":
            if not entry.is_dir() or {generation.name for generation in entry.iterdir()} - _EMPTY_STREAM:
                return False
        elif entry.name not in _BEFORE_IDENTITY or (entry.is_dir() and not entry.is_symlink()):
            return False
    return True


def _is_copy(folder: Path, original: Path) -> bool:
    """Return whether all that a folder holds stands in the original, too, byte for byte."""
    files = [path for path in folder.rglob("*") if path.is_symlink() or not path.is_dir()]
    originals = [original / path.relative_to(folder) for path in files]
    return all(
        one.is_file() and other.is_file() and filecmp.cmp(one, other, shallow=False)
        for one, other in zip(files, originals, strict=True)
    )


def _identity_damage(path: Path, what: str = "its content is not what was committed") -> InputError:
    return InputError(
        f"{path}: damaged: {what}"
        f"\nhint: mbf status {path.parent} --repair makes it again from a generation that is whole"
    )


def _record(data: Data) -> FileRecord:
    return FileRecord(bytes=len(data), sha256=sha256(data))


def _describe(holder: Path) -> str:
    try:
        owner = json.loads(holder.read_bytes())
        process, host, since = owner["process"], owner["host"], owner["since"]
    except (OSError, ValueError, KeyError, TypeError):
        return "another process"
    if host == socket.gethostname() and not _is_running(process):
        return "another process"  # the note is a dead holder's: the new one has not written its own yet
    return f"process {process} on {host} since {since}"


def _is_running(process: Any) -> bool:
    import psutil

    try:
        return isinstance(process, int) and psutil.pid_exists(process)
    except (OverflowError, ValueError):
        return False
