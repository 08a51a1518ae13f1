"""The command line, in a process of its own."""

import os
import pty
import subprocess
import sys

from tests.conftest import ROOT


def mbf(*words, **options):
    command = [sys.executable, str(ROOT / "cli.py"), *map(str, words)]
    return subprocess.run(command, capture_output=True, text=True, cwd=ROOT, **options)


def on_a_terminal(*words):
    """Run a command whose output and errors are a terminal of 120 columns; return all that it printed there."""
    command = [sys.executable, str(ROOT / "cli.py"), *map(str, words)]
    ours, theirs = pty.openpty()
    environment = {**os.environ, "COLUMNS": "120", "TERM": "xterm-256color"}
    with subprocess.Popen(command, stdin=theirs, stdout=theirs, stderr=theirs, cwd=ROOT, env=environment):
        os.close(theirs)
        shown = b""
        try:
            while piece := os.read(ours, 4096):
                shown += piece
        except OSError:  # the terminal closed with the command
            pass
    os.close(ours)
    return shown.decode(errors="replace")
