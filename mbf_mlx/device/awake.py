"""Keeps a Mac from going to sleep while it learns; elsewhere it does nothing.

`caffeinate` comes with macOS. It is told our process id, so it ends with us however we end.
"""

import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def kept_awake(wanted: bool = True, system: str = sys.platform) -> Iterator[None]:
    """Hold off idle sleep inside the block; the display may sleep, and a closed lid or an empty battery still wins.

    Args:
        wanted: Whether to do so at all.
        system: As `sys.platform` has it.
    """
    program = shutil.which("caffeinate") if wanted and system == "darwin" else None
    if program is None:
        yield
        return
    # A group of its own: Ctrl-C is ours, and the last save happens after it.
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
