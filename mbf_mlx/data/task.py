"""A task: its files, every row of them checked before anything is trained.

Everything wrong with a task is said at once. Which files belong to a task is found in task_files.py, a format is read
in formats.py, rows are kept in file_rows.py; tokens are left to encode.py.
"""

import hashlib
import json
import unicodedata
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from mbf_mlx.data.file_rows import FileRows, count_repeated, is_in, pick_share
from mbf_mlx.data.labels import Labels
from mbf_mlx.data.problems import Problems
from mbf_mlx.data.row import NAMES, Row
from mbf_mlx.data.row_hints import ALIASES
from mbf_mlx.data.scan import Scan
from mbf_mlx.data.task_files import default_name, find_splits, reader_of
from mbf_mlx.errors import InputError

HELD_OUT = 10  # without test rows, one row in this many is held out for scoring
MAX_NAME = 100  # characters
ANSWERS = ("completion", *ALIASES["completion"])  # keys that look like an answer to learn
TURNING = (
    "\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069"  # turn printed text around, which can disguise a name
)


@dataclass(frozen=True)
class Task:
    """A task whose every row was checked."""

    name: str
    path: Path
    format: str  # the kind of its rows: "prompt/completion", "messages" or "text"
    sha256: str  # over the contents of the splits' files; their paths do not count
    train: Sequence[Row]
    valid: Sequence[Row]  # empty where the task has none
    test: Sequence[Row]
    labels: tuple[str, ...] | str  # distinct completions, sorted; a hash if there are over 64; () for text rows
    warnings: tuple[str, ...]
    held_out: int  # test rows that were taken from the training file, because there was no test file


Report = Callable[[Path, int], None]  # called now and then with a file and how many of its bytes were read


def read_tasks(paths: Sequence[Path | str], *, report: Report = lambda file, offset: None) -> list[Task]:
    """Return the tasks at `paths`, in order.

    Raises:
        InputError: with everything that is wrong with any of them.
    """
    tasks, errors = [], []
    for path in paths:
        try:
            tasks.append(read_task(path, report=report))
        except InputError as error:
            errors.append(str(error))
    if errors:
        raise InputError("\n".join(errors))
    return tasks


def read_task(path: Path | str, *, name: str | None = None, report: Report = lambda file, offset: None) -> Task:
    """Return the task at `path`, with every row checked.

    Args:
        path: A file, or a folder with train.* and perhaps valid.* and test.*.
        name: What the stream calls the task; by default the name of the folder, or of the file without its ending.
        report: Called with the progress of reading a large file.

    Raises:
        InputError: with every bad row, as `file:line: reason`, and a row that would fit.
    """
    path = Path(path)
    warnings: list[str] = []
    files = find_splits(path, warnings)
    name = check_name(default_name(path) if name is None else name)
    problems = Problems()
    scans = _scan(files, problems, report)
    problems.raise_any(path)
    rows = {split: scan.rows() for split, scan in scans.items()}
    warnings += _odd_rows(rows, scans)
    held_out = _hold_out(rows, warnings)
    _drop_scored_rows(rows, path, warnings)
    warnings += _repeated_rows(rows)
    return Task(
        name=name,
        path=path,
        format=NAMES[problems.kind],
        sha256=_joined_hash(scans),
        train=rows["train"],
        valid=rows.get("valid", ()),
        test=rows.get("test", ()),
        labels=Labels.together([scan.labels for scan in scans.values()]),
        warnings=tuple(warnings),
        held_out=held_out,
    )


def find_again(name: str, path: Path, sha256: str, near: Path | None = None) -> Task | str:
    """Read a learned task again; if its files are gone, bad or changed, return that as a sentence.

    Args:
        name: The task's name.
        path: Where it was when it was learned.
        sha256: Its content, which decides.
        near: A folder that may have been moved together with the task: the stream's. The last parts of `path` are
            looked for in the folders around it, and in the working folder.
    """
    if not path.exists():
        for moved in _moved(path, near):
            task = find_again(name, moved, sha256)
            if isinstance(task, Task):
                return task
        return f"{name}: {path} is not there any more"
    try:
        task = read_task(path, name=name)
    except InputError as error:
        return f"{name}: {str(error).splitlines()[0]}"
    return task if task.sha256 == sha256 else f"{name}: {path} has changed since it was learned"


def _moved(path: Path, near: Path | None) -> list[Path]:
    """Return the places where a task may be now: the nearest first, its longest known path first."""
    around = [Path.cwd()] if near is None else [*list(near.absolute().parents)[:3], Path.cwd()]
    tails = [Path(*path.parts[-count:]) for count in range(min(4, len(path.parts) - 1), 0, -1)]
    places = dict.fromkeys(folder / tail for folder in around for tail in tails)
    return [place for place in places if place != path and place.exists()]


def check_name(name: str) -> str:
    """Return a task's name if it can be printed and told apart from others.

    Raises:
        InputError: the name is empty or too long, has slashes or control characters, or has white space around it.
    """
    kinds = ("Cc", "Cs", "Zl", "Zp")
    odd = [letter for letter in name if letter in f"/\\{TURNING}" or unicodedata.category(letter) in kinds]
    if not name.strip(".") or len(name) > MAX_NAME or odd or name != name.strip():
        raise InputError(
            f"task name {name[: MAX_NAME + 1]!r}: expected 1 to {MAX_NAME} letters without slashes, control characters "
            "or white space around them (--name gives a task another name)"
        )
    return name


def _scan(files: dict[str, Path], problems: Problems, report: Report) -> dict[str, Scan]:
    """Return the first pass over each split's file; bad files and bad rows go to `problems`."""
    scans: dict[str, Scan] = {}
    for split, file in files.items():
        try:
            scans[split] = Scan(reader_of(file), problems, partial(report, file))
        except InputError as error:
            problems.add_file(str(error))
    return scans


def _repeated_rows(rows: dict[str, FileRows]) -> list[str]:
    """Return warnings about rows that say what an earlier one says, among those that are used."""
    return [
        f"{found.file}: {count} of {_rows(len(found))} of {split} {_are(count, 'repeats', 'repeat')} an earlier one"
        for split, found in rows.items()
        if (count := count_repeated(found))
    ]


def _odd_rows(rows: dict[str, FileRows], scans: dict[str, Scan]) -> list[str]:
    """Return warnings about rows that are skipped, that go over several lines, or that hold what is not read."""
    odd: list[str] = []
    for scan in scans.values():
        file = scan.reader.file
        odd += scan.reader.notes()
        odd += [f"{file}: {_rows(count)} skipped: {why}" for why, count in scan.skipped.items()]
        if scan.unread:
            keys = ", ".join(f"{_plain(key)} ({_rows(count)})" for key, count in scan.unread.items())
            answer = rows["train"][0].kind == "text" and any(key in ANSWERS for key in scan.unread)
            hint = ' (to learn an answer, write "prompt" and "completion")' if answer else ""
            odd.append(f"{file}: not read: {keys}{hint}")
    return odd


def _hold_out(rows: dict[str, FileRows], warnings: list[str]) -> int:
    """Give a task without test rows a tenth of its training rows as test rows; return how many.

    They are chosen by what they say, so that another order of the file holds out the same rows.
    """
    if "test" in rows:
        return 0
    train = rows["train"]
    held = pick_share(train, HELD_OUT)
    if held.all():
        warnings.append(f"{train.file}: only one row, so none is held out and nothing will be scored")
        return 0
    rows["test"], rows["train"] = train.take(held), train.take(~held)
    return len(rows["test"])


def _drop_scored_rows(rows: dict[str, FileRows], path: Path, warnings: list[str]) -> None:
    """Drop from training the rows that the task is also tested or validated on."""
    for split in ("test", "valid"):
        if split in rows:
            both = is_in(rows["train"], rows[split])
            if count := int(both.sum()):
                rows["train"] = rows["train"].take(~both)
                verb = _are(count, "is", "are")
                warnings.append(f"{path}: {_rows(count)} of train {verb} also in {split}: left out of training")
    if "valid" in rows and "test" in rows and (count := int(is_in(rows["valid"], rows["test"]).sum())):
        warnings.append(f"{path}: {_rows(count)} of valid {_are(count, 'is', 'are')} also in test")
    if not len(rows["train"]):
        raise InputError(f"{path}: every row of train is also in test or valid: nothing is left to learn")


def _joined_hash(scans: dict[str, Scan]) -> str:
    files = "".join(f"{split} {scan.reader.sha256.hexdigest()}\n" for split, scan in scans.items())
    return hashlib.sha256(files.encode()).hexdigest()


def _plain(key: str) -> str:
    return key if key.isidentifier() else json.dumps(key[:40], ensure_ascii=False)


def _rows(count: int) -> str:
    return f"{count} {_are(count, 'row', 'rows')}"


def _are(count: int, one: str, many: str) -> str:
    return one if count == 1 else many
