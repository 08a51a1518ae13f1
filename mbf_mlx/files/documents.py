"""JSON and TOML documents, read as a whole. Every error names the file."""

import json
import tomllib
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from mbf_mlx.errors import InputError
from mbf_mlx.files.storage import read_file


def first_repeated(names: Iterable[str]) -> str | None:
    """Return the first name that stands twice, in the order of the second places, cut to 80 letters; None if none does.

    It takes linear time, as the names may be a stranger's.
    """
    seen: set[str] = set()
    for name in names:
        if name in seen:
            return name[:80]
        seen.add(name)
    return None


def read_object(path: Path) -> dict[str, Any]:
    """Return the object that a JSON file holds.

    Raises:
        FileNotFoundError: there is no such file; the caller knows what to say about it.
        InputError: it cannot be read, or does not hold a JSON object.
    """
    try:
        document = json.loads(read_file(path))
    except InputError:
        raise
    except (ValueError, RecursionError) as error:
        raise InputError(f"{path}: not JSON: {error}") from error
    if not isinstance(document, dict):
        raise InputError(f"{path}: expected a JSON object, got {type(document).__name__}")
    return document


def toml(file: Path, hint: str) -> dict[str, Any]:
    """Return what a TOML file holds.

    Args:
        file: Its path.
        hint: What to tell the user if there is no such file.

    Raises:
        InputError: there is no such file, or it cannot be read as TOML.
    """
    try:
        return tomllib.loads(read_file(file).decode())
    except FileNotFoundError:
        raise InputError(f"{file}: no such file\nhint: {hint}") from None
    except InputError:
        raise
    except (ValueError, RecursionError) as error:
        raise InputError(f"{file}: not readable as TOML: {error}") from error
