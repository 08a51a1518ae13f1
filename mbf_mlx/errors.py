"""The one exception for what a user gave us and that does not fit."""


class InputError(ValueError):
    """A file, flag, setting or folder of the user's does not fit.

    The message says where, what was expected, what was got and what to do. The command line prints it without a
    traceback and leaves with exit code 1; every other exception is a bug of ours and keeps its traceback.
    """


class MemoryLimitError(InputError):
    """What comes next would take more memory than the run may have; the message names the flags that would fit."""


class MissingPackageError(InputError):
    """A command needs a package that this installation lacks; the message names the extra that brings it."""
