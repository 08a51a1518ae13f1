"""What an export takes in memory beside the size of the base's file: a Llama of 1 billion parameters, random, 4 bits.

Makes a base of Llama-3.2-1B's shapes with random codes (MLX affine, group 64), a stream on it with random factors on q
and v, and runs `mbf export` once for each target in a process of its own, measured by the system. Where ROWS stands the
export is compared with the live adapter on a few rows, as one is whose stream still finds its tasks. Everything is
deleted at the end. The limit is the base's file plus 1 GB.

    python benchmarks/export_memory.py [--targets mlx rows mlx-4 mlx-16 gguf gguf-F16] [--work DIR]
"""

import argparse
import json
import os
import shutil
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import common
import numpy as np

SHAPE = {
    "hidden_size": 2048,
    "intermediate_size": 8192,
    "num_hidden_layers": 16,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "head_dim": 64,
    "vocab_size": 128256,
    "tie_word_embeddings": True,
    "rope_theta": 500000.0,
}
GROUP, BITS = 64, 4
TARGETS = {  # name -> words of `mbf export`
    "mlx": ["mlx"],
    "rows": ["mlx", "--calibration", "ROWS"],
    "mlx-4": ["mlx", "--bits", "4", "--allow-loss", "--calibration", "ROWS"],
    "mlx-16": ["mlx", "--bits", "16", "--calibration", "ROWS"],
    "gguf": ["gguf", "--calibration", "ROWS"],
    "gguf-F16": ["gguf", "--bits", "16"],
}
ALLOWED = 1_000_000_000  # bytes beside the base's file
ROWS = "\n\n".join(f"Row {number} of a few: the weather was fine, and the train was late." for number in range(8))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--targets", nargs="+", default=list(TARGETS), choices=list(TARGETS))
    parser.add_argument("--work", type=Path, help="a folder with some 5 GB; a temporary one by default")
    parser.add_argument("--out", type=Path, help="a JSON file for the results")
    parser.add_argument("--layers", type=int, default=SHAPE["num_hidden_layers"], help="blocks; fewer for a try")
    options = parser.parse_args()
    kept = common.Kept("export_memory", options.out)
    lines = ["| export | out | seconds | peak of the process | beside the base's file |", "|---|---|---|---|---|"]
    work = Path(tempfile.mkdtemp(dir=options.work))
    try:
        base = write_base(work / "base", options.layers)
        write_stream(work / "stream", base, options.layers)
        (work / "rows.txt").write_text(ROWS)
        size = (base / "model.safetensors").stat().st_size
        for name in options.targets:
            lines.append(_line(name, kept.once(name, lambda name=name: measure(work, name, size))))
            print(lines[-1], file=sys.stderr)
    finally:
        shutil.rmtree(work)
    lines += ["", f"The base's file: {size / 1e6:.0f} MB; allowed beside it: {ALLOWED / 1e6:.0f} MB"]
    common.finish(common.document("export_memory", kept.results), lines, options.out)
    if any(found["beside"] > ALLOWED for found in kept.results.values()):
        raise SystemExit("over the limit")


def _line(name: str, row: dict[str, Any]) -> str:
    over = "" if row["beside"] <= ALLOWED else " (over the limit)"
    return (
        f"| `{' '.join(TARGETS[name])}` | {row['out'] / 1e6:.0f} MB | {row['seconds']:.0f}"
        f" | {row['peak'] / 1e6:.0f} MB | {row['beside'] / 1e6:.0f} MB{over} |"
    )


def write_base(folder: Path, blocks: int) -> Path:
    """Write a model folder of the right shapes; the tokenizer is a small one of the tests, its vocabulary padded."""
    from mbf_mlx.export.weights.tensors import Tensor, Writer
    from tests.support.tiny_llama import CONFIG, write_tokenizer

    folder.mkdir()
    hidden, inner, head = SHAPE["hidden_size"], SHAPE["intermediate_size"], SHAPE["head_dim"]
    keys = SHAPE["num_key_value_heads"] * head
    linear = {"self_attn.q_proj": (hidden, hidden), "self_attn.k_proj": (keys, hidden)}
    linear |= {"self_attn.v_proj": (keys, hidden), "self_attn.o_proj": (hidden, hidden)}
    linear |= {"mlp.gate_proj": (inner, hidden), "mlp.up_proj": (inner, hidden), "mlp.down_proj": (hidden, inner)}
    layers = {"model.embed_tokens": (SHAPE["vocab_size"], hidden)}
    layers |= {f"model.layers.{block}.{key}": shape for block in range(blocks) for key, shape in linear.items()}
    norms = [f"model.layers.{n}.{kind}_layernorm" for n in range(blocks) for kind in ("input", "post_attention")]
    tensors = {f"{name}.weight": Tensor("BF16", (hidden,)) for name in (*norms, "model.norm")}
    for name, (out, inputs) in layers.items():
        tensors[f"{name}.weight"] = Tensor("U32", (out, inputs * BITS // 32))
        tensors |= {f"{name}.{part}": Tensor("BF16", (out, inputs // GROUP)) for part in ("scales", "biases")}
    generator = np.random.default_rng(0)
    with Writer(folder / "model.safetensors", tensors, {"format": "mlx"}) as writer:
        for name, tensor in tensors.items():
            writer.write(name, _values(name, tensor.shape, generator))
    write_tokenizer(folder)
    config = {**CONFIG, **SHAPE, "num_hidden_layers": blocks, "torch_dtype": "bfloat16"}
    config["quantization"] = {"group_size": GROUP, "bits": BITS, "mode": "affine"}
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def _values(name: str, shape: tuple[int, ...], generator: np.random.Generator) -> np.ndarray:
    """Return random codes around their middle; weights of about 0.02, norms of 1."""
    if len(shape) == 1:
        return np.full(shape, 0x3F80, np.uint16)  # 1 in bfloat16
    if name.endswith(".weight"):
        return generator.integers(0, 1 << 32, shape, dtype=np.uint32)
    return np.full(shape, 0x3B80 if name.endswith(".scales") else 0xBCF0, np.uint16)  # 1/256 and -7.5/256


def write_stream(path: Path, base: Path, blocks: int) -> None:
    """Write a stream that has learned one task, of which nothing is left but random factors."""
    from mbf_mlx import Stream
    from mbf_mlx.config import LoRAConfig
    from mbf_mlx.methods import Pair, make
    from tests.support.streams import record

    stream = Stream.open(path, base=str(base), lora=LoRAConfig(), load=False)
    method, state, generator = make("slao"), stream.folder.state(), np.random.default_rng(1)
    start = method.start(state)
    tuned = {
        name: Pair(a, 0.002 * generator.standard_normal(b.shape, dtype=np.float32)) for name, (a, b) in start.items()
    }
    with stream.folder.writer():
        stream.folder.commit(stream.folder.current(), method.finish(state, tuned), record(1), str(base), {})


def measure(work: Path, name: str, base_bytes: int) -> dict[str, Any]:
    """Run one export; return its seconds and the most memory that its process held."""
    out = work / ("out.gguf" if name.startswith("gguf") else "out")
    target, *flags = (str(work / "rows.txt") if word == "ROWS" else word for word in TARGETS[name])
    words = ["export", str(work / "stream"), target, str(out), *flags]
    began = time.monotonic()
    process = os.posix_spawn(sys.executable, [sys.executable, str(common.ROOT / "cli.py"), *words], os.environ)
    _, status, usage = os.wait4(process, 0)
    if status:
        raise SystemExit(f"{' '.join(words)}: exit status {os.waitstatus_to_exitcode(status)}")
    seconds = time.monotonic() - began
    peak = usage.ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    files = [out] if out.is_file() else [file for file in out.rglob("*") if file.is_file()]
    size = sum(file.stat().st_size for file in files)
    out.unlink() if out.is_file() else shutil.rmtree(out)
    return {"out": size, "seconds": seconds, "peak": peak, "beside": peak - base_bytes}


if __name__ == "__main__":
    main()
