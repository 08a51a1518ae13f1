"""The exceptions for input that does not fit, and how their messages write a command."""

import shlex


class InputError(ValueError):
    """A file, flag, setting or folder that the user gave does not fit.

    The message says where, what was expected, what was found and what to do. The command line prints it without a
    traceback and exits with 1. Every other exception is a bug of ours and keeps its traceback.
    """


class MemoryLimitError(InputError):
    """The next step would take more memory than the run may have; the message names flags with which it would fit."""


class MissingPackageError(InputError):
    """A command needs a package that this installation lacks; the message names the extra that brings it."""


def quoted(word: object) -> str:
    """Return a path or another word as a shell reads it, for a command line that a message shows."""
    return shlex.quote(str(word))
