"""The program that tries a tokenizer.json; first_try.py starts it. It needs tokenizers and nothing of ours.

It refuses steps that make a text far longer. Then it encodes and decodes short texts, and texts from the letters of the
file's own patterns: the regular expressions go back and try again, and some of them take any time for such texts. The
reason for a refusal is what it prints. Its exit status is 0 if the tokenizer has passed.
"""

import base64
import binascii
import json
import random
import re
import resource
import sys
from collections.abc import Iterator
from contextlib import suppress
from itertools import pairwise
from pathlib import Path
from typing import Any

GROWTH = 100  # letters that the steps of a chain may make of one letter, beside what Unicode's own forms make
UNICODE = 18  # letters that Unicode's own forms make of one at most
LONG = 10_000  # letters of a text that repeats a few: more than the square root of the steps that a pattern may take
MOST = 40  # letters, and pairs of letters, that are taken from the patterns
TEXTS = ("The stream learns.", "a" * 2000, "\u00e9\u6f22\u5b57 \U0001f642 " * 50)
KINDS = "aA0 \n\t_-.'\u00e9\u6f22\u0301"  # a letter of each kind that patterns tell apart


def growth(step: Any) -> float:
    """Return how many letters a normalizer or decoder may make of one."""
    most, made, known = 1.0, set[str](), True  # the letters that steps have written, while they are all known
    for each in _steps(step):
        if each.get("type") != "Replace":
            known = False
            most *= _other_growth(each)
            continue
        pattern, content = each.get("pattern", {}).get("String"), str(each.get("content", ""))
        own = max(1.0, len(content) / len(pattern)) if pattern else 1.0 + len(content)
        # A step that finds no letter that was written before it makes nothing longer that is long already.
        most = max(most, own) if known and pattern and not made & set(pattern) else most * own
        made |= set(content)
    return most


def _steps(step: Any) -> Iterator[dict[str, Any]]:
    if not isinstance(step, dict):
        return
    inside = step.get("normalizers", step.get("decoders"))
    if step.get("type") == "Sequence" and isinstance(inside, list):
        for each in inside:
            yield from _steps(each)
    else:
        yield step


def _other_growth(step: dict[str, Any]) -> float:
    if step.get("type") == "Prepend":
        return 1.0 + len(str(step.get("prepend", "")))
    if step.get("type") != "Precompiled":
        return 1.0
    # The size of a table, the table, and the texts that letters become, each with a zero byte behind it.
    try:
        data = base64.b64decode(str(step.get("precompiled_charsmap") or ""))
    except binascii.Error:
        return 1.0  # it cannot be loaded
    texts = data[4 + int.from_bytes(data[:4], "little") :].split(b"\0")
    return max(1.0, max(len(text.decode("utf-8", "replace")) for text in texts) / UNICODE)


def own_texts(document: dict[str, Any]) -> Iterator[str]:
    """Yield texts for the patterns of a tokenizer: letters of each kind, and letters and pairs of the patterns' own."""
    found = " ".join(_patterns([document.get("normalizer"), document.get("pre_tokenizer"), document.get("decoder")]))
    plain = re.sub(r"\\[pP]\{[^}]*\}|\\[a-zA-Z]|[()\[\]{}?*+|^$\\]", "", found)
    letters = list(dict.fromkeys(KINDS + plain))[: len(KINDS) + MOST]
    pairs = dict.fromkeys(a + b for a, b in pairwise(plain) if a != b)
    # A pattern is not even begun where a letter that it needs is nowhere in the text: all stand at the end.
    end = "!" + "".join(reversed(letters))
    for repeated in (*letters, *list(pairs)[:MOST]):
        yield repeated * (LONG // len(repeated)) + end
    yield "".join(random.Random(1).choices(letters, k=LONG))


def _patterns(value: Any) -> Iterator[str]:
    """Yield every pattern in a part of tokenizer.json."""
    if isinstance(value, dict):
        pattern = value.get("pattern")
        if isinstance(pattern, dict):
            yield from (str(text) for text in pattern.values())
        for each in value.values():
            yield from _patterns(each)
    elif isinstance(value, list):
        for each in value:
            yield from _patterns(each)


def main() -> None:
    """Try the tokenizer of one folder."""
    folder, seconds, size = Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3])
    for kind, most in ((resource.RLIMIT_CPU, seconds), (resource.RLIMIT_AS, size), (resource.RLIMIT_CORE, 0)):
        with suppress(OSError, ValueError):  # some systems do not limit the memory
            resource.setrlimit(kind, (most, most))
    from tokenizers import Tokenizer

    path = folder / "tokenizer.json"
    try:
        document = json.loads(path.read_bytes())
        tokenizer = Tokenizer.from_file(str(path))
    except MemoryError:
        raise
    except Exception:
        return  # told better by whoever loads it
    for name in ("normalizer", "decoder"):
        if (made := growth(document.get(name))) > GROWTH:
            sys.exit(f"its {name} may make {made:,.0f} letters of one: expected at most {GROWTH}")
    try:
        for text in (*TEXTS, *own_texts(document)):
            tokenizer.decode(tokenizer.encode(text).ids)
    except Exception as error:
        if isinstance(error, MemoryError):
            raise
    except BaseException as error:  # a panic in Rust: a pattern that has taken too many steps
        sys.exit(f"it fails for a text of {len(text):,} letters: {' '.join(str(error).split())[:200]}")


if __name__ == "__main__":
    main()
