"""Makes one file operation of ours fail, or the process end at it: every operation that changes a disk goes through
`storage.Files`, and this stands in its methods' way."""

import errno
import os
from contextlib import contextmanager
from unittest import mock

from mbf_mlx.errors import InputError
from mbf_mlx.files.storage import Files

OPERATIONS = ("write", "make_folder", "sync_file", "sync_folder", "rename", "link", "remove")
WAYS = ("error", "short", "before", "after")  # refused; half written, then the end; the end before it; the end after it
NEEDS_SPACE = ("fsync", "mkdir", "replace", "symlink")  # the system's own calls that a quota or a full disk refuses


class Crash(BaseException):
    """Stands for the end of the process: nothing reaches the disk after it."""


class Count:
    """How many operations there were."""

    done, dead = 0, False


@contextmanager
def failing(at=0, how="error"):
    """Let the operation with number `at` fail in one of the WAYS; with 0 none fails, and they are counted.

    In place of a way, an errno's name as in "EDQUOT": the system refuses what the operation asks of it.
    """
    count = Count()

    def wrapped(name, operation):
        def call(self, *arguments):
            if count.dead:
                raise Crash
            count.done += 1
            if count.done != at:
                return operation(self, *arguments)
            if how == "error":
                raise InputError("the disk is full")
            if how.startswith("E"):
                with refused_by_the_system(getattr(errno, how)):
                    return operation(self, *arguments)
            if how == "short" and name == "write":
                operation(self, arguments[0], arguments[1][: len(arguments[1]) // 2])
            if how == "after":
                operation(self, *arguments)
            count.dead = True
            raise Crash

        return call

    own = {name: getattr(Files, name) for name in OPERATIONS}
    for name, operation in own.items():
        setattr(Files, name, wrapped(name, operation))
    try:
        yield count
    finally:
        for name, operation in own.items():
            setattr(Files, name, operation)


@contextmanager
def refused_by_the_system(number):
    """Let the system refuse with this errno whatever takes space, removals aside, as it does over a quota."""

    def refuse(*_, **__):
        raise OSError(number, os.strerror(number))

    with mock.patch.multiple(os, **dict.fromkeys(NEEDS_SPACE, refuse)):
        yield
