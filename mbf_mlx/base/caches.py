"""The folder for what this user's programs remember between two runs."""

import os
import sys
from pathlib import Path


def user_caches() -> Path | None:
    """Return the folder for the user's caches: $XDG_CACHE_HOME, or the system's own place at home."""
    named = os.environ.get("XDG_CACHE_HOME")
    if named and os.path.isabs(named):  # others are to be ignored, says the XDG specification
        return Path(named)
    try:
        home = Path.home()
    except RuntimeError:  # no $HOME, and a user that the system does not know
        return None
    return home / ("Library/Caches" if sys.platform == "darwin" else ".cache") if home.is_absolute() else None
