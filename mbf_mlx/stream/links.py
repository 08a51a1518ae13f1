"""The links of a stream, `current` and `adapter`, which a copy may have lost, and which some disks cannot hold."""

import filecmp
import os
from pathlib import Path

from mbf_mlx.errors import InputError
from mbf_mlx.files.storage import lacks_links, read_file
from mbf_mlx.stream.generations import Generations


def are_right(generations: Generations) -> bool:
    """Return whether the links lead where they should; where a disk has no links, texts that say so will do."""
    path = generations.path
    leads = {"current": f"generations/{generations.current_folder().name}", "adapter": "current/adapter"}
    try:
        if all(os.readlink(path / name) == target for name, target in leads.items()):
            return True
    except OSError:
        pass
    try:
        texts = all(read_file(path / name) == target.encode() for name, target in leads.items())
    except (InputError, OSError):
        return False
    return texts and lacks_links(path)


def restore(generations: Generations) -> None:
    """Make the links again. A copying program may have put the folders there that they led to. Needs the lock.

    Such a folder is replaced only if it holds nothing but a generation's own files.
    """
    target = f"generations/{generations.current_folder().name}"
    for name, leads, inside in (("current", target, ""), ("adapter", "current/adapter", "adapter")):
        place = generations.path / name
        if place.is_dir() and not place.is_symlink():
            if not any(_is_copy(place, generations.folder(number) / inside) for number in generations.numbers()):
                return  # the user put something there; the stream can be read without its links
            generations.files.remove(place)
        generations.files.replace_link(place, leads)


def _is_copy(folder: Path, original: Path) -> bool:
    """Return whether every file of a folder is in the original, too, with the same bytes."""
    files = [path for path in folder.rglob("*") if path.is_symlink() or not path.is_dir()]
    originals = [original / path.relative_to(folder) for path in files]
    return all(
        one.is_file() and other.is_file() and filecmp.cmp(one, other, shallow=False)
        for one, other in zip(files, originals, strict=True)
    )
