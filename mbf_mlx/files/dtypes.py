"""Number types under safetensors' names ("BF16"): how NumPy holds each of them, and float32 values to and from them.

NumPy has no bfloat16. We hold such numbers as uint16: they are the upper 16 bits of a float32.
NumPy is imported inside the functions, because `mbf status` reads file headers and must not wait for NumPy.
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import numpy as np

# NumPy's code for each type, in the order in which the safetensors library puts tensors into a file.
NUMPY = {
    "U64": "<u8", "I64": "<i8", "F64": "<f8", "F32": "<f4", "U32": "<u4", "I32": "<i4", "BF16": "<u2", "F16": "<f2",
    "U16": "<u2", "I16": "<i2", "I8": "|i1", "U8": "|u1", "BOOL": "|b1",
}  # fmt: skip
FLOATS = ("F64", "F32", "F16", "BF16")
# What a config.json calls the types that weights are stored in.
CONFIG_NAMES = {"F32": "float32", "F16": "float16", "BF16": "bfloat16"}
# Bytes of one number. We read files with the last four types, but do not compute with them.
BYTES = {name: int(code[2:]) for name, code in NUMPY.items()} | {"C64": 8, "F8_E4M3": 1, "F8_E5M2": 1, "F8_E8M0": 1}


def name_of(dtype: "np.dtype[Any]") -> str:
    """Return safetensors' name of a NumPy type; uint16 is "U16", though it may hold bfloat16.

    Raises:
        ValueError: a type that we never write.
    """
    for name, code in NUMPY.items():
        if dtype == code and name != "BF16":
            return name
    raise ValueError(f"expected one of {', '.join(NUMPY)}, got {dtype}")


def to_float32(array: "np.ndarray", dtype: str) -> "np.ndarray":
    """Return a copy in float32 of numbers of one of the FLOATS, held as NUMPY says."""
    import numpy as np

    if dtype == "BF16":
        return (array.astype(np.uint32) << 16).view(np.float32)
    return array.astype(np.float32)


def from_float32(array: "np.ndarray", dtype: str) -> "np.ndarray":
    """Return float32 numbers as one of the FLOATS, held as NUMPY says. Rounds once: to the nearest, ties to even."""
    import numpy as np

    if dtype != "BF16":
        return array.astype(NUMPY[dtype])
    bits = np.ascontiguousarray(array, dtype=np.float32).view(np.uint32)
    rounded = ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)
    return np.where(np.isnan(array), np.uint16(0x7FC0), rounded)
