"""How many operations a training step of SmolLM2 hands to a GPU, with 1, 4 and 8 short rows in a batch.

A GPU pays for each operation that it is handed, however few tokens it computes: a step's fixed cost. This counts them
in the graph that mlx makes of a step through the engine for GPUs, before it is compiled and evaluated. Compiling fuses
some of them, so these are upper bounds. Nothing is timed; it runs anywhere.

    python benchmarks/kernels.py [--out benchmarks/results/kernels.json]
"""

import argparse
import re
import tempfile
from collections import Counter
from pathlib import Path
from typing import Any

import common
import numpy as np

TOKENS, ANSWER, BATCHES = 40, 4, (1, 4, 8)
VIEWS = {"Reshape", "Transpose", "ExpandDims", "Squeeze", "Broadcast", "AsStrided", "Slice", "Split", "Flatten",
         "Unflatten", "StopGradient", "CustomTransforms", "Depends", "Contiguous", "Copy"}  # fmt: skip


def rows_of(count: int, vocabulary: int) -> list[Any]:
    """Return random rows of TOKENS tokens that share nothing, the last ANSWER supervised."""
    from types import SimpleNamespace

    tokens = np.random.default_rng(0).integers(3, vocabulary, (count, TOKENS)).astype(np.int32)
    tokens[:, 0] = np.arange(count) + 3
    return [SimpleNamespace(tokens=line, supervised=np.arange(TOKENS) >= TOKENS - ANSWER) for line in tokens]


def graph(arrays: Any) -> Counter[str]:
    """Return how often each kind of operation stands in the graph that makes some arrays."""
    import mlx.core as mx
    from mlx.utils import tree_flatten

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "graph.dot"
        mx.export_to_dot(str(path), [array for _, array in tree_flatten(arrays)])
        return Counter(re.findall(r'label ="([A-Za-z]+)"[^\n]*shape=rectangle', path.read_text()))


def main() -> None:
    """Count, and print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path)
    out = parser.parse_args().out
    from mbf_mlx.device import backend

    backend.setup("cpu")
    from mlx import nn

    from mbf_mlx.base.load import load_base
    from mbf_mlx.config import LoRAConfig
    from mbf_mlx.data.batches import make_batch
    from mbf_mlx.engine.choose import prepare
    from mbf_mlx.engine.lora_layers import attach

    base = load_base(common.SMOLLM2, dequantize=False, dtype=None)
    attach(base.model, LoRAConfig())
    engine = prepare(base.model, by_hand=False, compiled=False)
    loss_and_grad = nn.value_and_grad(base.model, engine.loss_sum)
    results, lines = (
        {},
        ["| rows | tokens | operations | views beside them | operations for a token |", "|---|---|---|---|---|"],
    )
    for count in BATCHES:
        batch = make_batch(rows_of(count, engine.vocabulary), range(count))
        found = graph(loss_and_grad(batch))
        kernels = sum(number for kind, number in found.items() if kind not in VIEWS)
        views, tokens = sum(found.values()) - kernels, batch.real_tokens
        results[str(count)] = {"tokens": tokens, "operations": kernels, "views": views, "kinds": dict(found)}
        lines.append(f"| {count} | {tokens} | {kernels:,} | {views:,} | {kernels / tokens:.0f} |")
    common.finish(common.document("kernels", results), lines, out)


if __name__ == "__main__":
    main()
