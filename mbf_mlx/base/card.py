"""Model cards: what a base's README.md says of its licence and origin, and the front matter of the cards that we write.

The front matter is YAML, read and written by huggingface_hub, as the hub itself reads it.
"""

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

CARD = "README.md"
_HUB_ID = re.compile(r"^[A-Za-z0-9][\w.-]*(/[\w.-]+)?$")


@dataclass(frozen=True)
class BaseCard:
    """What a base's own card says; None where it says nothing."""

    licence: str | None = None  # as the hub abbreviates it: an SPDX id in lower case, or a name such as "llama3.2"
    original: str | None = None  # hub id of the unquantized model that the base was made from
    notes: tuple[str, ...] = ()  # what could not be read or used, one sentence each


def read_card(folder: Path) -> BaseCard:
    """Return what the card of a base's folder says. A card that cannot be read gives a note, never an error."""
    path = folder / CARD
    if not path.is_file():
        return BaseCard()
    from huggingface_hub import ModelCard
    from huggingface_hub.repocard import REGEX_YAML_BLOCK

    text = path.read_text(encoding="utf-8-sig", errors="replace")
    if not REGEX_YAML_BLOCK.search(text):  # huggingface_hub would print a warning of its own
        return BaseCard()
    try:
        data = ModelCard(text, ignore_metadata_errors=True).data
    except Exception as error:  # PyYAML's own errors, or a TypeError or ValueError for YAML that is no mapping
        reason = str(error).splitlines()[0]
        return BaseCard(notes=(f"{path}: its front matter cannot be read ({reason}), so no licence is taken from it",))
    original, notes = _original(data.get("base_model"), path)
    licence = data.get("license")
    return BaseCard(licence if isinstance(licence, str) and licence.strip() else None, original, notes)


def _original(stated: Any, path: Path) -> tuple[str | None, tuple[str, ...]]:
    """Return the one original model that `base_model` names, and what to say where it does not name exactly one."""
    listed = stated if isinstance(stated, list) else [stated]
    named = [name.strip() for name in listed if isinstance(name, str) and name.strip()]
    if len(named) > 1:
        return None, (
            f"{path}: base_model names several models ({', '.join(named)}), so none is taken as the original",
        )
    if named and not _HUB_ID.match(named[0]):
        return None, (f"{path}: base_model: expected organisation/name, got {named[0]!r}; it is not used",)
    return (named[0] if named else None), ()


def front_matter(**fields: str | list[str] | None) -> str:
    """Return the front matter of a card, with its two lines of dashes. A field that is None is left out."""
    from huggingface_hub import ModelCardData

    return f"---\n{ModelCardData(**fields).to_yaml()}\n---\n"


def public_name(folder: Path) -> str:
    """Return what a card calls a base: its hub id where the folder is the hub's cache, else the folder's own name."""
    place = folder.absolute()
    if place.parent.name == "snapshots" and place.parent.parent.name.startswith("models--"):
        return place.parent.parent.name.removeprefix("models--").replace("--", "/", 1)
    return place.name
