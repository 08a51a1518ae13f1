"""A base model's fingerprint: one sha256 over all its tensors, read from the safetensors files and cached.

The digest takes the tensors in the order of their names, whichever files hold them. For each it takes a line of JSON
with name, dtype and shape, a newline, and the tensor's bytes.

The cache lies in the user's cache folder and nowhere else, as a model folder from a stranger could bring a wrong one.
It counts only for the very same files, unchanged: the system sets a file's ctime itself at every change.
"""

import hashlib
import json
import os
import tempfile
import time
from pathlib import Path
from typing import Any

from mbf_mlx.base.caches import user_caches
from mbf_mlx.base.sources import weight_files
from mbf_mlx.files.safetensors_file import read_bytes, read_header

VERSION = 2  # changes when the hash, or what the cache compares, takes something else
SETTLED_NS = 2_000_000_000  # a change just before the hash was taken may have the ctime of one just after it


def fingerprint(folder: Path) -> str:
    """Return the sha256 of a model folder's tensors, in hexadecimal; cached while nothing touches the files.

    Raises:
        InputError: no weights, or damaged ones.
    """
    files = weight_files(folder)
    key, place = _key(files), _cache_of(folder)
    if place and (found := _read_cache(place, key)):
        return found
    begin = time.time_ns()
    digest = _digest(files)
    settled = max(ctime for *_, ctime in key["files"]) < begin - SETTLED_NS
    if place and settled and _key(files) == key:  # otherwise a process is writing the files
        _write_cache(place, key, digest)
    return digest


def _digest(files: list[Path]) -> str:
    tensors = [(name, path, entry) for path in files for name, entry in read_header(path)[0].items()]
    digest = hashlib.sha256()
    for name, path, entry in sorted(tensors, key=lambda tensor: tensor[0]):
        digest.update(json.dumps([name, entry.dtype, list(entry.shape)]).encode() + b"\n")
        for chunk in read_bytes(path, entry):
            digest.update(chunk)
    return digest.hexdigest()


def _key(files: list[Path]) -> dict[str, Any]:
    stats = [(path.name, path.stat()) for path in files]
    return {
        "version": VERSION,
        "files": [
            [name, stat.st_dev, stat.st_ino, stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns] for name, stat in stats
        ],
    }


def _cache_of(folder: Path) -> Path | None:
    """Return the file that may hold a folder's fingerprint; None for a user without a folder for caches."""
    root = user_caches()
    name = hashlib.sha256(os.fsencode(os.path.realpath(folder))).hexdigest()[:32]
    return root / "mbf-mlx" / "fingerprints" / f"{name}.json" if root else None


def _read_cache(place: Path, key: dict[str, Any]) -> str | None:
    try:
        cached = json.loads(place.read_bytes())
        found = cached["sha256"] if cached["key"] == key else None
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return None
    return found if isinstance(found, str) and len(found) == 64 else None


def _write_cache(place: Path, key: dict[str, Any], digest: str) -> None:
    """Try to cache the digest; without a cache it only takes longer."""
    try:
        place.parent.mkdir(parents=True, exist_ok=True)
        handle, partial = tempfile.mkstemp(dir=place.parent, prefix=place.name)
        with open(handle, "w", encoding="utf-8") as file:
            json.dump({"sha256": digest, "key": key}, file)
        os.replace(partial, place)
    except OSError:
        return
