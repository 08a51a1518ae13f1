"""GGUF files as gguf's own reader gives them, and rows brought back from GGUF's order."""

import gguf
import numpy as np
from gguf import quants

from mbf_mlx.base.gguf import convert as gguf_import

LLAMA3_ROPE = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}


def read(path):
    """Tensors and settings of a GGUF file."""
    reader = gguf.GGUFReader(path)
    tensors = {tensor.name: tensor for tensor in reader.tensors}
    return tensors, {key: field.contents() for key, field in reader.fields.items()}


def weights(tensor):
    """A tensor's weights in float32, decoded by gguf."""
    return quants.dequantize(np.array(tensor.data), tensor.tensor_type).astype(np.float32)


def as_mlx(rows, heads):
    """Rows in GGUF's order brought back to MLX's, written apart from the code under test: row 2 i is row i, ..."""
    size = len(rows) // heads
    back = np.empty_like(rows)
    for head in range(heads):
        for i in range(size // 2):
            back[head * size + i] = rows[head * size + 2 * i]
            back[head * size + size // 2 + i] = rows[head * size + 2 * i + 1]
    return back


def import_gguf(path, folder):
    folder.mkdir()
    gguf_import.convert(path, folder)
