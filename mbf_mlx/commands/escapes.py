"""Text as a terminal may show it: what would move the cursor, set colours or turn a line round is spelled out.

Names, paths and answers may come from a stranger. An escape among them could rewrite the screen.
"""

import re

# Control characters but line ends and tabs, marks that turn the direction of text, line separators, halves of pairs.
_CONTROL = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069\ud800-\udfff]")


def visible(text: str) -> str:
    """Return a text with its control characters spelled out as Python writes them, and all others as they are."""
    return _CONTROL.sub(lambda found: _escape(found[0]), text)


def visible_json(text: str) -> str:
    """Return JSON of the same meaning, in which every such character inside a string is an escape of JSON's own."""
    return _CONTROL.sub(lambda found: f"\\u{ord(found[0]):04x}", text)


def _escape(letter: str) -> str:
    return f"\\x{ord(letter):02x}" if ord(letter) < 256 else f"\\u{ord(letter):04x}"
