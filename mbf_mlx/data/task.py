"""A task: the files that make it up, checked row by row before anything is trained.

A task is one file, or a folder with `train.*` and perhaps `valid.*` and `test.*`. Everything wrong with it is said at
once. How a format is read is in formats.py, how rows are kept in file_rows.py; tokens are left to encode.py.
"""

import hashlib
import os
import stat
import unicodedata
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from mbf_mlx.data.benchmark_formats import OLora, SuperNaturalInstructions
from mbf_mlx.data.file_rows import MAX_LABELS, Rows, lowest, repeated, standing_in
from mbf_mlx.data.formats import JsonLines, Reader, Table
from mbf_mlx.data.row import NAMES, Row
from mbf_mlx.data.scan import Problems, Scan
from mbf_mlx.data.text_file import open_binary
from mbf_mlx.errors import InputError

SPLITS = ("train", "valid", "test")
SUFFIXES = (".jsonl", ".csv", ".tsv", ".json")
HELD_OUT = 10  # one row in this many is held out for scoring where there are no test rows
MAX_NAME = 100  # letters
TURNING = "\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069"  # turn what is printed: a disguise

_KNOWN = "a .jsonl, .csv, .tsv or .json file"
_MEANT = {"training": "train", "validation": "valid", "val": "valid", "dev": "valid", "eval": "test", "testing": "test"}


@dataclass(frozen=True)
class Task:
    """A task whose every row was checked."""

    name: str
    path: Path
    format: str  # the kind of its rows: "prompt/completion", "messages" or "text"
    sha256: str  # over the splits' files, wherever they stand
    train: Sequence[Row]
    valid: Sequence[Row]  # empty where the task has none
    test: Sequence[Row]
    labels: tuple[str, ...] | str  # distinct completions, sorted; a hash where there are over 64; () for text rows
    warnings: tuple[str, ...]
    held_out: int  # test rows that were held out of the training file because there was no test file


Report = Callable[[Path, int], None]  # told now and then how many bytes of a file were read


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
    """Return the task at `path`, every row of it checked.

    Args:
        path: A file, or a folder with train.* and perhaps valid.* and test.*.
        name: What the stream calls the task; by default the name of the file (without its ending) or folder.
        report: Told how far the reading of a large file is.

    Raises:
        InputError: with every bad row, as `file:line: reason`, and a row that would fit.
    """
    path = Path(path)
    warnings: list[str] = []
    files = _split_files(path, warnings)
    name = _checked_name(path, name)
    problems = Problems()
    scans: dict[str, Scan] = {}
    for split, file in files.items():
        try:
            scans[split] = Scan(_reader_of(file), problems, partial(report, file))
        except InputError as error:
            problems.files.append(str(error))
    problems.raise_any(path)
    rows = {split: scan.rows() for split, scan in scans.items()}
    for split, found in rows.items():
        if count := repeated(found):
            warnings.append(
                f"{found.file}: {_rows(count)} of {split} {_are(count, 'repeats', 'repeat')} an earlier one"
            )
    for scan in scans.values():
        file = scan.reader.file
        warnings += [f"{file}: {_rows(count)} skipped: {why}" for why, count in scan.skipped.items()]
        for key, count in scan.unread.items():
            verb = _are(count, "has", "have")
            warnings.append(
                f'{file}: {_rows(count)} of "text" {verb} "{key}", too, which is not read: to learn it, '
                'write "prompt" and "completion"'
            )
    held_out = _hold_out(rows, warnings)
    _leave_out(rows, path, warnings)
    return Task(
        name=name,
        path=path,
        format=NAMES[problems.kind],
        sha256=_joined_hash(scans),
        train=rows["train"],
        valid=rows.get("valid", ()),
        test=rows.get("test", ()),
        labels=_labels(list(scans.values())),
        warnings=tuple(warnings),
        held_out=held_out,
    )


def find_again(name: str, path: Path, sha256: str) -> Task | str:
    """Return a learned task read again from where it was, or why it cannot be: its files are gone, bad or others."""
    if not path.exists():
        return f"{name}: {path} is not there any more"
    try:
        task = read_task(path, name=name)
    except InputError as error:
        return f"{name}: {str(error).splitlines()[0]}"
    return task if task.sha256 == sha256 else f"{name}: {path} has changed since it was learned"


def check_name(name: str) -> str:
    """Return a task's name where it can be printed and told apart.

    Raises:
        InputError: empty, too long, with slashes or control characters, or with white space around it.
    """
    kinds = ("Cc", "Cs", "Zl", "Zp")
    odd = [letter for letter in name if letter in f"/\\{TURNING}" or unicodedata.category(letter) in kinds]
    if not name.strip(".") or len(name) > MAX_NAME or odd or name != name.strip():
        raise InputError(
            f"task name {name[: MAX_NAME + 1]!r}: expected 1 to {MAX_NAME} letters without slashes, control characters "
            "or white space around them (--name gives a task another name)"
        )
    return name


def _checked_name(path: Path, name: str | None) -> str:
    if name is None:
        name = os.path.basename(os.path.abspath(path))
        if not path.is_dir():
            name = name.removesuffix(path.suffix)
    return check_name(name)


def _split_files(path: Path, warnings: list[str]) -> dict[str, Path]:
    """Return the file of each split that the task has."""
    try:
        is_folder = stat.S_ISDIR(path.stat().st_mode)
        entries = sorted((path if is_folder else path.absolute().parent).iterdir())
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        raise InputError(f"{path}: {reason} (a task is {_KNOWN}, or a folder with train.*)") from error
    splits = {split: [x for x in entries if _split_of(x) == split] for split in SPLITS}
    if not is_folder:
        if _split_of(path) == "train" and (beside := [x.name for x in (*splits["valid"], *splits["test"])]):
            warnings.append(f"{path}: {' and '.join(beside)} beside it not read: name the folder to use all of them")
        return {"train": path}
    for split, files in splits.items():
        if len(files) > 1:
            names = " and ".join(file.name for file in files)
            raise InputError(f"{path}: expected one {split} file, got {names} (keep one of them)")
    if not splits["train"]:
        raise InputError(f"{path}: expected a train file (train{', train'.join(SUFFIXES)}), {_instead(path, entries)}")
    for entry in entries:
        stem = entry.name.partition(".")[0].lower()
        meant = _MEANT.get(stem, stem)
        if meant in SPLITS and not splits[meant]:
            warnings.append(f"{entry}: not read: expected {meant}{f', {meant}'.join(SUFFIXES)}")
    return {split: files[0] for split, files in splits.items() if files}


def _split_of(file: Path) -> str | None:
    """Return the split that a file's name says, or None."""
    stem, _, suffix = file.name.lower().partition(".")
    return stem if stem in SPLITS and f".{suffix}" in SUFFIXES else None


def _instead(folder: Path, entries: list[Path]) -> str:
    """Return in words what a folder without a train file holds."""
    tasks = [x.name for x in entries if x.is_dir() and any(_split_of(y) == "train" for y in x.iterdir())]
    if tasks:
        return f"got a folder of tasks: name them one by one, as in {folder / tasks[0]}"
    files = [x.name for x in entries if not x.name.startswith(".")]
    return f"got {', '.join(files[:6])}{', …' if len(files) > 6 else ''}" if files else "got an empty folder"


def _reader_of(file: Path) -> Reader:
    """Return the reader of a file, told by its ending and, for .json, by its first letter."""
    suffix = file.suffix.lower()
    if suffix == ".jsonl":
        return JsonLines(file)
    if suffix in (".csv", ".tsv"):
        return Table(file)
    if suffix != ".json":
        raise InputError(f"{file}: expected {_KNOWN}, or a folder with train.*, got {suffix or 'no ending'}")
    with open_binary(file) as handle:
        begin = handle.read(4096).removeprefix(b"\xef\xbb\xbf").lstrip()
    line = begin.partition(b"\n")[0].rstrip()
    if begin.startswith(b"{") and line.endswith(b"}") and b'"Instances"' not in line and b'"Definition"' not in line:
        raise InputError(f"{file}: holds one JSON object a line: rename it to {file.with_suffix('.jsonl').name}")
    return OLora(file) if begin.startswith(b"[") else SuperNaturalInstructions(file)


def _hold_out(rows: dict[str, Rows], warnings: list[str]) -> int:
    """Give a task without test rows one in ten of its training rows, chosen by what they say; return how many."""
    if "test" in rows:
        return 0
    train = rows["train"]
    held = lowest(train, HELD_OUT)
    if held.all():
        warnings.append(f"{train.file}: only one row, so none is held out and nothing will be scored")
        return 0
    rows["test"], rows["train"] = train.take(held), train.take(~held)
    return len(rows["test"])


def _leave_out(rows: dict[str, Rows], path: Path, warnings: list[str]) -> None:
    """Take those rows out of training by which the task is scored or validated."""
    for split in ("test", "valid"):
        if split in rows:
            both = standing_in(rows["train"], rows[split])
            if count := int(both.sum()):
                rows["train"] = rows["train"].take(~both)
                verb = _are(count, "stands", "stand")
                warnings.append(f"{path}: {_rows(count)} of train {verb} in {split}, too: left out of training")
    if "valid" in rows and "test" in rows and (count := int(standing_in(rows["valid"], rows["test"]).sum())):
        warnings.append(f"{path}: {_rows(count)} of valid {_are(count, 'stands', 'stand')} in test, too")
    if not len(rows["train"]):
        raise InputError(f"{path}: every row of train stands in test or valid, too: nothing is left to learn")


def _joined_hash(scans: dict[str, Scan]) -> str:
    files = "".join(f"{split} {scan.reader.sha256.hexdigest()}\n" for split, scan in scans.items())
    return hashlib.sha256(files.encode()).hexdigest()


def _labels(scans: list[Scan]) -> tuple[str, ...] | str:
    labels = set[str]().union(*(scan.labels for scan in scans))
    if len(labels) <= MAX_LABELS:
        return tuple(sorted(labels))
    return f"{sum(scan.all_labels for scan in scans) % 2**128:032x}"


def _rows(count: int) -> str:
    return f"{count} {_are(count, 'row', 'rows')}"


def _are(count: int, one: str, many: str) -> str:
    return one if count == 1 else many
