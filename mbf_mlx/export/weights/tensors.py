"""safetensors files, read and written a few rows of one tensor at a time, so that no export holds a whole model.

NumPy has no bfloat16: such a tensor is held as uint16, and `to_float32` and `from_float32` convert it. files/
safetensors_file.py reads and checks headers; checkpoint.py knows what the tensors mean.
"""

import json
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO

import numpy as np

from mbf_mlx.errors import InputError
from mbf_mlx.files.safetensors_file import read_header

DTYPES: dict[str, np.dtype[Any]] = {  # safetensors' names -> what NumPy holds
    "F64": np.dtype("<f8"),
    "F32": np.dtype("<f4"),
    "F16": np.dtype("<f2"),
    "BF16": np.dtype("<u2"),
    "I64": np.dtype("<i8"),
    "I32": np.dtype("<i4"),
    "I16": np.dtype("<i2"),
    "I8": np.dtype("i1"),
    "U64": np.dtype("<u8"),
    "U32": np.dtype("<u4"),
    "U16": np.dtype("<u2"),
    "U8": np.dtype("u1"),
    "BOOL": np.dtype("?"),
}
FLOATS = ("F64", "F32", "F16", "BF16")
COPY_BYTES = 1 << 24  # of an untouched tensor at a time


@dataclass(frozen=True)
class Tensor:
    """A tensor's type and shape."""

    dtype: str  # safetensors' name, "BF16"
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        """Bytes of the data."""
        return int(np.prod(self.shape, dtype=np.int64)) * DTYPES[self.dtype].itemsize


@dataclass(frozen=True)
class Stored(Tensor):
    """A tensor in a file."""

    file: Path
    offset: int  # bytes from the start of the file

    def rows(self, first: int = 0, last: int | None = None) -> np.ndarray:
        """Return rows `first` to `last` (all by default) as NumPy holds them."""
        last = self.shape[0] if last is None else last
        row_bytes = self.nbytes // max(self.shape[0], 1)
        with open(self.file, "rb") as file:
            file.seek(self.offset + first * row_bytes)
            raw = file.read((last - first) * row_bytes)
        return np.frombuffer(raw, DTYPES[self.dtype]).reshape(last - first, *self.shape[1:])

    def floats(self, first: int = 0, last: int | None = None) -> np.ndarray:
        """Return rows `first` to `last` in float32."""
        return to_float32(self.rows(first, last), self.dtype)


def read_headers(files: list[Path]) -> tuple[dict[str, Stored], dict[Path, dict[str, str]]]:
    """Return every tensor of `files` by name, in the order of the bytes, and each file's metadata.

    Raises:
        InputError: a file is no complete safetensors file, holds an unknown type, or repeats a name.
    """
    tensors: dict[str, Stored] = {}
    metadata: dict[Path, dict[str, str]] = {}
    for path in files:
        entries, metadata[path] = read_header(path)
        for name, entry in sorted(entries.items(), key=lambda item: item[1].begin):
            if entry.dtype not in DTYPES:
                raise InputError(f"{path}: {name}: expected one of {', '.join(DTYPES)}, got {entry.dtype!r}")
            if name in tensors:
                raise InputError(f"{path}: {name}: is in {tensors[name].file.name}, too")
            tensors[name] = Stored(entry.dtype, entry.shape, path, entry.begin)
    return tensors, metadata


class Writer:
    """Writes one safetensors file whose tensors are known in advance, in any order.

    A context manager: when the block ends, the file is on the disk, not only in the system's memory.
    """

    def __init__(self, path: Path, tensors: dict[str, Tensor], metadata: dict[str, str] | None = None) -> None:
        header: dict[str, Any] = {"__metadata__": metadata} if metadata else {}
        offset = 0
        for name, tensor in tensors.items():
            end = offset + tensor.nbytes
            header[name] = {"dtype": tensor.dtype, "shape": list(tensor.shape), "data_offsets": [offset, end]}
            offset = end
        text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
        text += b" " * (-len(text) % 8)  # the data starts at a multiple of 8 bytes
        self._tensors = tensors
        self._start = {name: 8 + len(text) + header[name]["data_offsets"][0] for name in tensors}
        self._file: BinaryIO = open(path, "xb")
        try:
            self._file.write(len(text).to_bytes(8, "little") + text)
            self._file.truncate(8 + len(text) + offset)
        except OSError:
            self._file.close()
            raise

    def __enter__(self) -> "Writer":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        try:
            if kind is None:
                self._file.flush()
                os.fsync(self._file.fileno())
        finally:
            self._file.close()

    def write(self, name: str, array: np.ndarray, first: int = 0) -> None:
        """Write rows of a tensor, starting at row `first`, as NumPy holds them.

        Raises:
            ValueError: the rows do not have the announced type and shape.
        """
        tensor = self._tensors[name]
        if array.dtype != DTYPES[tensor.dtype] or array.shape[1:] != tensor.shape[1:]:
            raise ValueError(f"{name}: expected rows of {tensor}, got {array.dtype} {array.shape}")
        row_bytes = tensor.nbytes // max(tensor.shape[0], 1)
        self._file.seek(self._start[name] + first * row_bytes)
        self._file.write(np.ascontiguousarray(array).data.cast("B") if array.size else b"")

    def copy(self, name: str, source: Stored) -> None:
        """Copy a tensor's bytes from another file."""
        self._file.seek(self._start[name])
        for piece in _pieces(source):
            self._file.write(piece)


def _pieces(source: Stored) -> Iterator[bytes]:
    with open(source.file, "rb") as file:
        file.seek(source.offset)
        left = source.nbytes
        while left:
            piece = file.read(min(left, COPY_BYTES))
            left -= len(piece)
            yield piece


def to_float32(array: np.ndarray, dtype: str) -> np.ndarray:
    """Return a float tensor, as NumPy holds it, in float32."""
    if dtype == "BF16":
        return (array.astype(np.uint32) << 16).view(np.float32)
    return array.astype(np.float32)


def from_float32(array: np.ndarray, dtype: str) -> np.ndarray:
    """Return float32 values in a float type as NumPy holds it, rounded once to the nearest, ties to even."""
    if dtype != "BF16":
        return array.astype(DTYPES[dtype])
    bits = np.ascontiguousarray(array, dtype=np.float32).view(np.uint32)
    rounded = ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)
    return np.where(np.isnan(array), np.uint16(0x7FC0), rounded)
