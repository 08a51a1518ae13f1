"""How much of what three tasks taught survives each way of fusing it into 4-bit weights, beside `mlx_lm.fuse`.

For each base, SmolLM2-135M as its own GGUF quantizes it (4 bits, group 32) and as mlx quantizes it (affine, 4 bits,
group 64, as the hub's MLX models are): learn three tasks, then ask the live adapter and every export the same held-out
rows. Accuracy is the share of rows whose every token is right; KL divergence is from the live adapter, at the answers'
tokens, in nats; "gain kept" is (export - base) / (live - base). Streams stay in the work folder and are not learned
again.

    python benchmarks/export_accuracy.py [--work DIR] [--tasks amazon langid sarcasm] [--train-rows 160]
"""

import argparse
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import common
import numpy as np
from common import ROOT

from mbf_mlx.engine.lora_layers import attach, lora_layers, write_factors

TASKS = ("amazon", "langid", "sarcasm")  # of 2, 12 and 2 labels, the shortest texts
DATA = ROOT.parent / "shared" / "data" / "tasks"
BASES = {
    "mlx": "Re-quantized by mlx: affine, 4 bits, group 64, as the hub's 4-bit MLX models are",
    "gguf": "Its own GGUF (Q4_1): 4 bits, group 32, embeddings 8 bits",
}
EXPORTS = ("default", "16", "plain", "chance", "4", "one", "nearest", "new", "search")
SHRINK = (1.0, 0.95, 0.9, 0.85, 0.8)  # of a group's range, for grids that are searched


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, default=ROOT / "build" / "export_accuracy")
    parser.add_argument("--data", type=Path, default=DATA, help="a folder of tasks, NAME/{train,test}.jsonl")
    parser.add_argument("--model", default="smollm2-135m-instruct", help="the base")
    parser.add_argument("--bases", nargs="+", default=list(BASES), choices=list(BASES))
    parser.add_argument("--tasks", nargs="+", default=list(TASKS))
    parser.add_argument("--train-rows", type=int, default=160)
    parser.add_argument("--test-rows", type=int, default=100)
    parser.add_argument("--rows", type=int, default=1000, help="test rows of a task that exports are asked, at most")
    parser.add_argument("--exports", nargs="+", default=list(EXPORTS), choices=list(EXPORTS))
    parser.add_argument("--epochs", type=int, default=2)
    parser.add_argument("--learning-rate", type=float, default=1e-3)
    parser.add_argument("--keys", nargs="+", default=["q_proj", "v_proj"])
    parser.add_argument("--out", type=Path, help="a JSON file for the results")
    options = parser.parse_args()
    if not options.data.is_dir():
        print(f"skipped: no tasks in {options.data}")
        return
    from mbf_mlx.base import sources
    from mbf_mlx.device import backend

    backend.setup()
    options.work.mkdir(parents=True, exist_ok=True)
    tasks = [short_task(options, name) for name in options.tasks]
    own = sources.resolve_base(options.model).path
    kept = common.Kept("export_accuracy", options.out)
    lines: list[str] = []
    for kind in options.bases:
        base = own if kind == "gguf" else requantized(own, options.work / "mlx-base")
        rows = kept.once(kind, lambda kind=kind, base=base: asked(kind, base, tasks, options))
        lines += table(kind, rows)
    common.finish(common.document("export_accuracy", kept.results), lines, options.out)


def asked(kind: str, base: Path, tasks: list[Path], options: argparse.Namespace) -> list[dict[str, Any]]:
    """Teach a base the tasks, and return what the live adapter and every export answer."""
    stream = taught(options.work / f"stream-{kind}", base, tasks, options)
    return list(measure(stream, base, options.work / "fused", options.rows, options.exports))


def short_task(options: argparse.Namespace, name: str) -> Path:
    """Return a folder with the first rows of a task."""
    folder = options.work / f"tasks-{options.train_rows}-{options.test_rows}" / name
    folder.mkdir(parents=True, exist_ok=True)
    for split, count in (("train", options.train_rows), ("test", options.test_rows)):
        lines = (options.data / name / f"{split}.jsonl").read_text(encoding="utf-8").splitlines(keepends=True)
        (folder / f"{split}.jsonl").write_text("".join(lines[:count]), encoding="utf-8")
    return folder


def requantized(own: Path, out: Path) -> Path:
    """Return the same model quantized by mlx: affine, 4 bits, group 64, embeddings too."""
    if not (out / "config.json").is_file():
        from mlx_lm import convert

        plain = out.with_name(f"{out.name}-plain")
        for folder in (plain, out):
            shutil.rmtree(folder, ignore_errors=True)
        convert(str(own), str(plain), dequantize=True, dtype="float32")
        convert(str(plain), str(out), quantize=True, q_bits=4, q_group_size=64)
        shutil.rmtree(plain)
    return out


def taught(path: Path, base: Path, tasks: list[Path], options: argparse.Namespace) -> Any:
    """Return a stream that has learned the tasks; what it has learned already is skipped."""
    from mbf_mlx import Stream
    from mbf_mlx.config import LoRAConfig

    stream = Stream.open(path, base=str(base), lora=LoRAConfig(keys=tuple(options.keys)))
    stream.learn(*tasks, epochs=options.epochs, learning_rate=options.learning_rate, score_tasks=1)
    return stream


def measure(stream: Any, base: Path, out: Path, measured: int, only: list[str]) -> Iterator[dict[str, Any]]:
    """Yield one row of the table for the base, the live adapter and each export in `only`, on so many rows a task."""
    from mbf_mlx.base.load import load_base
    from mbf_mlx.config import DataConfig, LoRAConfig
    from mbf_mlx.data.encode import Encoder
    from mbf_mlx.data.task import read_task
    from mbf_mlx.export import make_job
    from mbf_mlx.export.mlx_folder import write_mlx_folder
    from mbf_mlx.export.quality import compare as quality
    from mbf_mlx.export.quality.input_moments import moments
    from mbf_mlx.export.quality.sample_rows import rows_of_tasks
    from mbf_mlx.export.weights import fuse
    from mbf_mlx.export.weights.rounding import Rounder, no_rounder
    from mbf_mlx.methods import Pair

    identity, factors = stream.folder.identity, stream.folder.state().deployed
    quality.KEPT_BYTES = 1 << 30  # all rows count
    live = load_base(base, dequantize=True, dtype="float32")
    attach(live.model, LoRAConfig(rank=identity.rank, scale=identity.scale, keys=tuple(identity.keys)))
    write_factors(live.model, factors)
    encoder = Encoder(live.tokenizer, DataConfig(template=identity.template))
    history = stream.folder.history()
    rows = [
        row
        for record in history
        for row in encoder.all(read_task(Path(record.path)).test[:measured], Path(record.path))
    ]
    reference = quality.Reference(live.model, rows)
    inputs: dict[str, np.ndarray] = {}
    for names, matrix in moments(
        live.model,
        lora_layers(live.model),
        rows_of_tasks(history, live.tokenizer, DataConfig(), stream.folder.path).fit,
    ):
        inputs.update(dict.fromkeys(names, matrix))
    write_factors(live.model, {name: Pair(a, np.zeros_like(b)) for name, (a, b) in factors.items()})
    bare = reference.compare(live.model)
    size = weight_bytes(base)
    yield row_of("base", bare, bare, size, size)
    yield {
        **row_of("live adapter", bare, bare, size, size),
        "accuracy": bare.live,
        "kl": 0.0,
        "agreement": 1.0,
        "gain_kept": 1.0,
    }
    del live

    def ask(name: str, retention: float | None = None, seconds: float = 0.0) -> dict[str, Any]:
        found = reference.compare(load_base(out, dequantize=True, dtype="float32").model)
        row = row_of(name, found, bare, weight_bytes(out), size)
        print(f"  {name}: {found.exported:.3f}, KL {found.kl:.4f}", file=sys.stderr, flush=True)
        shutil.rmtree(out)
        return {**row, "retention": retention, "seconds": round(seconds, 1)}

    def ours(name: str, bits: int | None, rounder: Callable[[np.ndarray], Any] | None) -> dict[str, Any]:
        began = time.monotonic()
        rounders = (lambda layer: rounder(inputs[layer])) if rounder else no_rounder
        report = write_mlx_folder(make_job(stream, out, bits=bits), rounders)
        return ask(name, float(np.mean([layer.retention for layer in report.layers])), time.monotonic() - began)

    def plain() -> dict[str, Any]:
        adapter = stream.folder.path / "adapter"
        command = [sys.executable, "-m", "mlx_lm", "fuse", "--model", base, "--adapter-path", adapter]
        shutil.rmtree(out, ignore_errors=True)
        subprocess.run([*map(str, command), "--save-path", str(out)], check=True, capture_output=True)
        return ask("mlx_lm.fuse, 4 bits")

    def anew(name: str, shrink: tuple[float, ...]) -> dict[str, Any]:
        kept = fuse._round_on_grid
        fuse._round_on_grid = new_grid(shrink)
        try:
            return ours(f"4 bits: codes chosen together, {name}", 4, Rounder)
        finally:
            fuse._round_on_grid = kept

    exports: dict[str, Callable[[], dict[str, Any]]] = {
        "default": lambda: ours("default: touched layers at 8 bits", None, None),
        "16": lambda: ours("--bits 16", 16, None),
        "plain": plain,
        "chance": lambda: ours("4 bits: by chance on the base's grid", 4, None),
        "4": lambda: ours("4 bits: codes chosen together (--bits 4)", 4, Rounder),
        "one": lambda: ours("4 bits: one input after the other (GPTQ), base's grid", 4, lambda h: OneByOne(h)),
        "nearest": lambda: ours("4 bits: nearest on the base's grid", 4, lambda h: nearest),
        "new": lambda: anew("a new grid", (1.0,)),
        "search": lambda: anew("a new grid, scale searched", SHRINK),
    }
    for name in only:
        yield exports[name]()


def nearest(target: np.ndarray, grid: Any, bits: int) -> np.ndarray:
    """Round each weight to the code next to it."""
    from mbf_mlx.export.weights import affine

    scales, offsets = grid
    return affine.nearest(target, np.where(scales == 0, np.float32(1), scales), offsets, bits)


def OneByOne(moment: np.ndarray) -> Any:
    """Return a rounder that makes up for errors but does not come back to a code."""
    from mbf_mlx.export.weights.rounding import Rounder

    rounder = Rounder(moment)
    rounder._improve = lambda *args: None  # type: ignore[method-assign]
    return rounder


def new_grid(shrink: tuple[float, ...]) -> Callable[..., Any]:
    """Return `fuse._round_on_grid` for a grid that is fitted to the sum, its range the best of some shares."""
    from mbf_mlx.export.weights import affine, fuse

    def encode(layer: Any, form: Any, target: np.ndarray, rows: tuple[int, int], rounder: Any) -> Any:
        setting = form.setting
        grouped = target.reshape(len(target), -1, setting.group_size)
        middle = (grouped.max(-1, keepdims=True) + grouped.min(-1, keepdims=True)) / 2
        best = None
        for share in shrink:
            squeezed = (middle + share * (grouped - middle)).reshape(target.shape)
            scales, offsets = affine.fit(squeezed, setting.bits, setting.group_size, form.dtype)
            codes = affine.nearest(target, scales, offsets, setting.bits)
            wrong = ((affine.decode(codes, scales, offsets) - target) ** 2).reshape(grouped.shape).sum(-1)
            if best is None:
                best = [wrong, scales, offsets]
            better = wrong < best[0]
            best = [np.where(better, new, old) for new, old in zip((wrong, scales, offsets), best, strict=True)]
        _, scales, offsets = best
        codes = rounder(target, (scales, offsets), setting.bits)
        return fuse.pack_rows(layer.name, codes, scales, offsets, form), affine.decode(codes, scales, offsets)

    return encode


def weight_bytes(folder: Path) -> int:
    """Return the bytes of a folder's weights."""
    return sum(path.stat().st_size for path in folder.glob("*.safetensors"))


def row_of(name: str, found: Any, bare: Any, size: int, base_size: int) -> dict[str, Any]:
    """Return one row of the table."""
    gain = bare.live - bare.exported
    kept = (found.exported - bare.exported) / gain if gain else None
    numbers = {"accuracy": found.exported, "kl": found.kl, "agreement": found.agreement, "gain_kept": kept}
    return {"name": name, **numbers, "bytes": size, "times_base": size / base_size, "rows": found.rows}


def table(kind: str, rows: list[dict[str, Any]]) -> list[str]:
    """Return the rows as lines of Markdown."""
    lines = [
        f"{BASES[kind]}; {rows[0]['rows']} rows",
        "",
        "| export | accuracy | gain kept | KL | same top token | retention | size |",
    ]
    lines += ["|---|---|---|---|---|---|---|"]
    for row in rows:
        retention = f"{row['retention']:.3f}" if row.get("retention") is not None else ""
        kept = f"{100 * row['gain_kept']:.0f} %" if row["gain_kept"] is not None else ""
        accuracy, same = (f"{100 * row[key]:.1f} %" for key in ("accuracy", "agreement"))
        lines.append(
            f"| {row['name']} | {accuracy} | {kept} | {row['kl']:.4f} | {same} | {retention}"
            f" | {row['bytes'] / 1e6:.1f} MB, {row['times_base']:.2f} |"
        )
    return [*lines, ""]


if __name__ == "__main__":
    main()
