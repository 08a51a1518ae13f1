"""A base model's fingerprint: one sha256 over all its tensors, read from the safetensors files and cached.

The digest takes the tensors in the order of their names, whichever files hold them. For each it takes a line of JSON
with name, dtype and shape, a newline, and the tensor's bytes.
"""

import hashlib
import json
import os
import tempfile
from pathlib import Path
from typing import Any

from mbf_mlx.base.sources import weight_files
from mbf_mlx.files.safetensors_file import read_bytes, read_header

CACHE = ".mbf_fingerprint.json"  # beside the weights, or else in the user's cache folder
VERSION = 1  # changes when the hash takes something else


def fingerprint(folder: Path) -> str:
    """Return the sha256 of a model folder's tensors, in hexadecimal; cached while the files' sizes and times stay.

    Raises:
        InputError: no weights, or damaged ones.
    """
    files = weight_files(folder)
    key = _key(files)
    places = [folder / CACHE, _user_cache(folder)]
    for place in places:
        if found := _read_cache(place, key):
            return found
    digest = _digest(files)
    if _key(files) == key:  # otherwise a process is writing the files
        for place in places:
            if _write_cache(place, key, digest):
                break
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
    return {"version": VERSION, "files": [[name, stat.st_size, stat.st_mtime_ns] for name, stat in stats]}


def _user_cache(folder: Path) -> Path:
    root = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    name = hashlib.sha256(os.fsencode(folder.resolve())).hexdigest()[:32]
    return root / "mbf-mlx" / "fingerprints" / f"{name}.json"


def _read_cache(place: Path, key: dict[str, Any]) -> str | None:
    try:
        cached = json.loads(place.read_bytes())
        found = cached["sha256"] if cached["key"] == key else None
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return None
    return found if isinstance(found, str) and len(found) == 64 else None


def _write_cache(place: Path, key: dict[str, Any], digest: str) -> bool:
    """Try to cache the digest and return whether that worked; without a cache it only takes longer."""
    try:
        if place.name != CACHE:
            place.parent.mkdir(parents=True, exist_ok=True)
        handle, partial = tempfile.mkstemp(dir=place.parent, prefix=place.name)
        with open(handle, "w", encoding="utf-8") as file:
            json.dump({"sha256": digest, "key": key}, file)
        os.replace(partial, place)
    except OSError:
        return False
    return True
