"""The place of an export: nothing is replaced without --force, foreign files never are, and no export is half written.

An export is written beside its place, flushed to the disk and renamed when it is complete. A folder that we wrote holds
`mbf_export.json`, which lists its files; we replace only a folder that holds nothing else.
"""

import glob
import itertools
import json
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from mbf_mlx.errors import InputError, quoted
from mbf_mlx.files.storage import Files, read_file, refusal, require_space

LISTING = "mbf_export.json"
LICENCES = ("LICEN[CS]E*", "NOTICE*", "USE_POLICY*")  # files of a base that are copied into its exports
SPARE_BYTES = 16 << 20  # disk space that an export leaves free
LITTER = (".DS_Store", "Thumbs.db", "desktop.ini")  # what file managers leave in every folder that they have shown
_FILES = Files()
_OLD = "-old"  # ends the name of an earlier export while the new one takes its place


@contextmanager
def fresh_folder(out: Path, *, force: bool = False, needs: int = 0, forbidden: tuple[Path, ...] = ()) -> Iterator[Path]:
    """Give a new empty folder; it becomes `out` when the block succeeds, and is removed otherwise.

    Args:
        out: The folder to make.
        force: Replace an earlier export there.
        needs: Bytes that will be written.
        forbidden: Folders that `out` must be neither in nor around: the stream, the base.

    Raises:
        InputError: `out` exists (without force, or with files that we did not export), is in a forbidden place, or does
            not fit on the disk.
    """
    _recover(out)
    check_folder_place(out, force=force, needs=needs, forbidden=forbidden)
    partial = _partial(out)
    try:
        _FILES.make_folder(partial)
        yield partial
        _write_listing(partial)
        for path in sorted(partial.rglob("*")):
            _FILES.sync_folder(path) if path.is_dir() else _FILES.sync_file(path)
        _FILES.sync_folder(partial)
        _replace(partial, out, force, _folder_is_ours)
    except OSError as error:
        raise refusal(error, out, needs) from error
    finally:
        _discard(partial)


@contextmanager
def fresh_file(
    out: Path,
    *,
    force: bool = False,
    needs: int = 0,
    forbidden: tuple[Path, ...] = (),
    is_ours: Callable[[Path], bool] = lambda path: False,
) -> Iterator[Path]:
    """Give the path of a new file; it becomes `out` when the block succeeds, and is removed otherwise.

    Arguments and errors are those of `fresh_folder`; `is_ours` tells whether we exported an existing file.
    """
    _recover(out)
    check_place(out, force=force, needs=needs, forbidden=forbidden, is_ours=is_ours)
    partial = _partial(out)
    try:
        yield partial
        _FILES.sync_file(partial)
        _replace(partial, out, force, is_ours)
    except OSError as error:
        raise refusal(error, out, needs) from error
    finally:
        _discard(partial)


def check_folder_place(out: Path, *, force: bool = False, needs: int = 0, forbidden: tuple[Path, ...] = ()) -> None:
    """Raise InputError if `fresh_folder` would refuse `out`; to be called before long work."""
    check_place(out, force=force, needs=needs, forbidden=forbidden, is_ours=_folder_is_ours)


def check_place(
    out: Path, *, force: bool, needs: int, forbidden: tuple[Path, ...], is_ours: Callable[[Path], bool]
) -> None:
    """Raise InputError if nothing may be written to `out`, for the reasons of `fresh_folder`."""
    place = out.absolute()
    for other in forbidden:
        inside, around = (
            Path(os.path.realpath(path)) for path in (place, other)
        )  # unlike Path.resolve, it stands links that lead in a circle
        if inside == around or around in inside.parents or inside in around.parents:
            raise InputError(f"{out}: an export must be neither inside nor around {other}; choose another place")
    if not place.parent.is_dir():
        make = f"mkdir -p {quoted(out.parent)}"
        raise InputError(f"{out}: expected its parent folder to exist, got none; make it first: {make}")
    if os.path.lexists(out):
        if not force:
            raise InputError(f"{out} exists; choose another place, or replace an earlier export with --force")
        if out.is_symlink() or not is_ours(out):
            raise InputError(
                f"{out} is no export of ours, or holds other files, too; we leave it as it is: move it away"
            )
    require_space(place.parent, needs + SPARE_BYTES, "the export")


def _folder_is_ours(folder: Path) -> bool:
    try:
        listed = set(json.loads(read_file(folder / LISTING))["files"])
    except (OSError, ValueError, KeyError, TypeError):
        return False
    files = (path for path in folder.rglob("*") if not path.is_dir() and path.name not in LITTER)
    return all(path.relative_to(folder).as_posix() in listed for path in files)


def _partial(out: Path) -> Path:
    """Return the temporary path beside `out` that is written first."""
    place = out.absolute()
    return place.parent / f".{place.name}.mbf-{os.getpid()}"


def _recover(out: Path) -> None:
    """Clean up after killed exports to `out`: an earlier export gets its name back, temporary files are removed."""
    place = out.absolute()
    for stale in sorted(place.parent.glob(f".{glob.escape(place.name)}.mbf-*")):
        name = stale.name.removesuffix(_OLD)
        digits = name.rpartition("-")[2]
        if not digits.isdigit() or (int(digits) != os.getpid() and _is_running(int(digits))):
            continue
        if name != stale.name and not os.path.lexists(place):
            _FILES.rename(stale, place)
        else:
            _FILES.remove(stale)


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
    _FILES.remove(folder / LISTING)
    _FILES.write(folder / LISTING, (json.dumps(document, indent=2) + "\n").encode())


def read_listing(folder: Path) -> dict[str, Any]:
    """Return the contents of a folder's `mbf_export.json`; empty if there is none."""
    path = folder / LISTING
    return dict(json.loads(path.read_text(encoding="utf-8"))) if path.is_file() else {}


def _replace(partial: Path, out: Path, force: bool, is_ours: Callable[[Path], bool]) -> None:
    """Let a finished export have its place. What is there by now is looked at once more: minutes have passed.

    Raises:
        InputError: something is there that was not there before, or an earlier export holds other files now; the export
            has another name then.
    """
    place, old = out.absolute(), partial.with_name(f"{partial.name}{_OLD}")
    if os.path.lexists(place):
        if not force:
            raise _moved_aside(partial, out, "something was put there")
        if place.is_file() and not place.is_symlink():
            if not is_ours(place):
                raise _moved_aside(partial, out, "a file that we did not export was put there")
            _FILES.rename(partial, place)  # one step: there is the old file, or the new one
            _FILES.sync_folder(place.parent)
            return
        _FILES.rename(place, old)  # nobody adds to it by its name from here on
        try:
            if old.is_symlink() or not is_ours(old):
                raise _moved_aside(partial, out, "files that we did not export were put there")
            _FILES.rename(partial, place)
            _FILES.sync_folder(place.parent)
        except (InputError, OSError):
            if os.path.lexists(place):
                _FILES.rename(place, partial)
            _FILES.rename(old, place)
            raise
        _discard(old)
    else:
        _FILES.rename(partial, place)
        _FILES.sync_folder(place.parent)


def _moved_aside(partial: Path, out: Path, what: str) -> InputError:
    """Give an export that cannot have its place another name, and return the error that says so."""
    names = (out.with_name(f"{out.stem}-{number}{out.suffix}") for number in itertools.count(2))
    spare = next(name for name in names if not os.path.lexists(name))
    _FILES.rename(partial, spare)
    return InputError(f"{out}: {what} while the export was written, and stays as it is; the export is {spare}")


def _discard(path: Path) -> None:
    try:
        _FILES.remove(path)
    except (InputError, OSError):
        pass  # the next export to this place tries again
