"""The few file operations that a stream and an export stand on, each one durable when it returns.

One small layer, so that tests can make every single operation fail, and so that a full disk, a read-only folder or a
missing permission reads the same everywhere. It knows no format.
"""

import errno
import hashlib
import mmap
import os
import shutil
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from io import BufferedReader
from pathlib import Path

from mbf_mlx.errors import InputError

_SPACE = "free some space and run the command again; nothing was lost"
_RIGHTS = "change the permissions of the folder, or copy it to a place you can write to"
_PATH = "choose another path"
# errno -> (what it means, what to do); every other one is a bug of ours
_REASONS = {
    errno.ENOSPC: ("the disk is full", _SPACE),
    errno.EDQUOT: ("the disk quota is used up", _SPACE),
    errno.EFBIG: ("the file would be larger than is allowed here", "raise the limit (ulimit -f), or use another disk"),
    errno.EROFS: ("the file system is read-only", "copy the folder to a place you can write to"),
    errno.EACCES: ("permission is missing", _RIGHTS),
    errno.EPERM: ("permission is missing", _RIGHTS),
    errno.EIO: ("the disk reports an error", "copy what can still be read to another disk"),
    errno.ELOOP: ("its links lead in a circle", _PATH),
    errno.ENAMETOOLONG: ("the name is too long", _PATH),
    errno.ENOTDIR: ("a part of the path is a file", _PATH),
    errno.EISDIR: ("a folder is there", _PATH),
    errno.EEXIST: ("something else is there", _PATH),
    errno.ENOENT: ("no such file or folder", _PATH),
}


Data = bytes | memoryview  # of a file


class Files:
    """File operations that are on the disk when they return; an environment's refusal becomes an InputError."""

    def write(self, path: Path, data: Data) -> None:
        """Write a new file and flush it to the disk."""
        try:
            with open(path, "xb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
        except OSError as error:
            raise refusal(error, path, len(data)) from error

    def make_folder(self, path: Path) -> None:
        """Create a folder and those above it; one that is there is kept."""
        try:
            path.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise refusal(error, path) from error

    def sync_file(self, path: Path) -> None:
        """Flush to the disk what somebody else wrote into a file."""
        try:
            with open(path, "rb") as file:
                os.fsync(file.fileno())
        except OSError as error:
            raise refusal(error, path) from error

    def sync_folder(self, path: Path) -> None:
        """Flush a folder's list of names to the disk."""
        try:
            handle = os.open(path, os.O_RDONLY)
            try:
                os.fsync(handle)
            finally:
                os.close(handle)
        except OSError as error:
            # Some network and FUSE file systems cannot flush a folder; their own order of operations has to do.
            if error.errno not in (errno.EINVAL, errno.ENOTSUP):
                raise refusal(error, path) from error

    def rename(self, source: Path, target: Path) -> None:
        """Give `source` the name `target`, replacing a file or link there at one instant."""
        try:
            os.replace(source, target)
        except OSError as error:
            raise refusal(error, target) from error

    def link(self, target: str, path: Path) -> None:
        """Make `path` a link to `target`; a text file that holds the target where links do not exist (exFAT, FAT)."""
        try:
            os.symlink(target, path)
        except OSError as error:
            if error.errno not in (errno.EPERM, errno.ENOTSUP, errno.ENOSYS):
                raise refusal(error, path) from error
            self.write(path, target.encode())

    def remove(self, path: Path) -> None:
        """Remove a file, a link or a whole folder of ours; one that is gone already is fine."""
        try:
            if path.is_dir() and not path.is_symlink():
                shutil.rmtree(path)
            else:
                path.unlink(missing_ok=True)
        except FileNotFoundError:
            return
        except OSError as error:
            raise refusal(error, path) from error


def refusal(error: OSError, path: Path, needed: int = 0, verb: str = "write") -> InputError | OSError:
    """Return the InputError that says what an OSError means for the user, or the error itself where it means a bug."""
    if error.errno not in _REASONS:
        return error
    reason, remedy = _REASONS[error.errno]
    what = f"{path}: cannot {verb}: {reason}"
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        what += f" ({needed:,} bytes needed, {free_bytes(path):,} free)"
    return InputError(f"{what}\nhint: {remedy}")


def read_file(path: Path) -> bytes:
    """Return a file's bytes.

    Raises:
        FileNotFoundError: nothing is there.
        InputError: it cannot be read.
    """
    with _reading(path) as file:
        return file.read()


def read_large(path: Path) -> memoryview:
    """Return a file's bytes as `read_file` does, in memory of their own that may be written to."""
    with _reading(path) as file:
        data = new_memory(os.fstat(file.fileno()).st_size)
        return data[: file.readinto(data)]


@contextmanager
def _reading(path: Path) -> Iterator[BufferedReader]:
    try:
        mode = os.stat(path).st_mode
        if not stat.S_ISREG(mode) and not stat.S_ISDIR(mode):  # it may never end, or never begin
            raise InputError(f"{path}: cannot read: a device, pipe or socket is there\nhint: {_PATH}")
        with open(path, "rb") as file:
            yield file
    except FileNotFoundError:
        raise
    except OSError as error:
        raise refusal(error, path, verb="read") from error


def new_memory(size: int) -> memoryview:
    """Return memory for a file's bytes; Linux gives it in large pages, in half the time that small ones take."""
    memory = mmap.mmap(-1, max(1, size), flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    if hasattr(mmap, "MADV_HUGEPAGE"):
        memory.madvise(mmap.MADV_HUGEPAGE)
    return memoryview(memory)[:size]


def free_bytes(path: Path) -> int:
    """Return the bytes that this user can still write where `path` is or would be."""
    place = path.absolute()
    while not os.path.exists(place) and place != place.parent:
        place = place.parent
    return shutil.disk_usage(place).free


def require_space(path: Path, needed: int, purpose: str) -> None:
    """Refuse work that cannot end well.

    Raises:
        InputError: fewer than `needed` bytes are free where `path` is or would be.
    """
    free = free_bytes(path)
    if free < needed:
        raise InputError(
            f"{path}: {purpose} needs {needed:,} bytes of disk space, {free:,} are free\nhint: free some space first"
        )


def sha256(data: Data) -> str:
    """Return the sha256 of bytes, in hexadecimal; other threads go on meanwhile."""
    return hashlib.sha256(data).hexdigest()


def sha256_file(path: Path) -> str:
    """Return the sha256 of a file's bytes, in hexadecimal."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
