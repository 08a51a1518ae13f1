"""Bytes and seconds in words that people use."""

import re

from mbf_mlx.errors import InputError

_UNITS = {"": 1, "k": 10**3, "M": 10**6, "G": 10**9, "T": 10**12}


def bytes_of(text: str, where: str) -> int:
    """Return the bytes of a size as people write it: "16GB", "900 MB".

    Args:
        text: The size.
        where: The flag or setting that it was given with, for the message.

    Raises:
        InputError: the text is not a size.
    """
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([kMGT]?)B?\s*", text)
    if match is None:
        raise InputError(f"{where}: expected a size as in 16GB or 900MB, got {text!r}")
    return int(float(match[1]) * _UNITS[match[2]])


def size(count: float) -> str:
    """Return a number of bytes in a unit that people use, in powers of 1000: "812 kB", "1.3 GB"."""
    for unit in ("bytes", "kB", "MB", "GB", "TB"):
        if count < 999.5 or unit == "TB":
            break
        count /= 1000
    return f"{count:.0f} {unit}" if unit == "bytes" or count >= 100 else f"{count:.1f} {unit}"


def duration(seconds: float) -> str:
    """Return a length of time in units that people use: "42 s", "3 min 05 s", "2 h 10 min"."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02d} s"
    return f"{whole // 3600} h {whole % 3600 // 60:02d} min"
