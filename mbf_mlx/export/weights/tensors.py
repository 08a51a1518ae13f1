"""safetensors files, read and written a few rows of one tensor at a time, so that no export holds a whole model.

files/dtypes.py says how NumPy holds each type. files/safetensors_file.py reads, checks and makes headers. What a tensor
means is left to checkpoint.py.
"""

from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path
from types import TracebackType
from typing import BinaryIO

import numpy as np

from mbf_mlx.errors import InputError
from mbf_mlx.files.dtypes import BYTES, NUMPY, to_float32
from mbf_mlx.files.safetensors_file import Declared, Entry, header_bytes, read_bytes, read_header
from mbf_mlx.files.storage import flush


@dataclass(frozen=True)
class Tensor:
    """A tensor's type and shape."""

    dtype: str  # safetensors' name, "BF16"
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        """Bytes of the data."""
        return int(np.prod(self.shape, dtype=np.int64)) * BYTES[self.dtype]


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
        return np.frombuffer(raw, NUMPY[self.dtype]).reshape(last - first, *self.shape[1:])

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
            if entry.dtype not in NUMPY:
                raise InputError(f"{path}: {name}: expected one of {', '.join(NUMPY)}, got {entry.dtype!r}")
            if name in tensors:
                raise InputError(f"{path}: {name}: is in {tensors[name].file.name}, too")
            tensors[name] = Stored(entry.dtype, entry.shape, path, entry.begin)
    return tensors, metadata


class Writer:
    """Writes one safetensors file whose tensors are known in advance, in any order.

    A context manager: when the block ends, the file is on the disk, not only in the system's memory.
    """

    def __init__(self, path: Path, tensors: dict[str, Tensor], metadata: dict[str, str] | None = None) -> None:
        head, size = header_bytes(
            [Declared(name, tensor.dtype, tensor.shape) for name, tensor in tensors.items()], metadata or {}
        )
        self._tensors = tensors
        ends = accumulate((tensor.nbytes for tensor in tensors.values()), initial=len(head))
        self._start = dict(zip(tensors, ends))
        self._file: BinaryIO = open(path, "xb")
        try:
            self._file.write(head)
            self._file.truncate(len(head) + size)
        except OSError:
            self._file.close()
            raise

    def __enter__(self) -> "Writer":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        try:
            if kind is None:
                self._file.flush()
                flush(self._file.fileno())
        finally:
            self._file.close()

    def write(self, name: str, array: np.ndarray, first: int = 0) -> None:
        """Write rows of a tensor, starting at row `first`, as NumPy holds them.

        Raises:
            ValueError: the rows do not have the announced type and shape.
        """
        tensor = self._tensors[name]
        if array.dtype != np.dtype(NUMPY[tensor.dtype]) or array.shape[1:] != tensor.shape[1:]:
            raise ValueError(f"{name}: expected rows of {tensor}, got {array.dtype} {array.shape}")
        row_bytes = tensor.nbytes // max(tensor.shape[0], 1)
        self._file.seek(self._start[name] + first * row_bytes)
        self._file.write(np.ascontiguousarray(array).data.cast("B") if array.size else b"")

    def copy(self, name: str, source: Stored) -> None:
        """Copy a tensor's bytes from another file."""
        self._file.seek(self._start[name])
        for piece in read_bytes(source.file, Entry(name, source.dtype, source.shape, source.offset, source.nbytes)):
            self._file.write(piece)
