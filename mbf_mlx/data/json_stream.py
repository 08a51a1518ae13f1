"""A user's JSON: one value at a time, each with its place, and errors that say what is broken and where.

`parse_json` takes the text of one value. `read_document` and `elements` take a whole .json file and go through its list
without ever holding all values; `element_at` reads one of them again.
"""

import json
import os
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import BinaryIO, NamedTuple, NoReturn

from mbf_mlx.data.row import EXAMPLES, BadRow
from mbf_mlx.data.text_file import open_binary
from mbf_mlx.errors import InputError
from mbf_mlx.files.documents import first_repeated

MAX_DOCUMENT = 64_000_000  # bytes of a .json file, which is read whole
FIRST_READ = 65_536  # bytes read for one element; four times as many where it is longer


def _refuse_repeated_keys(pairs: list[tuple[str, object]]) -> dict[str, object]:
    document = dict(pairs)
    if (twice := first_repeated(key for key, _ in pairs)) is not None:
        raise BadRow(f"the key {json.dumps(twice[:40])} stands twice")
    return document


def _refuse_constant(name: str) -> object:
    raise BadRow(f"broken JSON: {name} is not JSON")


_SPACE = re.compile(r"[ \t\r\n]*")
_DECODER = json.JSONDecoder(object_pairs_hook=_refuse_repeated_keys, parse_constant=_refuse_constant)


def parse_json(text: str) -> object:
    """Return the one JSON value in `text`.

    Raises:
        BadRow: what is broken, and at which column.
    """
    try:
        return _DECODER.decode(text)
    except json.JSONDecodeError as error:
        raise _explained(text, error) from None
    except BadRow:
        raise
    except ValueError:  # int() refuses thousands of digits
        raise BadRow("broken JSON: a number is too long") from None
    except RecursionError:
        raise BadRow("nested too deeply") from None


def _explained(text: str, error: json.JSONDecodeError) -> BadRow:
    """Return what is wrong with a row's JSON in the words of its most likely cause."""
    if error.msg == "Extra data":
        return BadRow("broken JSON: something follows the first value (one row a line)")
    if text.strip()[:1] == "{" and "'" in text[:3]:
        return BadRow("broken JSON: keys and texts need double quotes")
    if "\0" in text:
        return BadRow("broken JSON: holds a NUL byte (is the file UTF-16, or binary?)")
    if text.startswith("\ufeff"):
        return BadRow("broken JSON: begins with a byte order mark (where files were joined, take it out)")
    return BadRow(f"broken JSON: {error.msg.removesuffix(' at')} at column {error.pos + 1}")


def read_document(file: Path, on_read: Callable[[bytes], object] = len) -> str:
    """Return the text of a whole JSON file, its byte order mark included; `on_read` is called with its bytes.

    Raises:
        InputError: as `open_binary`, and for a file that is too large or not UTF-8.
    """
    with open_binary(file) as handle:
        size = os.fstat(handle.fileno()).st_size
        if size > MAX_DOCUMENT:
            raise InputError(
                f"{file}: a .json file is read whole, and {size / 1e6:.0f} MB is over {MAX_DOCUMENT // 1_000_000} MB: "
                f"write it as .jsonl, a row a line such as {EXAMPLES['completion']}"
            )
        raw = handle.read()
    on_read(raw)
    try:
        return raw.decode()
    except UnicodeDecodeError as error:
        line = raw.count(b"\n", 0, error.start) + 1
        raise InputError(f"{file}:{line}: not UTF-8: byte 0x{raw[error.start]:02x} (save the file as UTF-8)") from None


class Element(NamedTuple):
    """One value of a JSON document and its place."""

    key: str | None  # its key in the object around it; None in a list
    offset: int  # bytes from the start of the file
    line: int  # from 1
    value: object


def elements(file: Path, text: str, rows: str | None) -> Iterator[Element]:
    """Yield the elements of a JSON list, or the members of an object with one of its lists opened.

    The document is never parsed as a whole: each value may be freed before the next one is read.

    Args:
        file: What errors name.
        text: The document.
        rows: The key whose list is yielded element by element; None where the document is a list itself.

    Raises:
        InputError: broken JSON, or another kind of document.
    """
    walk = _Walk(file, text)
    walk.expect("[" if rows is None else "{")
    if rows is None:
        yield from walk.items(None)
    else:
        while walk.more("}"):
            key = walk.value().value
            if not isinstance(key, str):
                walk.fail("broken JSON: keys need double quotes")
            walk.expect(":")
            if key == rows and walk.peek() == "[":
                walk.expect("[")
                yield from walk.items(rows)
            else:
                yield walk.value()._replace(key=key)
    if walk.peek():
        walk.fail("something follows the list or object")


def element_at(handle: BinaryIO, offset: int) -> object:
    """Return the element that `elements` found at `offset` of the open file.

    Raises:
        BadRow: it is no longer there: the file was changed.
    """
    size = FIRST_READ
    while True:
        handle.seek(offset)
        raw = handle.read(size)
        try:
            return _DECODER.raw_decode(raw.decode(errors="ignore"))[0]
        except ValueError as error:
            if len(raw) < size:
                raise BadRow(f"the element ends early: {error}") from None
        size *= 4


class _Walk:
    """A cursor over the text of a JSON document, which knows its place in characters, bytes and lines."""

    def __init__(self, file: Path, text: str):
        self.file, self.text = file, text
        self.place, self.offset, self.line = 0, 0, 1
        self.first = True  # nothing was read yet of the list or object that the cursor is in
        self._go(1 if text.startswith("\ufeff") else 0)

    def peek(self) -> str:
        """Go to the next character that is not white space and return it; "" at the end."""
        if space := _SPACE.match(self.text, self.place):
            self._go(space.end())
        return self.text[self.place : self.place + 1]

    def expect(self, mark: str) -> None:
        if self.peek() != mark:
            begin = self.text[self.place : self.place + 20]
            self.fail(f"broken JSON: expected {mark!r}, got {repr(begin) if begin else 'the end of the file'}")
        self._go(self.place + 1)
        self.first = True

    def more(self, end: str) -> bool:
        """Return whether another element follows in this list or object; step over the comma or the end."""
        mark = self.peek()
        if mark == end:
            self._go(self.place + 1)
            self.first = False
            return False
        if not self.first:
            self.expect(",")
        self.first = False
        return True

    def items(self, key: str | None) -> Iterator[Element]:
        """Yield the elements up to the end of a list."""
        while self.more("]"):
            yield self.value()._replace(key=key)

    def value(self) -> Element:
        self.peek()
        offset, line = self.offset, self.line
        try:
            value, end = _DECODER.raw_decode(self.text, self.place)
        except json.JSONDecodeError as error:
            self._go(min(error.pos, len(self.text)))
            self.fail(f"broken JSON: {error.msg.removesuffix(' at')}")
        except BadRow as error:
            self.fail(str(error))
        except (ValueError, RecursionError) as error:
            self.fail("nested too deeply" if isinstance(error, RecursionError) else "broken JSON: a number is too long")
        self._go(end)
        self.first = False
        return Element(None, offset, line, value)

    def fail(self, reason: str) -> NoReturn:
        raise InputError(f"{self.file}:{self.line}: {reason}")

    def _go(self, place: int) -> None:
        passed = self.text[self.place : place]
        self.offset += len(passed.encode())
        self.line += passed.count("\n")
        self.place = place
