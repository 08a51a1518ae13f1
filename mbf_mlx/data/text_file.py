"""Opening and splitting a user's text file, which is never trusted.

Lines are handed on one at a time with their places, so that a caller can read each again alone. What a line must hold
is left to the formats.
"""

import os
import stat
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import BinaryIO

from mbf_mlx.data.row import BadRow
from mbf_mlx.errors import InputError

MAX_LINE = 8_000_000  # bytes of one row; a longer one is a file without line ends, or a row that cannot be learned
BYTE_ORDER_MARK = b"\xef\xbb\xbf"

_MAGIC = {
    b"\xff\xfe": "UTF-16 text",
    b"\xfe\xff": "UTF-16 text",
    b"\x1f\x8b": "a gzip archive",
    b"PK\x03\x04": "a zip archive or a spreadsheet",
    b"PAR1": "a Parquet file",
    b"ARROW1": "an Arrow file",
    b"\x28\xb5\x2f\xfd": "a zstd archive",
    b"SQLite format": "a database",
}


def open_binary(file: Path) -> BinaryIO:
    """Return a regular file opened for reading.

    Raises:
        InputError: the file is missing, no regular file, not readable for us, empty, or plainly not text in UTF-8.
    """
    try:
        handle = open(file, "rb", opener=_open_regular)
        begin = handle.read(16)
    except OSError as error:
        raise InputError(f"{file}: {error.strerror or error}") from error
    for magic, name in _MAGIC.items():
        if begin.startswith(magic):
            handle.close()
            raise InputError(f"{file}: expected text in UTF-8, got {name} (save or unpack it as UTF-8 text)")
    if not begin:
        handle.close()
        raise InputError(f"{file}: the file is empty")
    handle.seek(0)
    return handle


def _open_regular(name: str, flags: int) -> int:
    # Without O_NONBLOCK, opening a named pipe would wait for ever for a writer.
    descriptor = os.open(name, flags | os.O_NONBLOCK)
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise OSError(0, "expected a file")
    return descriptor


def lines(handle: BinaryIO, on_read: Callable[[bytes], object] = len) -> Iterator[tuple[int, int, bytes | None]]:
    """Yield offset, number and bytes of each line from where `handle` stands; None for a line over MAX_LINE.

    A byte order mark at the start of the file is skipped. `on_read` is called with every byte of the file, in order.
    """
    offset, number = handle.tell(), 0
    while raw := handle.readline(MAX_LINE + 1):
        on_read(raw)
        start, number, length = offset, number + 1, len(raw)
        if length > MAX_LINE:
            more = raw
            while more and not more.endswith(b"\n"):
                more = handle.readline(MAX_LINE)
                on_read(more)
                length += len(more)
            yield start, number, None
        else:
            skipped = len(BYTE_ORDER_MARK) if start == 0 and raw.startswith(BYTE_ORDER_MARK) else 0
            yield start + skipped, number, raw[skipped:]
        offset += length


def decode(raw: bytes | None) -> str:
    """Return a line as text.

    Raises:
        BadRow: the line was too long (None), or is not UTF-8.
    """
    if raw is None:
        raise BadRow(f"the line is longer than {MAX_LINE // 1_000_000} MB (one row a line; split the text)")
    try:
        return raw.decode()
    except UnicodeDecodeError as error:
        byte = raw[error.start]
        raise BadRow(f"not UTF-8: byte 0x{byte:02x} at column {error.start + 1} (save the file as UTF-8)") from None
