"""The generations of a stream: how one is written, checked and read, and the link that says which one counts.

A generation is a folder, `generations/000007/`. It is written as `building-000007/` and renamed when it is complete.
`current` links to the generation that counts. Replacing that link is the only commit. Errors name the damaged file.
Whoever writes must hold the stream's lock; this file does not take it.
"""

import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from mbf_mlx import __version__
from mbf_mlx.adapters.layout import CONFIG, WEIGHTS
from mbf_mlx.errors import InputError, quoted
from mbf_mlx.files.storage import (
    Data,
    Files,
    read_file,
    read_large,
    refusal,
    require_space,
    sha256,
    sha256_file,
)
from mbf_mlx.stream.records import (
    ALL_SCORED,
    CHANGED,
    FORMAT_VERSION,
    HISTORY,
    IDENTITY,
    LONG_FORMAT_VERSION,
    MANIFEST,
    STATE,
    TASK_SCORES,
    FileRecord,
    Identity,
    Manifest,
    NewerFormatError,
    identity_damage,
    parse,
)

if TYPE_CHECKING:  # importing it loads NumPy, and `mbf status` must answer at once
    from mbf_mlx.methods import State

# Of a generation, without its manifest.
FILES = (IDENTITY, HISTORY, TASK_SCORES, STATE, f"adapter/{WEIGHTS}", f"adapter/{CONFIG}")
SMALL_FILE = 1 << 20  # bytes; smaller files are hashed at every opening, larger ones when they are read
RETRIES = 20  # how often a reader looks again when a writer removes the generation that it reads
SURE = 2  # after so many looks at an unchanged stream a problem is damage, not a writer at work

T = TypeVar("T")


@dataclass(frozen=True)
class Generation:
    """One complete generation. It was checked when it was opened."""

    folder: Path
    manifest: Manifest

    @property
    def number(self) -> int:
        """Its place among the stream's generations; 0 is the empty stream."""
        return self.manifest.generation


@dataclass(frozen=True)
class HistoryFiles:
    """The record of a stream's tasks as a generation keeps it. history.py makes and reads it."""

    newest: bytes = b""  # the lines of the newest tasks, or of all of them
    earlier: tuple[FileRecord, ...] = ()  # files outside of the generation, with the lines of the tasks before
    table: Data | None = None  # scores of all tasks, where `earlier` has some

    def contents(self) -> dict[str, Data]:
        """Return the files inside the generation."""
        return {HISTORY: self.newest} | ({} if self.table is None else {TASK_SCORES: self.table})


class Generations:
    """The generations of one stream.

    Args:
        path: The stream's folder.
        identity: What the stream's generations must agree with.
        files: The file operations to write with.
    """

    def __init__(self, path: Path, identity: Identity, files: Files) -> None:
        self.path, self.identity, self.files = path, identity, files

    # Finding

    def folder(self, number: int) -> Path:
        """Return the folder of a generation, which need not exist."""
        return self.path / "generations" / f"{number:06d}"

    def current_folder(self) -> Path:
        """Return the folder that `current` names; without a readable link, that of the newest undamaged generation.

        Raises:
            InputError: there is no link and no undamaged generation.
        """
        number = self._linked_number()
        return self.newest_undamaged() if number is None else self.folder(number)

    def _linked_number(self) -> int | None:
        """Return the generation that `current` names as a link, or as the text file that some copies make of it."""
        link = self.path / "current"
        target = ""
        try:
            if link.is_symlink():
                target = os.readlink(link)
            elif link.is_file() and link.stat().st_size < 100:
                target = link.read_text(errors="replace").strip()
        except FileNotFoundError:
            pass  # a text file that a writer replaces right now; the caller takes the newest generation
        number = target.removeprefix("generations/")
        return int(number) if number.isascii() and number.isdigit() and len(number) < 10 else None

    def numbers(self) -> list[int]:
        """Return the numbers of the generations that exist, newest first."""
        names = [folder.name for folder in (self.path / "generations").glob("*")]
        return sorted((int(name) for name in names if name.isascii() and name.isdigit()), reverse=True)

    def newest_undamaged(self) -> Path:
        """Return the folder of the newest generation in which every byte is as committed.

        Raises:
            InputError: there is none.
        """
        for number in self.numbers():
            try:
                self.verify(self.open(self.folder(number)))
            except InputError:
                continue
            return self.folder(number)
        raise InputError(f"{self.path}: damaged: no undamaged generation is left in generations/")

    # Reading

    def read(self, action: Callable[[Generation], T]) -> T:
        """Return `action(current generation)`. It is tried again if a writer replaces the generation meanwhile.

        Raises:
            InputError: the current generation is damaged, or the action raised this.
        """
        for attempt in range(RETRIES):
            mark = self.mark()
            try:
                return action(self.open(mark[0]))
            except InputError:
                # A writer may have removed or rewritten this generation between our two looks.
                if self.mark() == mark and (mark[1] or attempt >= SURE):
                    raise
                time.sleep(0.01 * attempt)
        raise InputError(f"{self.path}: its generations change faster than they can be read; try again")

    def mark(self) -> tuple[Path, tuple[int, int] | None]:
        """Return the current generation's folder, and what changes if it is undone and written again."""
        folder = self.current_folder()
        try:
            found = os.stat(folder)
        except OSError:
            return folder, None
        return folder, (found.st_ino, found.st_ctime_ns)

    def open(self, folder: Path) -> Generation:
        """Open a generation after the fast check: the sizes of all files, the content of the small ones.

        Raises:
            InputError: it is damaged, or written in a newer format.
        """
        manifest = self._manifest(folder)
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

    def _manifest(self, folder: Path) -> Manifest:
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
            raise self._damage(where, CHANGED)
        if manifest.stream != self.identity.id:
            raise self._damage(folder, "it belongs to another stream")
        if outside := [name for name in manifest.files if name not in FILES]:
            raise self._damage(where, f"files: expected names inside the generation, got {outside[0]!r}")
        if f"{manifest.generation:06d}" != folder.name:
            raise self._damage(folder, f"it holds generation {manifest.generation}")
        if IDENTITY in manifest.files and manifest.files[IDENTITY] != _record(self.identity.to_json()):
            raise identity_damage(self.path / IDENTITY)
        return manifest

    def verify(self, generation: Generation) -> None:
        """Check the content of the large files, which opening leaves out.

        Raises:
            InputError: a file does not hold what was committed.
        """
        for name, record in generation.manifest.files.items():
            if record.bytes >= SMALL_FILE:
                self._check_content(generation.folder / name, record)

    def _check_content(self, path: Path, record: FileRecord) -> None:
        try:
            same = sha256_file(path) == record.sha256
        except FileNotFoundError:
            raise self._damage(path, "missing") from None
        except OSError as error:
            raise refusal(error, path, verb="read") from error
        if not same:
            raise self._damage(path, CHANGED)

    def content(self, generation: Generation, name: str) -> memoryview:
        """Return the bytes of one file of a generation.

        Raises:
            InputError: they are not what was committed.
        """
        path = generation.folder / name
        try:
            data = read_large(path)
        except FileNotFoundError:
            raise self._damage(path, "missing") from None
        record = generation.manifest.files.get(name)
        if record is None or sha256(data) != record.sha256:
            raise self._damage(path, CHANGED)
        return data

    def _damage(self, path: Path, what: str) -> InputError:
        hint = f"mbf status {quoted(self.path)} --repair goes back to the previous generation, if that one is undamaged"
        before = self.folder((self._linked_number() or 0) - 1)
        if path.is_relative_to(before):
            hint = f"mbf undo cannot go back to generation {before.name}; the current one is not affected"
        return InputError(f"{path}: damaged: {what}\nhint: {hint}")

    # Writing

    def write(
        self, number: int, state: "State", history: HistoryFiles, base_path: str, settings: dict[str, Any]
    ) -> None:
        """Write a generation; the caller makes it the current one.

        Args:
            number: Its number.
            state: The stream's state after the last task.
            history: The record of all tasks.
            base_path: Where the base model lies.
            settings: What the last task was learned with.

        Raises:
            InputError: it does not fit on the disk, or cannot be written; nothing of it is left.
        """
        from concurrent.futures import ThreadPoolExecutor  # `mbf status` writes nothing and starts faster without

        from mbf_mlx.stream import state_files

        identity = self.identity
        contents = {IDENTITY: identity.to_json(), **history.contents(), **state_files.contents(state, identity)}
        require_space(self.path, sum(map(len, contents.values())) + (1 << 16), "a commit")
        building = self.path / "generations" / f"building-{number:06d}"
        self.files.discard(building)
        try:
            self.files.make_folder(building / "adapter")
            with ThreadPoolExecutor() as pool:
                records = pool.map(_record, contents.values())  # hashed while the files are written
                for name, data in contents.items():
                    self.files.write(building / name, data)
            manifest = Manifest(
                format_version=FORMAT_VERSION if state.t <= ALL_SCORED else LONG_FORMAT_VERSION,
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
                base_files=self._base_files(base_path),
                earlier=history.earlier,
            ).sealed()
            self.files.write(building / MANIFEST, manifest.to_json())
            self.files.sync_folder(building / "adapter")
            self.files.sync_folder(building)
            self.files.rename(building, self.folder(number))
            self.files.sync_folder(self.path / "generations")
        except BaseException:
            self.files.discard(building)
            raise

    def _base_files(self, base_path: str) -> dict[str, str]:
        """Return the hashes of the base's settings and tokenizer: those written down before, or else of its files now.

        A base that is not there, as when a task tuned elsewhere is absorbed, has none; a later generation takes them.
        """
        from mbf_mlx.base.decisive_files import decisive_files

        number = self._linked_number()
        try:
            known = {} if number is None else self.open(self.folder(number)).manifest.base_files
        except InputError:  # a killed creation has left its link
            known = {}
        if known:
            return known
        try:
            return decisive_files(Path(base_path)) if base_path and Path(base_path).is_dir() else {}
        except (InputError, OSError):
            return {}

    def make_current(self, number: int) -> None:
        """Let a generation count from now on: the commit itself."""
        self.files.replace_link(self.path / "current", f"generations/{number:06d}")

    def remove_old(self, current: int) -> None:
        """Remove all generations but the current one and the one before.

        A generation is renamed before it is removed, so that a folder with a generation's name is always complete.
        """
        keep = {self.folder(current).name, self.folder(current - 1).name}
        for folder in sorted((self.path / "generations").iterdir()):
            if folder.name in keep:
                continue
            doomed = folder.with_name(f"removing-{folder.name}")
            if not folder.name.startswith("removing-"):
                self.files.remove(doomed)
                self.files.rename(folder, doomed)
            self.files.remove(doomed if doomed.exists() else folder)


def _record(data: Data) -> FileRecord:
    return FileRecord(bytes=len(data), sha256=sha256(data))
