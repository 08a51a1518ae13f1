"""Which files make up a task, and which reader takes each.

A task is one file, or a folder with `train.*` and perhaps `valid.*` and `test.*`.
"""

import os
import stat
from pathlib import Path

from mbf_mlx.data.benchmark_formats import OLora, SuperNaturalInstructions
from mbf_mlx.data.formats import JsonLines, Reader
from mbf_mlx.data.tables import CommaTable, TabTable
from mbf_mlx.data.text_file import open_binary
from mbf_mlx.errors import InputError

SPLITS = ("train", "valid", "test")
SUFFIXES = (".jsonl", ".csv", ".tsv", ".json")

_KNOWN = "a .jsonl, .csv, .tsv or .json file"
# What other tools call the splits.
_MEANT = {"training": "train", "validation": "valid", "val": "valid", "dev": "valid", "eval": "test", "testing": "test"}


def find_splits(path: Path, warnings: list[str]) -> dict[str, Path]:
    """Return the file of each split that the task at `path` has; files that look like one and are not read are named.

    Raises:
        InputError: there is no such path, two files for one split, or no train file.
    """
    try:
        is_folder = stat.S_ISDIR(path.stat().st_mode)
        entries = sorted((path if is_folder else path.absolute().parent).iterdir())
    except OSError as error:
        raise InputError(f"{path}: {error.strerror or error} (a task is {_KNOWN}, or a folder with train.*)") from error
    except ValueError as error:  # a NUL byte in the path
        raise InputError(f"{path}: {error} (a task is {_KNOWN}, or a folder with train.*)") from error
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


def default_name(path: Path) -> str:
    """Return a task's name if none is given: that of its folder, or of its file without the ending."""
    name = os.path.basename(os.path.abspath(path))
    return name if path.is_dir() else name.removesuffix(path.suffix)


def reader_of(file: Path) -> Reader:
    """Return the reader of a file, chosen by its ending and, for .json, by its first character.

    Raises:
        InputError: an unknown ending, or JSON lines in a .json file.
    """
    suffix = file.suffix.lower()
    if suffix == ".jsonl":
        return JsonLines(file)
    if suffix in (".csv", ".tsv"):
        return CommaTable(file) if suffix == ".csv" else TabTable(file)
    if suffix != ".json":
        raise InputError(f"{file}: expected {_KNOWN}, or a folder with train.*, got {suffix or 'no ending'}")
    with open_binary(file) as handle:
        begin = handle.read(4096).removeprefix(b"\xef\xbb\xbf").lstrip()
    line = begin.partition(b"\n")[0].rstrip()
    if begin.startswith(b"{") and line.endswith(b"}") and b'"Instances"' not in line and b'"Definition"' not in line:
        raise InputError(f"{file}: holds one JSON object a line: rename it to {file.with_suffix('.jsonl').name}")
    return OLora(file) if begin.startswith(b"[") else SuperNaturalInstructions(file)


def _split_of(file: Path) -> str | None:
    """Return the split that a file's name says, or None."""
    stem, _, suffix = file.name.lower().partition(".")
    return stem if stem in SPLITS and f".{suffix}" in SUFFIXES else None


def _instead(folder: Path, entries: list[Path]) -> str:
    """Say what a folder without a train file holds instead."""
    tasks = [x.name for x in entries if x.is_dir() and any(_split_of(y) == "train" for y in x.iterdir())]
    if tasks:
        return f"got a folder of tasks: name them one by one, as in {folder / tasks[0]}"
    files = [x.name for x in entries if not x.name.startswith(".")]
    return f"got {', '.join(files[:6])}{', …' if len(files) > 6 else ''}" if files else "got an empty folder"
