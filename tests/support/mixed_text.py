"""A thousand rows of mixed text for comparing tokenizers: prose, code, digits, spaces, emoji, many scripts."""

import inspect
import pydoc_data.topics
import random
import textwrap
from pathlib import Path

SCRIPTS, EMOJI = (
    part.split("\n")
    for part in Path(__file__).with_suffix(".txt").read_text(encoding="utf-8").rstrip("\n").split("\n\n")
)
SPACES = [" ", "  ", "   ", "\t", "\t\t", "\n", "\n\n", "\n \n", "\r\n", " \n", "\u00a0", "\u3000", "\u2009"]
RANGES = [(0x20, 0x7F), (0xA1, 0x17F), (0x370, 0x3FF), (0x400, 0x4FF), (0x5D0, 0x5EA), (0x621, 0x64A)]
RANGES += [(0x905, 0x939), (0xE01, 0xE2E), (0x3041, 0x3096), (0x4E00, 0x4FFF), (0xAC00, 0xAD00), (0x1F300, 0x1F5FF)]


def mixed_rows(seed=0, rows=1000):
    """Return rows of text, the same for the same seed and Python."""
    rng = random.Random(seed)
    prose = [
        part for topic in sorted(pydoc_data.topics.topics.values()) for part in topic.split("\n\n") if part.strip()
    ]
    code = [part for module in (textwrap, random, inspect) for part in inspect.getsource(module).split("\n\n")]
    makers = [
        lambda: rng.choice(prose)[:400],
        lambda: rng.choice(code)[:400],
        lambda: _scripts(rng),
        lambda: _digits(rng),
        lambda: _spaced(rng, prose),
        lambda: "".join(rng.choices(EMOJI, k=rng.randint(1, 6))) + rng.choice(SCRIPTS)[:20],
        lambda: "".join(chr(rng.randint(*rng.choice(RANGES))) for _ in range(rng.randint(1, 60))),
    ]
    made = [*SCRIPTS, *EMOJI]
    while len(made) < rows:
        row = makers[len(made) % len(makers)]()
        made += [row] if row else []
    return made[:rows]


def _scripts(rng):
    return rng.choice(["", " ", "\n"]).join(rng.sample(SCRIPTS, 2))


def _digits(rng):
    numbers = [str(rng.randint(0, 10 ** rng.randint(1, 12))) for _ in range(4)]
    return rng.choice(
        ["{}.{}, {}% of ${}", "{}-{}-{} {}:00", "{}{}x{}+{}", "n={}\tm={}\n{} {}", "v{}.{}.{}rc{}"]
    ).format(*numbers)


def _spaced(rng, prose):
    words = rng.choice(prose).split()[:25]
    return rng.choice(SPACES) + "".join(word + rng.choice(SPACES) for word in words)
