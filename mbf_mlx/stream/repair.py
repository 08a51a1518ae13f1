"""`mbf status --verify` and `--repair`: find every damaged file of a stream, and go back to what is undamaged."""

from collections.abc import Iterator
from pathlib import Path

from mbf_mlx.errors import InputError
from mbf_mlx.files.storage import Files, read_file
from mbf_mlx.stream.folder import StreamFolder
from mbf_mlx.stream.generations import RETRIES, SURE, Generation
from mbf_mlx.stream.records import IDENTITY, Identity, NewerFormatError, parse, read_identity


def verify_all(stream: StreamFolder) -> None:
    """Check every byte of the kept generations and of a task in training.

    Raises:
        InputError: a file does not hold what was written; the message names every such generation and save.
    """
    for attempt in range(RETRIES):
        mark = stream.generations.mark()
        problems = _problems(stream)
        if not problems or (stream.generations.mark() == mark and attempt >= SURE):
            break  # otherwise a writer may have changed the stream while we looked
    if problems:
        raise InputError("\n".join(problems))


def _problems(stream: StreamFolder) -> list[str]:
    found = []
    for read in (stream.current, stream.previous):
        try:
            if (generation := read()) is not None:
                stream.verify(generation)
                found += _not_finite(stream, generation)
        except InputError as error:
            found.append(str(error))
    return found + stream.saves.problems()


def _not_finite(stream: StreamFolder, generation: Generation) -> list[str]:
    from mbf_mlx.methods import not_finite

    bad = not_finite(stream.state_of(generation))
    return [f"{generation.folder}: holds numbers that are not finite, first in {bad[0]}"] if bad else []


def repair(path: Path, files: Files | None = None) -> str:
    """Make the newest undamaged generation the current one, restore stream.json from it, and say what was done.

    Raises:
        InputError: no generation is undamaged, or another process is writing.
    """
    files, problem = files or Files(), None
    for identity in _identities(path):
        if isinstance(identity, InputError):
            problem = problem or identity
            continue
        stream = StreamFolder(path, identity, files)
        with stream.writer(clean=False):
            try:
                return _repair(stream)
            except InputError as error:
                problem = problem or error
    raise problem or InputError(f"{path}: damaged: no undamaged generation is left in generations/")


def _identities(path: Path) -> Iterator[Identity | InputError]:
    """Yield what stream.json says, or why it cannot be read; then what its copies in the generations say."""
    try:
        yield read_identity(path)
    except NewerFormatError:
        raise
    except InputError as error:
        yield error
    for copy in sorted((path / "generations").glob(f"[0-9]*/{IDENTITY}"), reverse=True):
        try:
            yield parse(Identity, read_file(copy), copy)
        except (InputError, FileNotFoundError):
            continue


def _repair(stream: StreamFolder) -> str:
    """Repair a stream whose identity is known. Needs the lock."""
    generations = stream.generations
    done, before = [], generations.current_folder()
    try:
        generations.verify(generations.open(before))
        found = before
    except InputError:
        found = generations.newest_undamaged()
    try:
        same = read_identity(stream.path) == stream.identity
    except InputError:
        same = False
    if not same:
        stream.files.replace(stream.path / IDENTITY, stream.identity.to_json())
        done.append(f"restored {IDENTITY} from generation {found.name}")
    if found != before:
        generations.make_current(int(found.name))
        done.append(f"went back from generation {before.name}, which is damaged, to {found.name}")
    stream.clean()
    try:
        if (previous := stream.previous()) is not None:
            stream.verify(previous)
        undo = ""
    except InputError:
        undo = "; the one before is damaged and cannot be restored, so the last task cannot be undone"
    if not done:
        return f"{stream.path}: nothing to repair: its current generation is undamaged{undo}"
    count = stream.current().manifest.t
    return f"{stream.path}: {', and '.join(done)}; it has learned {count} task{'' if count == 1 else 's'}{undo}"
