"""Where the time of a training step goes, by kind of operation, on the CPU path: the table in benchmarks/README.md.

Every matrix product is evaluated as soon as it is asked for, and it and the functions between the products are timed
one by one; what is left is Python, mlx's graph, additions and copies. Seconds are the process's CPU time, summed over
its threads, so that other programs do not count; they are medians over the steps, and so is a step without any of this
beside them. The products' floating-point operations are counted, and give their rate.

    python benchmarks/profile_step.py [--cases last8 all rows] [--steps 5] [--packed] [--model FOLDER] [--out FILE]
"""

import argparse
import importlib
import statistics
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import common
import numpy as np
import step

from mbf_mlx.device.machine import freed_memory_kept

# (module of mbf_mlx, function) -> what it is in the table
KINDS = {
    ("engine.cpu_ops", "swiglu"): "SwiGLU: exp",
    ("engine.cpu_ops", "swiglu_backward_"): "SwiGLU: exp",
    ("engine.llama_attention", "softmax_"): "attention: softmax",
    ("engine.llama_attention", "softmax_backward_"): "attention: softmax",
    ("engine.llama_attention", "to_rows"): "attention: rotary angles, rows and tokens",
    ("engine.llama_attention", "to_tokens"): "attention: rotary angles, rows and tokens",
    ("engine.cpu_ops", "rms_norm"): "norms",
    ("engine.cpu_ops", "rms_norm_backward_"): "norms",
    ("engine.cpu_ops", "cross_entropy_"): "loss: exp and gradient",
    ("base.unpack", "_rows"): "unpacking weights",
    ("data.batches", "make_batch"): "the batch",
}
LINEAR, LORA = "products: linear layers", "products: LoRA"
LOGITS, ATTENTION = "products: logits", "products: attention"
OPTIMIZER, REST = "AdamW", "the rest: Python, mlx's graph, additions, copies"


class Clock:
    """CPU seconds by kind; of nested kinds the inner one counts."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = defaultdict(float)
        self.flops: dict[str, int] = defaultdict(int)
        self._inner: list[float] = [0.0]

    @contextmanager
    def timed(self, kind: str) -> Iterator[None]:
        started = time.process_time()
        self._inner.append(0.0)
        yield
        taken = time.process_time() - started
        self.seconds[kind] += taken - self._inner.pop()
        self._inner[-1] += taken


@contextmanager
def watched(clock: Clock, mx: Any, rank: int, vocabulary: int) -> Iterator[None]:
    """Time products and the functions of KINDS while this is open."""
    addmm, matmul = mx.addmm, mx.array.__matmul__
    before: list[tuple[Any, str, Any]] = [(mx, "addmm", addmm), (mx.array, "__matmul__", matmul)]

    def product(run: Callable[[], Any], a: Any, b: Any, *more: Any) -> Any:
        sizes = a.shape[-2], a.shape[-1], b.shape[-1]
        kind = ATTENTION if a.ndim > 2 else LORA if rank in sizes[1:] else LOGITS if vocabulary in sizes else LINEAR
        mx.eval(a, b, *more)
        clock.flops[kind] += 2 * int(np.prod(np.broadcast_shapes(a.shape[:-2], b.shape[:-2]))) * int(np.prod(sizes))
        with clock.timed(kind):
            result = run()
            mx.eval(result)
        return result

    def of(kind: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*given: Any, **named: Any) -> Any:
            mx.eval([each for each in given if isinstance(each, mx.array)])
            with clock.timed(kind):
                result = function(*given, **named)
                if isinstance(result, mx.array):
                    mx.eval(result)
            return result

        return call

    mx.addmm = lambda c, a, b: product(lambda: addmm(c, a, b), a, b, c)
    mx.array.__matmul__ = lambda a, b: product(lambda: matmul(a, b), a, b)
    for (module, name), kind in KINDS.items():
        owner = importlib.import_module(f"mbf_mlx.{module}")
        before.append((owner, name, getattr(owner, name)))
        setattr(owner, name, of(kind, getattr(owner, name)))
    try:
        yield
    finally:
        for owner, name, own in before:
            setattr(owner, name, own)


@freed_memory_kept()  # as mbf learn trains
def profile(case: str, options: argparse.Namespace) -> dict[str, Any]:
    """Return the CPU seconds of a step by kind, and those of a step that nobody watches."""
    import mlx.core as mx
    import mlx.optimizers as optim
    from mlx import nn
    from mlx.utils import tree_map

    from mbf_mlx.config import LoRAConfig
    from mbf_mlx.data import batches
    from mbf_mlx.learning.learner import load_learner

    learner = load_learner(options.model, LoRAConfig(rank=step.RANK), options.packed)
    learner.engine.cores = 1  # one clock cannot watch several threads
    network, optimizer = learner.base.model, optim.AdamW(learning_rate=step.RATE)
    loss_and_grad = nn.value_and_grad(network, learner.engine.loss_sum)
    clock = Clock()

    def one(rows: list[Any]) -> None:
        batch = batches.make_batch(rows, range(len(rows)))
        loss, gradients = loss_and_grad(batch)
        mx.eval(loss, gradients)
        with clock.timed(OPTIMIZER):
            optimizer.update(network, tree_map(lambda g: g / len(batch.targets), gradients))
            mx.eval(network.trainable_parameters(), optimizer.state)

    found: dict[str, list[float]] = defaultdict(list)
    work: dict[str, list[float]] = defaultdict(list)
    plain = []
    for number, rows in enumerate(step.batches_of(case, options.model, options.steps + 1)):
        started = time.process_time()
        one(rows)
        taken = time.process_time() - started
        clock.seconds.clear()
        clock.flops.clear()
        with watched(clock, mx, step.RANK, learner.engine.vocabulary):
            started = time.process_time()
            one(rows)
            whole = time.process_time() - started
        if number:  # the first is slower: threads start, memory is taken
            plain.append(taken)
            for kind, seconds in clock.seconds.items():
                found[kind].append(seconds)
            found[REST].append(whole - sum(clock.seconds.values()))
            for kind, flops in clock.flops.items():
                work[kind].append(flops)
    seconds, flops = ({kind: statistics.median(each) for kind, each in part.items()} for part in (found, work))
    return {"seconds": seconds, "flops": flops, "unwatched": plain}


def table(case: str, found: dict[str, Any]) -> list[str]:
    """Return a case's lines of Markdown, the largest kind first."""
    whole = sum(found["seconds"].values())
    lines = ["", f"| {case} | CPU s | share | GFLOP | GFLOP/s of CPU time |", "|---|---|---|---|---|"]
    for kind, seconds in sorted(found["seconds"].items(), key=lambda item: -item[1]):
        work = found["flops"].get(kind, 0) / 1e9
        rate = f"{work:.2f} | {work / max(seconds, 1e-9):.0f}" if work else " | "
        lines.append(f"| {kind} | {seconds:.3f} | {seconds / whole:.0%} | {rate} |")
    lines.append(f"| all of it | {whole:.3f} | | {sum(found['flops'].values()) / 1e9:.1f} | |")
    return [*lines, "", f"A step that nobody watches: {common.spread(found['unwatched'], 3)} s of CPU time."]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", nargs="+", default=["last8", "all", "rows"])
    parser.add_argument("--steps", type=int, default=5)
    parser.add_argument("--packed", action="store_true", help="keep quantized weights, as --keep-quantized does")
    parser.add_argument("--model", type=Path, default=common.SMOLLM2)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    if "rows" in options.cases:
        step.real_tasks()  # before the other cases have run for minutes
    from mbf_mlx.device import backend

    backend.setup("cpu")
    kept = common.Kept("profile", options.out)
    lines: list[str] = []
    for case in options.cases:
        lines += table(case, kept.once(case, lambda case=case: profile(case, options)))
    common.finish(common.document("profile", kept.results), lines[1:], options.out)


if __name__ == "__main__":
    main()
