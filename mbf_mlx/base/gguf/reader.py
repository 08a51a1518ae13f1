"""Read a GGUF file: its settings and tensors. Every count, length, offset and type is checked before use.

The file is mapped, not read: a tensor's bytes are loaded when they are used. Shapes are NumPy's, rows first (GGUF
stores them in reverse). config.py, tokenizer.py and convert.py know what the settings mean.
"""

import mmap
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType

from mbf_mlx.errors import InputError

MAGIC = b"GGUF"
VERSIONS = (2, 3)  # 3 also allows big-endian files, which we do not read
ALIGNMENT = 32  # of tensor data, if the file names none
MAX_DIMENSIONS = 4
MAX_NAME_BYTES = 65_535
MAX_ITEMS = 1 << 24  # of one array; the largest vocabularies have 300,000 tokens and as many merges
MAX_ELEMENTS = 1 << 40  # of one tensor
_SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
_STRING, _ARRAY = 8, 9


class GGUFTensor(NamedTuple):
    """A tensor's type, shape and place in its file."""

    name: str
    type: str  # "Q4_1"
    shape: tuple[int, ...]  # rows first
    offset: int  # of its first byte in the file
    nbytes: int


@dataclass(frozen=True, kw_only=True)
class GGUFFile:
    """A checked GGUF file."""

    path: Path
    settings: dict[str, Any]  # strings, numbers, booleans; arrays are lists of strings or NumPy arrays
    tensors: dict[str, GGUFTensor]
    data: np.ndarray  # uint8[file size], mapped

    def rows(self, tensor: GGUFTensor) -> np.ndarray:
        """Return the bytes of a tensor, uint8[rows, bytes of a row]; a vector is one row."""
        count = int(np.prod(tensor.shape[:-1], dtype=np.int64))
        return self.data[tensor.offset : tensor.offset + tensor.nbytes].reshape(count, -1)


def read_gguf(path: Path) -> GGUFFile:
    """Read and check a GGUF file's header.

    Raises:
        InputError: not a GGUF file of a version we know, cut off, or a header that contradicts itself or the file.
    """
    try:
        size = path.stat().st_size
        with open(path, "rb") as file:
            if file.read(len(MAGIC)) != MAGIC:
                raise InputError(f"{path}: not a GGUF file: expected it to begin with {MAGIC.decode()}")
            data = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    except OSError as error:
        raise InputError(f"{path}: cannot read: {error.strerror}") from error
    cursor = _Cursor(path, data, size)
    version, tensor_count, setting_count = cursor.unpack("<IQQ", "its header")
    if version not in VERSIONS:
        hint = "a big-endian file" if version >= 1 << 16 else "convert it again with a current llama.cpp"
        raise InputError(f"{path}: expected GGUF version 2 or 3, got {version}: {hint}")
    # A setting takes at least 13 bytes of the file and a tensor's entry 32, so impossible counts are refused here.
    cursor.require(setting_count * 13 + tensor_count * 32, f"{setting_count} settings and {tensor_count} tensors")
    settings = _read_settings(cursor, setting_count)
    tensors = _read_tensors(cursor, tensor_count, settings.get("general.alignment", ALIGNMENT))
    return GGUFFile(path=path, settings=settings, tensors=tensors, data=np.frombuffer(data, dtype=np.uint8))


class _Cursor:
    """A position in the file that cannot pass its end."""

    def __init__(self, path: Path, data: mmap.mmap, size: int) -> None:
        self.path, self.data, self.size, self.at = path, data, size, len(MAGIC)

    def fail(self, what: str) -> InputError:
        return InputError(f"{self.path}: damaged GGUF header: {what}")

    def require(self, count: int, what: str) -> None:
        if count > self.size - self.at:
            raise self.fail(f"{what} would end behind the file's {self.size:,} bytes; was it cut off?")

    def take(self, count: int, what: str) -> bytes:
        self.require(count, what)
        self.at += count
        return self.data[self.at - count : self.at]

    def unpack(self, form: str, what: str) -> tuple[Any, ...]:
        return struct.unpack(form, self.take(struct.calcsize(form), what))

    def string(self, what: str, limit: int | None = None) -> str:
        (length,) = self.unpack("<Q", what)
        if limit is not None and length > limit:
            raise self.fail(f"{what}: expected at most {limit} bytes, got {length}")
        try:
            return self.take(length, what).decode("utf-8")
        except UnicodeDecodeError as error:
            raise self.fail(f"{what} is not UTF-8: {error}") from error


def _read_settings(cursor: _Cursor, count: int) -> dict[str, Any]:
    settings: dict[str, Any] = {}
    for place in range(count):
        key = cursor.string(f"the name of setting {place}", MAX_NAME_BYTES)
        if key in settings:
            raise cursor.fail(f"{key} is set twice")
        (kind,) = cursor.unpack("<I", key)
        settings[key] = _read_array(cursor, key) if kind == _ARRAY else _read_value(cursor, key, kind)
    alignment = settings.get("general.alignment", ALIGNMENT)
    if not isinstance(alignment, int) or not 1 <= alignment <= 1 << 20 or alignment & (alignment - 1):
        raise cursor.fail(f"general.alignment: expected a power of two, got {alignment!r}")
    return settings


def _read_value(cursor: _Cursor, key: str, kind: int) -> Any:
    if kind == _STRING:
        return cursor.string(key)
    if kind not in _SCALARS:
        raise cursor.fail(f"{key}: unknown type {kind}")
    (value,) = cursor.unpack("<" + _SCALARS[kind], key)
    return value


def _read_array(cursor: _Cursor, key: str) -> Any:
    kind, count = cursor.unpack("<IQ", key)
    if count > MAX_ITEMS:
        raise cursor.fail(f"{key}: expected at most {MAX_ITEMS:,} items, got {count:,}")
    if kind in _SCALARS:
        form = np.dtype("<" + _SCALARS[kind]) if kind != 7 else np.dtype(bool)
        return np.frombuffer(cursor.take(count * form.itemsize, key), dtype=form)
    if kind != _STRING:
        raise cursor.fail(f"{key}: expected an array of numbers or strings, got items of type {kind}")
    cursor.require(count * 8, key)
    return [cursor.string(key) for _ in range(count)]


def _read_tensors(cursor: _Cursor, count: int, alignment: int) -> dict[str, GGUFTensor]:
    entries: dict[str, tuple[str, tuple[int, ...], int, int]] = {}
    for place in range(count):
        name = cursor.string(f"the name of tensor {place}", MAX_NAME_BYTES)
        if name in entries:
            raise cursor.fail(f"tensor {name} is there twice")
        entries[name] = _read_entry(cursor, name, alignment)
    begin = -(-cursor.at // alignment) * alignment
    tensors = {
        name: GGUFTensor(name, kind, shape, begin + offset, nbytes)
        for name, (kind, shape, offset, nbytes) in entries.items()
    }
    end, before = begin, "the header"
    for tensor in sorted(tensors.values(), key=lambda entry: entry.offset):
        if tensor.offset < end:
            raise cursor.fail(f"tensor {tensor.name} overlaps {before}")
        end, before = tensor.offset + tensor.nbytes, f"tensor {tensor.name}"
    if end > cursor.size:
        raise cursor.fail(f"{before} ends at byte {end:,} of a file of {cursor.size:,}; was it cut off?")
    return tensors


def _read_entry(cursor: _Cursor, name: str, alignment: int) -> tuple[str, tuple[int, ...], int, int]:
    """Return type, shape, offset within the tensor data, and bytes."""
    (dimensions,) = cursor.unpack("<I", name)
    if not 1 <= dimensions <= MAX_DIMENSIONS:
        raise cursor.fail(f"tensor {name}: expected 1 to {MAX_DIMENSIONS} dimensions, got {dimensions}")
    shape = cursor.unpack(f"<{dimensions}Q", name)[::-1]
    number, offset = cursor.unpack("<IQ", name)
    try:
        kind = GGMLQuantizationType(number)
        block, block_bytes = GGML_QUANT_SIZES[kind]
    except (ValueError, KeyError):
        raise cursor.fail(f"tensor {name}: unknown type {number}") from None
    elements = 1
    for length in shape:
        elements *= length
    if not 0 < elements <= MAX_ELEMENTS:
        raise cursor.fail(f"tensor {name}: impossible shape {shape}")
    if shape[-1] % block:
        raise cursor.fail(f"tensor {name}: rows of {shape[-1]} are not whole {kind.name} blocks of {block}")
    if offset % alignment:
        raise cursor.fail(f"tensor {name}: offset {offset} is not a multiple of {alignment}")
    return kind.name, shape, offset, elements // block * block_bytes
