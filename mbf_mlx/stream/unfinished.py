"""What a killed creation of a stream leaves in its folder. Everything else there is the user's own."""

from pathlib import Path

from mbf_mlx.files.storage import read_file
from mbf_mlx.stream.lock import HOLDER, LOCK
from mbf_mlx.stream.records import IDENTITY

HALF_MADE = ("current.new", "adapter.new", f"{IDENTITY}.new", f"{HOLDER}.new")  # files and links
# These files and links, and in generations/ the empty stream.
_BEFORE_IDENTITY = {LOCK, HOLDER, "adapter", "current", *HALF_MADE}
_EMPTY_STREAM = {"000000", "building-000000"}


def is_unfinished(path: Path) -> bool:
    """Return whether a folder holds nothing but what a killed `StreamFolder.create` leaves."""
    for entry in path.iterdir():
        if entry.name == "generations":
            if not entry.is_dir() or {generation.name for generation in entry.iterdir()} - _EMPTY_STREAM:
                return False
        elif entry.name not in _BEFORE_IDENTITY or not _is_ours(entry):
            return False
    return True


def _is_ours(entry: Path) -> bool:
    """Return whether a file or link that has a name of ours also has our content; a user's own is left alone."""
    name, leads_to = entry.name.removesuffix(".new"), {"current": "generations", "adapter": "current"}
    if name in leads_to:
        return entry.is_symlink() and entry.readlink().parts[0] == leads_to[name]
    if entry.is_symlink() or not entry.is_file():
        return False
    data = read_file(entry)
    if name == LOCK:
        return not data
    ours = b'{"process": ' if name == HOLDER else b'{"base": '  # how our JSON begins; a killed write may end anywhere
    return data.startswith(ours) or ours.startswith(data)
