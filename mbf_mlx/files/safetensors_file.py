"""Read and write safetensors files piece by piece. Their headers are checked before any native parser sees them.

A file is 8 bytes with the header's length, a JSON header (name -> dtype, shape, data_offsets) and the tensors' bytes
without gaps: https://github.com/huggingface/safetensors. dtypes.py says what the bytes mean.
"""

import json
import math
import struct
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from mbf_mlx.errors import InputError
from mbf_mlx.files import storage
from mbf_mlx.files.documents import first_repeated
from mbf_mlx.files.dtypes import BYTES, NUMPY, name_of
from mbf_mlx.files.storage import Data

if TYPE_CHECKING:
    import numpy as np

MAX_HEADER_BYTES = 100_000_000  # the format's own limit
MAX_LENGTH = (1 << 31) - 1  # the longest dimension: MLX counts in 32 bits
_CHUNK = 1 << 22  # bytes read or written at a time


class Entry(NamedTuple):
    """One tensor of a safetensors file."""

    name: str
    dtype: str  # "F16"
    shape: tuple[int, ...]
    begin: int  # where its first byte is in the file
    nbytes: int


def read_header(path: Path) -> tuple[dict[str, Entry], dict[str, str]]:
    """Return a file's tensors by name, and its metadata. Both are checked against the format and the file's size.

    Raises:
        InputError: it is no safetensors file, is cut off, or its header contradicts itself or the file.
    """
    try:
        with open(path, "rb") as file:
            size = file.seek(0, 2)
            file.seek(0)
            text = file.read(_header_length(file.read(8), size, path))
    except OSError as error:
        raise InputError(f"{path}: cannot read: {error.strerror}") from error
    return _check_header(text, size, path)


def header_of(data: Data, where: Path) -> tuple[dict[str, Entry], dict[str, str]]:
    """Return what `read_header` returns, for a file's bytes. `where` is the file's name in errors."""
    length = _header_length(data[:8], len(data), where)
    return _check_header(bytes(data[8 : 8 + length]), len(data), where)


def _header_length(head: Data, size: int, path: Path) -> int:
    """Return the header's length, which the first 8 bytes of a file hold."""
    length = struct.unpack("<Q", head)[0] if len(head) == 8 else 0
    if length < 2:
        raise InputError(f"{path}: not a safetensors file: expected 8 bytes with the length of its header")
    if length > min(size - 8, MAX_HEADER_BYTES):
        raise InputError(
            f"{path}: not a safetensors file, or cut off: expected a header of at most "
            f"{min(size - 8, MAX_HEADER_BYTES):,} bytes, got {length:,}"
        )
    return int(length)


def _check_header(text: bytes, size: int, path: Path) -> tuple[dict[str, Entry], dict[str, str]]:
    header = _parse(text, path)
    metadata = header.pop("__metadata__", None) or {}  # mlx writes null if it has none
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise _damaged(path, "__metadata__: expected strings by name")
    begin = 8 + len(text)
    entries = {name: _check_entry(name, value, begin, path) for name, value in header.items()}
    end = begin
    for entry in sorted(entries.values(), key=lambda entry: (entry.begin, entry.nbytes)):
        if entry.begin != end:
            raise _damaged(path, f"{entry.name}: expected its data at byte {end - begin}, got {entry.begin - begin}")
        end += entry.nbytes
    if end != size:
        raise _damaged(path, f"expected {end:,} bytes in all, got {size:,}; was it cut off?")
    return entries, metadata


def _parse(text: bytes, path: Path) -> dict[str, Any]:
    def once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        if (twice := first_repeated(name for name, _ in pairs)) is not None:
            raise _damaged(path, f"{twice} appears twice")
        return dict(pairs)

    try:
        header = json.loads(text.decode("utf-8"), object_pairs_hook=once)
        json.dumps(header, ensure_ascii=False).encode()  # refuses lone surrogates, which no text has
    except InputError:
        raise
    except (ValueError, RecursionError) as error:
        raise _damaged(path, f"not JSON: {error}") from error
    if not isinstance(header, dict):
        raise _damaged(path, f"expected a JSON object, got {type(header).__name__}")
    return header


def _check_entry(name: str, value: Any, begin: int, path: Path) -> Entry:
    if not isinstance(value, dict) or set(value) != {"dtype", "shape", "data_offsets"}:
        raise _damaged(path, f"{name}: expected dtype, shape and data_offsets, got {str(value)[:80]}")
    dtype, shape, offsets = value["dtype"], value["shape"], value["data_offsets"]
    if not isinstance(dtype, str) or dtype not in BYTES:
        raise _damaged(path, f"{name}: unknown dtype {str(dtype)[:40]!r}")
    if not isinstance(shape, list) or len(shape) > 8 or not all(_is_count(length, MAX_LENGTH) for length in shape):
        raise _damaged(path, f"{name}: impossible shape {str(shape)[:80]}")
    nbytes = BYTES[dtype]
    for length in shape:
        nbytes *= length
    if not isinstance(offsets, list) or len(offsets) != 2 or not all(_is_count(at, 1 << 62) for at in offsets):
        raise _damaged(path, f"{name}: expected two data_offsets, got {str(offsets)[:80]}")
    if offsets[1] - offsets[0] != nbytes:
        raise _damaged(path, f"{name}: {dtype} {tuple(shape)} takes {nbytes:,} bytes, its offsets span "
                             f"{offsets[1] - offsets[0]:,}")  # fmt: skip
    return Entry(name, dtype, tuple(shape), begin + offsets[0], nbytes)


def _is_count(value: Any, most: int) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value <= most


def _damaged(path: Path, what: str) -> InputError:
    return InputError(f"{path}: damaged safetensors file: {what}")


def read_bytes(path: Path, entry: Entry) -> Iterator[bytes]:
    """Yield the bytes of one tensor in chunks.

    Raises:
        InputError: the file ends before the tensor does.
    """
    with open(path, "rb") as file:
        file.seek(entry.begin)
        left = entry.nbytes
        while left:
            chunk = file.read(min(left, _CHUNK))
            if not chunk:
                raise _damaged(path, f"{entry.name}: its bytes end early; is another program writing the file?")
            left -= len(chunk)
            yield chunk


class Declared(NamedTuple):
    """Name, type and shape of a tensor that will be written."""

    name: str
    dtype: str
    shape: tuple[int, ...]


def write(path: Path, declared: list[Declared], arrays: "Iterable[np.ndarray]") -> None:
    """Write a safetensors file from arrays that come one at a time, in the declared order.

    Args:
        path: A new file.
        declared: All its tensors.
        arrays: Their values, in any NumPy type with the right bytes.

    Raises:
        ValueError: an array has more or fewer bytes than declared.
        InputError: the file cannot be written.
    """
    import numpy as np  # reading a header works without it

    head, end = header_bytes(declared, {"format": "mlx"})
    try:
        with open(path, "xb") as file:
            file.write(head)
            for tensor, array in zip(declared, arrays, strict=True):
                if array.nbytes != math.prod(tensor.shape) * BYTES[tensor.dtype]:
                    raise ValueError(f"{tensor.name}: declared {tensor.dtype} {tensor.shape}, got {array.nbytes} bytes")
                file.write(np.ascontiguousarray(array).data)
            file.flush()
    except OSError as error:
        raise storage.refusal(error, path, end) from error


def header_bytes(declared: Iterable[Declared], metadata: Mapping[str, str]) -> tuple[bytes, int]:
    """Return the bytes before a file's first tensor, and how many bytes the tensors take, in the declared order."""
    header: dict[str, Any] = {"__metadata__": dict(metadata)} if metadata else {}
    end = 0
    for name, dtype, shape in declared:
        begin, end = end, end + math.prod(shape) * BYTES[dtype]
        header[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [begin, end]}
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)  # the data starts at a multiple of 8 bytes, as readers expect
    return struct.pack("<Q", len(text)) + text, end


def safetensors_bytes(tensors: "Mapping[str, np.ndarray]", form: str = "mlx") -> memoryview:
    """Return the bytes of a safetensors file: the same that `safetensors.numpy.save` gives. Each tensor is copied once.

    Args:
        tensors: By name, in any order and memory layout.
        form: The value of "format" in the metadata.

    Raises:
        ValueError: a tensor of a type that we never write.
    """
    import numpy as np

    from mbf_mlx.device.threads import side_by_side

    order, types = list(NUMPY), {name: name_of(tensor.dtype) for name, tensor in tensors.items()}
    names = sorted(tensors, key=lambda name: (order.index(types[name]), name))
    declared = [Declared(name, types[name], tensors[name].shape) for name in names]
    head, size = header_bytes(declared, {"format": form})
    data, at = storage.new_memory(len(head) + size), len(head)
    data[:at] = head
    copies = []
    for name, dtype, shape in declared:
        copies.append((np.ndarray(shape, NUMPY[dtype], data, at), tensors[name]))
        at += copies[-1][0].nbytes
    side_by_side(lambda copy: np.copyto(*copy), copies, products=False)
    return data
