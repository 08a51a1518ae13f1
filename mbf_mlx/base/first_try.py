"""A first try of a model folder's tokenizer, in a process of its own with bounds on time and memory.

A tokenizer is a stranger's program: its patterns may take any time, and its normalizer may fill the memory. What has
passed is remembered by its content, in the user's cache folder, so only the first command with a base pays for it.
tokenizer_child.py says what is tried. Chat templates are bounded at every render (renderer.py).
"""

import hashlib
import os
import subprocess
import sys
from contextlib import suppress
from pathlib import Path

from mbf_mlx.base import tokenizer_child
from mbf_mlx.base.caches import user_caches
from mbf_mlx.errors import InputError

SECONDS = 20  # of computing, in all
BYTES = 6 << 30  # of address space
FILE = "tokenizer.json"


def try_tokenizer(folder: Path) -> None:
    """Try a folder's tokenizer once.

    Raises:
        InputError: it takes more time or memory for a few short texts than any real one does, or may for others.
    """
    if not (folder / FILE).is_file():
        return
    passed = _passed(folder)
    if passed is not None and passed.exists():
        return
    words = [sys.executable, "-P", tokenizer_child.__file__, str(folder), str(SECONDS), str(BYTES)]
    environment = {**os.environ, "TOKENIZERS_PARALLELISM": "false", "RUST_BACKTRACE": "0"}
    try:
        done = subprocess.run(words, capture_output=True, text=True, errors="replace", env=environment, timeout=90)
    except subprocess.TimeoutExpired:
        done = None
    if done is None or done.returncode:
        # Where the program itself refuses it, the reason is the last line; a Rust panic has written some before it.
        said = done.stderr.strip().splitlines() if done is not None and done.returncode == 1 else []
        reason = said[-1] if said and said[-1].startswith("it") else _BOUNDS.format(SECONDS, BYTES >> 30)
        raise InputError(f"{folder}: its tokenizer is not used: {reason}\nhint: take the model from another source")
    if passed is not None:
        with suppress(OSError):
            passed.parent.mkdir(parents=True, exist_ok=True)
            passed.touch()


_BOUNDS = "it takes more than {} seconds or {} GB for a few short texts"


def _passed(folder: Path) -> Path | None:
    """Return the file that says that these contents have passed; None for a user without a folder for caches."""
    if (root := user_caches()) is None:
        return None
    digest = hashlib.sha256(Path(tokenizer_child.__file__).read_bytes())
    with suppress(FileNotFoundError):
        digest.update(hashlib.sha256((folder / FILE).read_bytes()).digest())
    return root / "mbf-mlx" / "tried" / digest.hexdigest()[:32]
