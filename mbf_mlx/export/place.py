"""Where an export goes: never over something without --force, never over files we did not write, all of it or nothing.

An export is written into a neighbour of its place and renamed when it is complete. A folder that we wrote holds
`mbf_export.json`, which lists its files; only a folder that holds nothing else is ever replaced.
"""

import glob
import json
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from mbf_mlx.errors import InputError
from mbf_mlx.storage import refusal, require_space

LISTING = "mbf_export.json"
SPARE_BYTES = 16 << 20  # of disk that an export leaves free


@contextmanager
def fresh_folder(out: Path, *, force: bool = False, needs: int = 0, forbidden: tuple[Path, ...] = ()) -> Iterator[Path]:
    """Give a new empty folder to write into; when the block ends well it becomes `out`, else it is removed.

    Args:
        out: The folder to make.
        force: Replace an earlier export there.
        needs: Bytes that will be written.
        forbidden: Folders that `out` must lie neither in nor around: the stream, the base.

    Raises:
        InputError: `out` exists (without force, or with files that no export of ours wrote), lies in the wrong place,
            or does not fit on the disk.
    """
    check_folder_place(out, force=force, needs=needs, forbidden=forbidden)
    partial = _partial(out)
    try:
        partial.mkdir()
        yield partial
        _write_listing(partial)
        _replace(partial, out)
    except OSError as error:
        raise refusal(error, out, needs) from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)


@contextmanager
def fresh_file(
    out: Path,
    *,
    force: bool = False,
    needs: int = 0,
    forbidden: tuple[Path, ...] = (),
    is_ours: Callable[[Path], bool] = lambda path: False,
) -> Iterator[Path]:
    """Give the path of a new file to write; when the block ends well it becomes `out`, else it is removed.

    Arguments and errors are those of `fresh_folder`; `is_ours` tells whether an existing file is an export of ours.
    """
    check_place(out, force=force, needs=needs, forbidden=forbidden, is_ours=is_ours)
    partial = _partial(out)
    try:
        yield partial
        _replace(partial, out)
    except OSError as error:
        raise refusal(error, out, needs) from error
    finally:
        partial.unlink(missing_ok=True)


def check_folder_place(out: Path, *, force: bool = False, needs: int = 0, forbidden: tuple[Path, ...] = ()) -> None:
    """Raise InputError if no folder may be written to `out`; see `fresh_folder`. For a look ahead of long work."""
    check_place(out, force=force, needs=needs, forbidden=forbidden, is_ours=_folder_is_ours)


def check_place(
    out: Path, *, force: bool, needs: int, forbidden: tuple[Path, ...], is_ours: Callable[[Path], bool]
) -> None:
    """Raise InputError if nothing may be written to `out`; see `fresh_folder`."""
    place = out.absolute()
    for other in forbidden:
        inside, around = place.resolve(), other.resolve()
        if inside == around or around in inside.parents or inside in around.parents:
            raise InputError(f"{out}: an export goes beside {other}, neither into nor around it; choose another place")
    if not place.parent.is_dir():
        raise InputError(f"{out}: expected its parent folder to exist, got none; make it first: mkdir -p {out.parent}")
    if os.path.lexists(out):
        if not force:
            raise InputError(f"{out} exists; choose another place, or replace an earlier export with --force")
        if out.is_symlink() or not is_ours(out):
            raise InputError(
                f"{out} is no export of ours, or holds other files, too; it is left as it is: move it away"
            )
    require_space(place.parent, needs + SPARE_BYTES, "the export")


def _folder_is_ours(folder: Path) -> bool:
    try:
        listed = set(json.loads((folder / LISTING).read_text(encoding="utf-8"))["files"])
    except (OSError, ValueError, KeyError, TypeError):
        return False
    return all(path.relative_to(folder).as_posix() in listed for path in folder.rglob("*") if not path.is_dir())


def _partial(out: Path) -> Path:
    """Return the neighbour that is written first, after removing what killed runs of ours left of theirs."""
    place = out.absolute()
    for stale in place.parent.glob(f".{glob.escape(place.name)}.mbf-*"):
        digits = stale.name.rpartition("-")[2]
        if digits.isdigit() and (int(digits) == os.getpid() or not _is_running(int(digits))):
            shutil.rmtree(stale) if stale.is_dir() else stale.unlink()
    return place.parent / f".{place.name}.mbf-{os.getpid()}"


def _is_running(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except OSError:
        return True
    return True


def _write_listing(folder: Path) -> None:
    document = read_listing(folder)
    files = {path.relative_to(folder).as_posix() for path in folder.rglob("*") if not path.is_dir()}
    document["files"] = sorted(files | {LISTING})
    (folder / LISTING).write_text(json.dumps(document, indent=2) + "\n", encoding="utf-8")


def read_listing(folder: Path) -> dict[str, Any]:
    """Return what `mbf_export.json` of a folder says, or nothing where there is none."""
    path = folder / LISTING
    return dict(json.loads(path.read_text(encoding="utf-8"))) if path.is_file() else {}


def _replace(partial: Path, out: Path) -> None:
    place = out.absolute()
    if place.is_dir():  # a folder cannot be renamed over one that holds files
        old = partial.with_name(f"{partial.name}-old")
        place.rename(old)
        partial.rename(place)
        shutil.rmtree(old)
    else:
        partial.replace(place)
