"""Case d: the time to merge one task for an 8B model (32 blocks, 7 targets, rank 16), and that of `mbf absorb`.

The factors are random; the merge is the product's own, in NumPy. "Disk to disk" reads the state and the tuned adapter,
merges, writes and syncs the new generation, and switches to it.

    python benchmarks/merge.py [--shape llama-8b] [--rank 16] [--repeats 5] [--out FILE]
"""

import argparse
import shutil
import tempfile
import time
import uuid
from pathlib import Path
from typing import Any

import common
import numpy as np
import synthetic


def layers_of(shape: str) -> dict[str, tuple[int, int]]:
    """Return the (out, in) of all seven linear layers of every block."""
    hidden, intermediate, heads, kv_heads, head_dim, blocks, _, _ = synthetic.SHAPES[shape]
    block = synthetic.layers_of_block(hidden, intermediate, heads * head_dim, kv_heads * head_dim)
    return {f"model.layers.{i}.{key}": shape for i in range(blocks) for key, shape in block.items()}


def new_stream(path: Path, layers: dict[str, tuple[int, int]], rank: int, blocks: int) -> Any:
    from mbf_mlx.adapters.mlx_lm import block_keys
    from mbf_mlx.stream.folder import StreamFolder
    from mbf_mlx.stream.records import FORMAT_VERSION, BaseRecord, Identity

    base = BaseRecord(
        name="synthetic", fingerprint="f" * 64, quantization="none", architecture="llama", num_layers=blocks
    )
    identity = Identity(
        format_version=FORMAT_VERSION,
        id=uuid.uuid4().hex,
        base=base,
        method="slao",
        method_options={},
        rank=rank,
        scale=2.0,
        keys=list(block_keys(layers)),
        num_layers=blocks,
        dropout=0.0,
        template="none",
        template_sha256="",
        layers=layers,
    )
    return StreamFolder.create(path, identity, "models/synthetic", 0)


def tuned_adapter(stream: Any, folder: Path) -> Path:
    """Write the next start with small random changes, as an adapter in mlx-lm's layout."""
    from mbf_mlx.adapters import mlx_lm as adapter
    from mbf_mlx.methods import Pair, make

    rng = np.random.default_rng(0)
    start = make("slao").start(stream.state())
    tuned = {
        name: Pair(
            pair.a + 0.01 * rng.standard_normal(pair.a.shape, np.float32),
            pair.b + 0.01 * rng.standard_normal(pair.b.shape, np.float32),
        )
        for name, pair in start.items()
    }
    folder.mkdir()
    own = stream.identity
    for name, data in adapter.adapter_files(
        tuned, scale=own.scale, num_layers=own.num_layers, base="synthetic"
    ).items():
        (folder / name).write_bytes(data)
    return folder


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", default="llama-8b", choices=list(synthetic.SHAPES))
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    from mbf_mlx.exchange import absorb
    from mbf_mlx.stream.folder import StreamFolder

    layers, blocks = layers_of(options.shape), synthetic.SHAPES[options.shape][5]
    taken, whole = [], []
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        stream = new_stream(folder / "s", layers, options.rank, blocks)
        with stream.writer():
            absorb(stream, tuned_adapter(stream, folder / "first"), "first", force=True)
        tuned = tuned_adapter(stream, folder / "tuned")
        for number in range(options.repeats + 1):
            opened = StreamFolder.open(folder / "s")
            started = time.perf_counter()
            with opened.writer():
                absorb(opened, tuned, f"task{number}")
            taken.append(time.perf_counter() - started)
        for number in range(options.repeats):
            copy = folder / f"copy{number}"
            shutil.copytree(folder / "s", copy, symlinks=True)
            whole.append(common.command_seconds(common.mbf("absorb", copy, tuned, "--name", "again")))
        sizes = {path.name: path.stat().st_size for path in (folder / "s" / "current").rglob("*.safetensors")}
    results = {
        "layers": len(layers),
        "rank": options.rank,
        "disk_to_disk": taken[1:],
        "mbf_absorb": whole,
        "bytes": sizes,
    }
    lines = [
        "| what | seconds |",
        "|---|---|",
        f"| merge {len(layers)} layers of rank {options.rank}, disk to disk | {common.spread(taken[1:])} |",
        f"| `mbf absorb`, process included | {common.spread(whole)} |",
        "",
        ", ".join(f"{name} {count / 1e6:.0f} MB" for name, count in sizes.items()),
    ]
    common.finish(common.document("merge", results), lines, options.out)


if __name__ == "__main__":
    main()
