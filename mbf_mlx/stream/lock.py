"""The lock of a stream: one process at a time may change it. The lock ends with its process, even a killed one.

STREAM/lock is the file that the operating system locks. STREAM/lock.json says who holds it, for the message to others.
"""

import json
import os
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from mbf_mlx.errors import InputError
from mbf_mlx.files.storage import Files, refusal

LOCK, HOLDER = "lock", "lock.json"


@contextmanager
def hold_lock(path: Path, files: Files) -> Iterator[None]:
    """Hold the lock of the stream at `path` while the block runs.

    Raises:
        InputError: another process holds it; the message says which one and since when. Or the folder is read-only.
    """
    from filelock import FileLock, Timeout  # readers need no lock, and start faster without this import

    try:
        if (path / LOCK).is_symlink():
            raise InputError(f"{path / LOCK}: expected the stream's own empty file, got a link\nhint: remove the link")
        lock = FileLock(path / LOCK, blocking=False, fallback_to_soft=False)
        lock.acquire()
    except Timeout:
        raise InputError(f"{path}: in use by {_describe(path / HOLDER)}\nhint: wait for it to finish") from None
    except OSError as error:
        raise refusal(error, path / LOCK) from error
    try:
        owner = {"process": os.getpid(), "host": socket.gethostname(), "since": time.strftime("%Y-%m-%d %H:%M:%S")}
        try:
            files.replace(path / HOLDER, json.dumps(owner).encode())
        except (InputError, OSError):
            pass  # This note only tells others who we are. On a full disk the user may need exactly this undo.
        yield
    finally:
        files.discard(path / HOLDER)
        lock.release()


def _describe(holder: Path) -> str:
    """Return who holds the lock, in words, from the note that the holder wrote."""
    try:
        owner = json.loads(holder.read_bytes())
        process, host, since = owner["process"], owner["host"], owner["since"]
    except (OSError, ValueError, KeyError, TypeError):
        return "another process"
    if host == socket.gethostname() and not _is_running(process):
        return "another process"  # a dead process wrote this note; the new holder has not written its own yet
    return f"process {process} on {host} since {since}"


def _is_running(process: Any) -> bool:
    import psutil

    try:
        return isinstance(process, int) and psutil.pid_exists(process)
    except (OverflowError, ValueError):
        return False
