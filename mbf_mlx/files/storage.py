"""The few file operations that streams and exports are built on. What they write is on the disk when they return.

They stand in one thin layer for two reasons: tests can make any single operation fail, and a full disk, a read-only
folder or a missing permission gives the same message everywhere. This file knows no file format.
"""

import errno
import fcntl
import hashlib
import mmap
import os
import shutil
import stat
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from io import BufferedReader
from pathlib import Path

from mbf_mlx.errors import InputError

_SPACE = "free some space and run the command again; nothing was lost"
_RIGHTS = "change the permissions of the folder, or copy it to a place you can write to"
_PATH = "choose another path"
_DISK = "copy the folder to another disk"
_AGAIN = "run the command again; nothing was lost"
# errno -> (what it means, what to do); of any other, the operating system's own words are told.
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
    errno.EMFILE: ("too many files are open", "close other programs, or allow more open files (ulimit -n 1024)"),
    errno.ENFILE: ("too many files are open on this machine", "close other programs"),
    errno.ENOMEM: ("there is not enough memory", "close other programs"),
    errno.EBUSY: ("another program is using it", "close that program and run the command again"),
    errno.ESTALE: ("the network folder has changed under us", _AGAIN),
    errno.ETIMEDOUT: ("the network folder does not answer", _AGAIN),
    errno.EXDEV: ("its parts lie on different disks", _DISK),
    errno.ENOLCK: ("the file system cannot lock files", _DISK),
    errno.ENOSYS: ("the file system cannot do this", _DISK),
    errno.ENOTSUP: ("the file system cannot do this", _DISK),
    errno.EOPNOTSUPP: ("the file system cannot do this", _DISK),
    errno.EINVAL: ("the file system cannot do this", _DISK),
}

WITHOUT_LINKS = ("exfat", "vfat", "msdos", "fat32", "fuseblk")  # file systems; the last is how Linux names some of them
Data = bytes | memoryview  # the bytes of a file


class Files:
    """File operations that flush to the disk. What the user can mend, such as a full disk, raises an InputError."""

    def write(self, path: Path, data: Data) -> None:
        """Write a new file and flush it to the disk."""
        try:
            with open(path, "xb") as file:
                file.write(data)
                file.flush()
                flush(file.fileno())
        except OSError as error:
            raise refusal(error, path, len(data)) from error

    def make_folder(self, path: Path) -> None:
        """Create a folder and its parents, and flush their names to the disk; a folder that exists is kept."""
        new = [each for each in (path, *path.parents) if not os.path.exists(each)]
        try:
            path.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise refusal(error, path) from error
        try:
            for folder in reversed(new):
                self.sync_folder(folder.parent)
        except BaseException:
            with suppress(OSError):
                for folder in new:
                    folder.rmdir()
            raise

    def sync_file(self, path: Path) -> None:
        """Flush a file to the disk that other code wrote."""
        try:
            with open(path, "rb") as file:
                flush(file.fileno())
        except OSError as error:
            raise refusal(error, path) from error

    def sync_folder(self, path: Path) -> None:
        """Flush a folder's list of names to the disk, so that a rename in it lasts."""
        try:
            handle = os.open(path, os.O_RDONLY)
            try:
                flush(handle)
            finally:
                os.close(handle)
        except OSError as error:
            # Some network and FUSE file systems cannot flush a folder: we rely on the order of their own operations. A
            # parent folder may be one that this user cannot list.
            if error.errno not in (errno.EINVAL, errno.ENOTSUP, errno.EACCES):
                raise refusal(error, path) from error

    def rename(self, source: Path, target: Path) -> None:
        """Rename `source` to `target`. A file or link of that name is replaced, with no moment in between."""
        try:
            os.replace(source, target)
        except OSError as error:
            raise refusal(error, target) from error

    def link(self, target: str, path: Path) -> None:
        """Make `path` a link to `target`, or a text file that names it where links do not exist (exFAT, FAT)."""
        try:
            os.symlink(target, path)
        except OSError as error:
            if error.errno not in (errno.EPERM, errno.ENOTSUP, errno.ENOSYS):
                raise refusal(error, path) from error
            self.write(path, target.encode())

    def remove(self, path: Path) -> None:
        """Remove a file, a link or a whole folder of ours. It may be gone already."""
        try:
            if path.is_dir() and not path.is_symlink():
                shutil.rmtree(path)
            else:
                path.unlink(missing_ok=True)
        except FileNotFoundError:
            return
        except OSError as error:
            raise refusal(error, path) from error

    def discard(self, path: Path) -> None:
        """Try to remove something that is half made. If that fails, it stays for the next writer to remove."""
        with suppress(InputError, OSError):
            self.remove(path)

    def replace(self, path: Path, data: Data) -> None:
        """Write a file under a temporary name and rename it to `path`: readers see the old file or the new one."""
        self._swap(path, lambda new: self.write(new, data))

    def replace_link(self, path: Path, target: str) -> None:
        """Make `path` a link to `target` in the same way."""
        self._swap(path, lambda new: self.link(target, new))

    def _swap(self, path: Path, make: Callable[[Path], None]) -> None:
        new = path.with_name(f"{path.name}.new")
        self.discard(new)
        try:
            make(new)
            self.rename(new, path)
        except BaseException:
            self.discard(new)
            raise
        self.sync_folder(path.parent)


def flush(descriptor: int) -> None:
    """Flush a file or folder to the disk itself. On a Mac `fsync` leaves it in the disk's own memory."""
    if sys.platform == "darwin":
        try:
            fcntl.fcntl(descriptor, fcntl.F_FULLFSYNC)
            return
        except OSError:  # a network folder
            pass
    os.fsync(descriptor)


def refusal(error: OSError, path: Path | str, needed: int = 0, verb: str = "write") -> InputError:
    """Return an InputError that explains an OSError to the user.

    Args:
        error: What the operating system said.
        path: What it was said of.
        needed: Bytes that were to be written.
        verb: What could not be done.
    """
    number = error.errno or 0
    said, remedy = error.strerror or str(error) or type(error).__name__, "run the command again, or use another disk"
    reason, remedy = _REASONS.get(number, (f"the operating system says {said!r}", remedy))
    what = f"{path}: cannot {verb}: {reason}"
    if number in (errno.ENOSPC, errno.EDQUOT) and isinstance(path, Path):
        what += f" ({needed:,} bytes needed, {free_bytes(path):,} free)"
    return InputError(f"{what}\nhint: {remedy}")


def read_file(path: Path) -> bytes:
    """Return a file's bytes.

    Raises:
        FileNotFoundError: there is no such file.
        InputError: it cannot be read.
    """
    with _reading(path) as file:
        return file.read()


def read_large(path: Path) -> memoryview:
    """Return a file's bytes in new memory that may be written to. Raises what `read_file` does."""
    with _reading(path) as file:
        data = new_memory(os.fstat(file.fileno()).st_size)
        return data[: file.readinto(data)]


@contextmanager
def _reading(path: Path) -> Iterator[BufferedReader]:
    try:
        mode = os.stat(path).st_mode
        if not stat.S_ISREG(mode) and not stat.S_ISDIR(mode):  # reading it may block, or never end
            raise InputError(f"{path}: cannot read: a device, pipe or socket is there\nhint: {_PATH}")
        with open(path, "rb") as file:
            yield file
    except FileNotFoundError:
        raise
    except OSError as error:
        raise refusal(error, path, verb="read") from error


def new_memory(size: int) -> memoryview:
    """Return memory for a file's bytes. On Linux it has large pages, which take half as long to get as small ones."""
    memory = mmap.mmap(-1, max(1, size), flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    if sys.platform == "linux":
        with suppress(OSError):  # a kernel built without large pages
            memory.madvise(mmap.MADV_HUGEPAGE)
    return memoryview(memory)[:size]


def free_bytes(path: Path) -> int:
    """Return how many bytes this user can still write on the disk of `path`, which need not exist yet."""
    place = path.absolute()
    while not os.path.exists(place) and place != place.parent:
        place = place.parent
    try:
        return shutil.disk_usage(place).free
    except OSError:  # a file system that cannot say; writing will tell
        return sys.maxsize


def lacks_links(path: Path) -> bool:
    """Return whether the file system of an existing path is of a kind that has no links, such as exFAT."""
    import psutil

    place = os.path.realpath(path)
    inside = [
        part
        for part in psutil.disk_partitions(all=True)
        if os.path.commonpath([place, part.mountpoint]) == part.mountpoint
    ]
    return bool(inside) and max(inside, key=lambda part: len(part.mountpoint)).fstype.lower() in WITHOUT_LINKS


def require_space(path: Path, needed: int, purpose: str) -> None:
    """Refuse work whose result would not fit on the disk.

    Args:
        path: Where the result goes; it need not exist yet.
        needed: Bytes.
        purpose: The work, as the message names it: "a commit".

    Raises:
        InputError: fewer than `needed` bytes are free there.
    """
    free = free_bytes(path)
    if free < needed:
        raise InputError(
            f"{path}: {purpose} needs {needed:,} bytes of disk space, {free:,} are free\nhint: free some space first"
        )


def sha256(data: Data) -> str:
    """Return the sha256 of bytes, in hexadecimal. Other threads can run meanwhile."""
    return hashlib.sha256(data).hexdigest()


def sha256_file(path: Path) -> str:
    """Return the sha256 of a file's bytes, in hexadecimal."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
