"""The command line, in a process of its own."""

import subprocess
import sys

from tests.conftest import ROOT


def mbf(*words, **options):
    command = [sys.executable, str(ROOT / "cli.py"), *map(str, words)]
    return subprocess.run(command, capture_output=True, text=True, cwd=ROOT, **options)
