"""The `gguf-adapter` target: the adapter alone as a GGUF file, for llama.cpp's `--lora` and Ollama's `ADAPTER`.

It is for a base that is served from a GGUF file of its own. A stays (rank, in) and B (out, rank); the rows of B are in
the order of the base's rows, which GGUF changes in q and k. llama.cpp multiplies B @ A by alpha / rank, so alpha =
scale * rank. Needs numpy, gguf and the base's config.json; no mlx and no weights.
"""

from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import gguf
import numpy as np

from mbf_mlx.base.gguf.names import Names, read_names
from mbf_mlx.base.sources import read_config
from mbf_mlx.errors import InputError
from mbf_mlx.export.job import Job
from mbf_mlx.export.place import fresh_file
from mbf_mlx.methods import Factors

MAKER = "general.quantized_by"  # the setting by which we recognise our own files
OURS = "mbf-mlx"


@dataclass(frozen=True)
class AdapterReport:
    """What a `gguf-adapter` export did."""

    nbytes: int
    layers: int
    rank: int
    alpha: float


def write_gguf_adapter(job: Job) -> AdapterReport:
    """Write the deployed pair of every layer as one GGUF file, in float32, and read it back.

    Servers show the adapter under the file's name without its suffix.

    Raises:
        InputError: a layer that GGUF adapters cannot change, or `job.out` may not be written.
    """
    names = read_names(read_config(job.base), job.base)
    tensors = adapter_tensors(job.factors, names)
    rank = next(iter(job.factors.values())).a.shape[0]
    nbytes = sum(array.nbytes for array in tensors.values())
    with fresh_file(job.out, force=job.force, needs=nbytes, forbidden=job.off_limits, is_ours=is_ours) as path:
        _write(path, tensors, names, job.scale * rank, job.out.stem)
        _compare(path, tensors)
        return AdapterReport(path.stat().st_size, len(job.factors), rank, job.scale * rank)


def adapter_tensors(factors: Factors, names: Names) -> dict[str, np.ndarray]:
    """Return the file's tensors: `blk.0.attn_q.weight.lora_a` (rank, in) and `.lora_b` (out, rank), float32.

    Raises:
        InputError: with every layer that has no place in a GGUF adapter.
    """
    tensors, wrong = {}, []
    for layer, pair in factors.items():
        target = names.tensor(f"{layer}.weight")
        if target is None or target.startswith(("token_embd", "output")):
            wrong.append(f"  {layer}")
            continue
        b, order = np.asarray(pair.b, np.float32), names.order(layer, pair.b.shape[0])
        tensors[f"{target}.lora_a"] = np.ascontiguousarray(pair.a, dtype=np.float32)
        tensors[f"{target}.lora_b"] = np.ascontiguousarray(b if order is None else b[order])
    if wrong or not factors:
        listed = "\n".join(wrong) if wrong else "  it has no factors at all"
        raise InputError(f"a GGUF adapter cannot hold these layers; export gguf, which fuses them:\n{listed}")
    return tensors


def _write(path: Path, tensors: dict[str, np.ndarray], names: Names, alpha: float, name: str) -> None:
    writer = gguf.GGUFWriter(path, names.architecture)
    writer.add_type(gguf.GGUFType.ADAPTER)
    writer.add_name(name)
    writer.add_string(MAKER, OURS)
    writer.add_string(gguf.Keys.Adapter.TYPE, "lora")
    writer.add_float32(gguf.Keys.Adapter.LORA_ALPHA, alpha)
    for tensor, array in tensors.items():
        writer.add_tensor_info(tensor, array.shape, array.dtype, array.nbytes)
    write_head(writer)
    with open(path, "ab") as file:
        for array in tensors.values():
            pad(file, writer.data_alignment)
            file.write(array.data)
        pad(file, writer.data_alignment)


def write_head(writer: gguf.GGUFWriter) -> None:
    """Write a file up to its tensors' data. gguf's own writer would lose data that no longer fits on the disk."""
    with closing(writer):
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()


def pad(file: BinaryIO, alignment: int) -> None:
    """Pad a file with zeros to where the next tensor may begin."""
    file.write(bytes(-file.tell() % alignment))


def _compare(path: Path, tensors: dict[str, np.ndarray]) -> None:
    """Raise RuntimeError if the file does not hold exactly these tensors."""
    stored = {tensor.name: np.asarray(tensor.data) for tensor in gguf.GGUFReader(path).tensors}
    if stored.keys() != tensors.keys() or any(not np.array_equal(stored[key], tensors[key]) for key in tensors):
        raise RuntimeError(f"{path}: what was read back is not what was written")


def is_ours(path: Path) -> bool:
    """Return whether a file is a GGUF file that we exported; its first bytes say so."""
    if not path.is_file():
        return False
    with open(path, "rb") as file:
        head = file.read(4096)
    return head.startswith(b"GGUF") and _string(MAKER) + _STRING_TYPE + _string(OURS) in head


_STRING_TYPE = int(gguf.GGUFValueType.STRING).to_bytes(4, "little")


def _string(text: str) -> bytes:
    return len(text).to_bytes(8, "little") + text.encode()
