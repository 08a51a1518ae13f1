"""Keeps a Mac from going to sleep while it learns. Elsewhere it does nothing.

The program `caffeinate` is part of macOS. It gets our process id, so that it ends when we end, whatever the reason.
"""

import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def kept_awake(wanted: bool = True, system: str = sys.platform) -> Iterator[None]:
    """Prevent idle sleep inside the block. The display may sleep, and a closed lid or an empty battery still wins.

    Args:
        wanted: False does nothing.
        system: The operating system, as `sys.platform` names it.
    """
    program = shutil.which("caffeinate") if wanted and system == "darwin" else None
    if program is None:
        yield
        return
    # In a session of its own: Ctrl-C must not end it, because the last save comes after Ctrl-C.
    process = subprocess.Popen(
        [program, "-i", "-w", str(os.getpid())],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )
    try:
        yield
    finally:
        process.terminate()
        process.wait()
