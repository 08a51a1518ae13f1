"""Whether the files of a model folder are its own: regular files inside it, or the hub's cache beside it.

A folder from a stranger may hold a link to a private file of the user's, which an export would copy and pass on, or a
pipe, which nobody can read to its end.
"""

import os
import stat
from pathlib import Path

from mbf_mlx.errors import InputError

_TEMPLATES = "additional_chat_templates"  # the only folder inside a model folder that transformers reads


def check_own_files(folder: Path) -> None:
    """Check every file of a model folder, before any of them is copied.

    Raises:
        InputError: a link that leads out of the folder or nowhere, or a pipe, socket or device.
    """
    allowed = [Path(os.path.realpath(folder))]
    if folder.absolute().parent.name == "snapshots":  # the hub's cache: snapshots/COMMIT/NAME links to blobs/HASH
        allowed.append(Path(os.path.realpath(folder.absolute().parent.parent / "blobs")))
    for parent in (folder, folder / _TEMPLATES):
        for path in sorted(parent.iterdir()) if parent.is_dir() else []:
            _check(path, allowed)


def _check(path: Path, allowed: list[Path]) -> None:
    is_link = path.is_symlink()
    try:
        mode = path.stat().st_mode
    except OSError as error:
        if not is_link:
            raise
        nowhere = f"a link that leads nowhere ({os.readlink(path)})"
        raise _refused(path, nowhere, "copy the model again from its source") from error
    if stat.S_ISDIR(mode) and path.name != _TEMPLATES:
        return
    if not stat.S_ISREG(mode) and not stat.S_ISDIR(mode):
        raise _refused(path, "a pipe, socket or device", "remove it, or copy the model again from its source")
    target = Path(os.path.realpath(path))
    if is_link and not any(place in target.parents for place in allowed):
        raise _refused(
            path,
            f"a link to {target}, which is not part of the model",
            f"if you trust it, copy the folder with what its links lead to: cp -RL {path.parent} NEW-FOLDER",
        )


def _refused(path: Path, found: str, hint: str) -> InputError:
    return InputError(f"{path}: cannot use this model folder: expected a file of its own, got {found}\nhint: {hint}")
