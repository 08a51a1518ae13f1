"""Guess what a malformed row meant, to suggest a fix: keys of other tools, misspelt keys, numbers instead of texts.

The guesses only go into error messages. No row is ever read by a guess.
"""

import difflib
import json
from collections.abc import Mapping
from typing import Any

# What other tools call the same things.
ALIASES = {
    "prompt": ("input", "question", "instruction", "query", "context", "source"),
    "completion": ("output", "response", "answer", "target", "label", "chosen"),
    "messages": ("conversations", "conversation", "chat", "dialog", "turns"),
    "role": ("from",),
    "content": ("value", "text"),
    "text": ("content", "document", "body"),
}
ROLES = {"human": "user", "gpt": "assistant", "bot": "assistant", "model": "assistant"}
CLOSE = 0.8  # how alike a misspelt key must be to the right one, as difflib measures it, in [0, 1]


def list_keys(document: Mapping[str, Any]) -> str:
    """Return the first keys of an object in words."""
    shown = [json.dumps(key[:40]) for key in list(document)[:6]]
    return ", ".join(shown) + (", …" if len(document) > 6 else "") if shown else "an empty object"


def find_meant(document: Mapping[str, Any], key: str) -> str | None:
    """Return the key of `document` that probably means `key`."""
    if key in document:
        return key
    for other in document:
        if other.strip().lower() == key or other.strip().lower() in ALIASES[key]:
            return other
    return next(iter(difflib.get_close_matches(key, list(document), 1, CLOSE)), None)


def suggest_names(document: Mapping[str, Any], *keys: str) -> str:
    """Say which keys of an object to rename to get `keys`; "" where that is not clear."""
    pairs = [(find_meant(document, key), key) for key in keys if key not in document]
    renamed = [f'{json.dumps(old[:40])} to "{key}"' for old, key in pairs if old]
    return f" (rename {' and '.join(renamed)})" if renamed else ""


def put_right(document: Mapping[str, Any]) -> dict[str, Any]:
    """Return a row with numbers turned into text and messages given their roles and contents, where those are clear."""
    right = {key: document[key] for key in ("prompt", "completion", "messages", "tools", "text") if key in document}
    right = {key: str(value) if type(value) in (int, float) else value for key, value in right.items()}
    if isinstance(right.get("messages"), list):
        right["messages"] = [_put_message_right(x) if isinstance(x, dict) else x for x in right["messages"]]
    return right


def _put_message_right(message: dict[str, Any]) -> dict[str, Any]:
    role, content = (message.get(find_meant(message, key) or key) for key in ("role", "content"))
    return {"role": ROLES.get(role, role) if isinstance(role, str) else role, "content": content}
