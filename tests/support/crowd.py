"""Runs many commands on one stream at the same time: `crowd.py FOLDER COUNT SEED`; prints [[words, code, stderr], …].

Every command is a process of its own, forked after the imports, so that all really run at once. FOLDER holds a stream
`s` and an adapter `tuned`.
"""

import json
import os
import random
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2]))

import numpy as np

from mbf_mlx.commands import absorb, main, next, status, undo  # noqa: F401  imported once, before the forks


def words_of(dice, folder, number):
    """One command: half of them read, half of them write."""
    stream, tuned = str(folder / "s"), str(folder / "tuned")
    return dice.choice(
        [
            ["status", stream, "--json"],
            ["status", stream, "--verify"],
            ["next", stream, str(folder / f"start{number}"), "--format", "mlx"],
            ["absorb", stream, tuned, "--name", f"mail{number}", "--force"],
            ["absorb", stream, tuned, "--name", "mail", "--force", "--again"],
            ["undo", stream],
        ]
    )


def start(words, gate):
    """Fork a process that waits for the gate and then runs the command."""
    out = tempfile.TemporaryFile("w+")
    process = os.fork()
    if process == 0:
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        os.dup2(out.fileno(), 2)
        os.read(gate, 1)  # ends when the parent opens the gate
        sys.argv = ["mbf", *words]
        try:
            main()
        except SystemExit as end:
            sys.stderr.flush()
            os._exit(end.code if isinstance(end.code, int) else 1)
        except BaseException:
            import traceback

            traceback.print_exc()
            sys.stderr.flush()
            os._exit(99)
    return process, out


def crowd(folder, count, seed):
    np.linalg.qr(np.eye(3))
    dice = random.Random(seed)
    commands = [words_of(dice, folder, 1000 * seed + number) for number in range(count)]  # no name comes twice
    closed, opener = os.pipe()
    os.set_inheritable(opener, False)
    children = []
    for words in commands:
        children.append(start(words, closed))
    os.write(opener, b"x" * count)
    found = []
    for words, (process, out) in zip(commands, children):
        code = os.waitstatus_to_exitcode(os.waitpid(process, 0)[1])
        out.seek(0)
        found.append([words, code, out.read()])
    return found


if __name__ == "__main__":
    print(json.dumps(crowd(Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]))))
