"""A first try of a model folder's tokenizer and chat template, in a process of its own with bounds on time and memory.

Both are a stranger's programs: a normalizer's patterns and a template's loops may run for ever or fill the memory. What
has passed is remembered by its content, in the user's cache folder, so only the first command with a base pays for it.
The try is short texts and one conversation: a template that waits for other words is not found here.
"""

import hashlib
import os
import subprocess
import sys
from contextlib import suppress
from pathlib import Path

from mbf_mlx.base.caches import user_caches
from mbf_mlx.errors import InputError

SECONDS = 20  # of computing, in all
BYTES = 6 << 30  # of address space
LETTERS = 10_000_000  # that a template may make of the conversation
_FILES = ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja")
_TRY = """
import json, resource, sys
from pathlib import Path
folder, seconds, size, letters = Path(sys.argv[1]), *map(int, sys.argv[2:])
resource.setrlimit(resource.RLIMIT_CPU, (seconds, seconds))
resource.setrlimit(resource.RLIMIT_AS, (size, size))
texts = ["The stream learns.", "a" * 2000, "\\u00e9\\u6f22\\u5b57 \\U0001f642 " * 50]
if (folder / "tokenizer.json").is_file():
    from tokenizers import Tokenizer
    try:
        tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
        for text in texts:
            tokenizer.encode(text)
    except MemoryError:
        raise
    except Exception:
        pass  # told better by whoever loads it
templates = []
try:
    stated = json.loads((folder / "tokenizer_config.json").read_bytes()).get("chat_template")
    templates += [each["template"] for each in stated] if isinstance(stated, list) else [stated]
except (OSError, ValueError, AttributeError, KeyError, TypeError):
    pass
try:
    templates.append((folder / "chat_template.jinja").read_text(encoding="utf-8"))
except (OSError, ValueError):
    pass
from jinja2.sandbox import ImmutableSandboxedEnvironment
talk = [{"role": role, "content": text} for role, text in zip(("user", "assistant", "user"), texts)]
for template in filter(lambda each: isinstance(each, str), templates):
    made = 0
    try:
        settings = {"trim_blocks": True, "lstrip_blocks": True, "extensions": ["jinja2.ext.loopcontrols"]}
        environment = ImmutableSandboxedEnvironment(**settings)
        values = {"messages": talk, "add_generation_prompt": True, "bos_token": "", "eos_token": "", "tools": None}
        for piece in environment.from_string(template).generate(**values):
            made += len(piece)
            if made > letters:
                raise MemoryError
    except MemoryError:
        raise
    except Exception:
        pass  # it refuses this conversation, or is no template
"""


def try_tokenizer(folder: Path) -> None:
    """Try a folder's tokenizer and chat template once.

    Raises:
        InputError: they take more time or memory for a few short texts than any real one does.
    """
    passed = _passed(folder)
    if passed is not None and passed.exists():
        return
    words = [sys.executable, "-P", "-c", _TRY, str(folder), *map(str, (SECONDS, BYTES, LETTERS))]
    environment = {**os.environ, "TOKENIZERS_PARALLELISM": "false"}
    try:
        done = subprocess.run(words, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, env=environment, timeout=90)
        ended = done.returncode == 0
    except subprocess.TimeoutExpired:
        ended = False
    if not ended:
        raise InputError(
            f"{folder}: its tokenizer or chat template takes more than {SECONDS} seconds or {BYTES >> 30} GB for a few"
            " short texts; it is not used\nhint: take the model from another source"
        )
    if passed is not None:
        with suppress(OSError):
            passed.parent.mkdir(parents=True, exist_ok=True)
            passed.touch()


def _passed(folder: Path) -> Path | None:
    """Return the file that says that these contents have passed; None for a user without a folder for caches."""
    if (root := user_caches()) is None:
        return None
    digest = hashlib.sha256(_TRY.encode())
    for name in _FILES:
        with suppress(FileNotFoundError):
            digest.update(name.encode() + b"\n" + hashlib.sha256((folder / name).read_bytes()).digest())
    return root / "mbf-mlx" / "tried" / digest.hexdigest()[:32]
