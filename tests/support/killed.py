"""Runs `mbf` and kills it by SIGKILL at the first file operation on a path: `killed.py PATTERN ARGUMENTS…`.

The operation is done first, so the killed run leaves what stands on the disk right after it.
"""

import fnmatch
import os
import signal
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2]))

from mbf_mlx.commands import main
from mbf_mlx.files.storage import Files

PATTERN = sys.argv[1]


def deadly(operation):
    def run(self, *arguments):
        operation(self, *arguments)
        if any(fnmatch.fnmatch(str(argument), PATTERN) for argument in arguments if isinstance(argument, Path)):
            os.kill(os.getpid(), signal.SIGKILL)

    return run


for name in ("write", "make_folder", "rename", "link", "remove"):
    setattr(Files, name, deadly(getattr(Files, name)))
sys.argv = ["mbf", *sys.argv[2:]]
main()
