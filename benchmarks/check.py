"""`make bench-check`: figures that no machine changes, against the committed ones; more than 10 % worse is an error.

Floating-point operations of matrix products, evaluations and mlx's peak bytes of one training step on a small random
Llama; tokens computed for rows that share a prefix; bytes of a stream. No timings. And `mbf --help` and `mbf status`
import nothing of what only training needs.

    python benchmarks/check.py [--update]
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import common
import flatness
import numpy as np
import synthetic

COMMITTED = Path(__file__).with_name("check.json")
WORSE = 1.10  # times the committed figure; less is better in all of them
ROWS, LENGTH = 4, 65
UNWANTED = {"mlx", "mlx_lm", "numpy", "transformers"}  # in commands that only show something
CASES = {"all": (0, 64), "last8": (0, 8), "prefix": (40, 8)}  # name -> shared tokens, supervised tokens


def rows_of(prefix: int, answer: int, vocabulary: int) -> list[SimpleNamespace]:
    """Return random rows that share their first `prefix` tokens, the last `answer` supervised."""
    rng = np.random.default_rng(0)
    tokens = rng.integers(1, vocabulary, (ROWS, LENGTH)).astype(np.int32)
    tokens[:, :prefix] = tokens[0, :prefix]
    tokens[:, prefix] = np.arange(ROWS) + 1  # here they part
    return [SimpleNamespace(tokens=line, supervised=np.arange(LENGTH) >= LENGTH - answer) for line in tokens]


class Counted:
    """Counts products and evaluations while it is open, by standing in for mlx's own functions."""

    def __init__(self, mx: Any):
        self.mx, self.flops, self.evaluations = mx, 0, 0
        self._own = mx.eval, mx.addmm, mx.array.__matmul__

    def __enter__(self) -> "Counted":
        evaluate, addmm, matmul = self._own

        def count(a: Any, b: Any) -> None:
            self.flops += (
                2
                * int(np.prod(np.broadcast_shapes(a.shape[:-2], b.shape[:-2]), dtype=np.int64))
                * (a.shape[-2] * a.shape[-1] * b.shape[-1])
            )

        def counted_eval(*arrays: Any) -> None:
            self.evaluations += 1
            evaluate(*arrays)

        def counted_addmm(c: Any, a: Any, b: Any, *rest: Any, **named: Any) -> Any:
            count(a, b)
            return addmm(c, a, b, *rest, **named)

        def counted_matmul(a: Any, b: Any) -> Any:
            count(a, b)
            return matmul(a, b)

        self.mx.eval, self.mx.addmm, self.mx.array.__matmul__ = counted_eval, counted_addmm, counted_matmul
        return self

    def __exit__(self, *_: Any) -> None:
        self.mx.eval, self.mx.addmm, self.mx.array.__matmul__ = self._own


def of_steps(model: Path) -> dict[str, float]:
    """Return what a training step counts, by case, with everything kept and with --grad-checkpoint."""
    import mlx.core as mx
    from mlx import nn

    from mbf_mlx.config import LoRAConfig
    from mbf_mlx.data.batches import make_batch
    from mbf_mlx.learning.learner import load_learner

    found: dict[str, float] = {}
    for packed in (False, True):
        learner = load_learner(model, LoRAConfig(), packed)
        network, engine = learner.base.model, learner.engine
        engine.cores = 1  # a batch's parts are as many as a machine has cores
        loss_and_grad = nn.value_and_grad(network, engine.loss_sum)
        for case, (prefix, answer) in CASES.items():
            batch = make_batch(rows_of(prefix, answer, synthetic.SHAPES["small"][6]), range(ROWS))
            found[f"{case}: computed tokens"] = batch.computed_tokens
            for checkpoint in (False, True):
                engine.checkpoint = checkpoint
                name = f"{case}{', packed' * packed}{', checkpoint' * checkpoint}"
                mx.eval(loss_and_grad(batch))
                mx.reset_peak_memory()
                before = mx.get_active_memory()
                with Counted(mx) as counted:
                    mx.eval(loss_and_grad(batch))
                found[f"{name}: peak bytes of a step"] = mx.get_peak_memory() - before
                if not packed:
                    found[f"{name}: matmul flops of a step"] = counted.flops
                    found[f"{name}: evaluations of a step"] = counted.evaluations
        engine.checkpoint = False
        if not packed:
            with Counted(mx) as counted:
                engine.score(batch)
            found["prefix: matmul flops of scoring"] = counted.flops
            found["prefix: evaluations of scoring"] = counted.evaluations
    return found


def of_stream(folder: Path, model: Path) -> dict[str, float]:
    """Return the bytes of a stream after three tasks."""
    from mbf_mlx import Stream
    from mbf_mlx.config import LearnConfig, LoRAConfig, TrainConfig

    stream = Stream.open(folder / "s", base=str(model), lora=LoRAConfig())
    settings = LearnConfig(train=TrainConfig(iters=1, batch_size=4, save_every="0"))
    sizes = []
    for number in range(3):
        stream.learn(flatness.write_task(folder, number), config=settings)
        status = stream.status()
        sizes.append((status["adapter_bytes"], status["state_bytes"]))
    if len(set(sizes[1:])) > 1:
        raise SystemExit(f"a stream grows: adapter and state bytes after each task: {sizes}")
    history = (folder / "s" / "current" / "history.jsonl").stat().st_size
    return {"adapter bytes": sizes[-1][0], "state bytes": sizes[-1][1], "history bytes of three tasks": history}


def check_commands(folder: Path) -> None:
    """Refuse commands that import more than they need: they are to be there in an instant."""
    for words in (["--help"], ["status", str(folder / "s")]):
        code = f"import sys, atexit; sys.argv = ['mbf', *{words!r}]; sys.path.insert(0, {str(common.ROOT)!r})\n"
        code += f"atexit.register(lambda: print('imported', *{UNWANTED!r} & set(sys.modules), file=sys.stderr))\n"
        code += "from mbf_mlx.commands import main; main()"
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
        if done.returncode or done.stderr.splitlines()[-1:] != ["imported"]:
            raise SystemExit(f"mbf {words[0]} fails, or imports what only training needs:\n{done.stderr[-2000:]}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--update", action="store_true", help="write what was counted as what is expected")
    options = parser.parse_args()
    os.environ["OPENBLAS_NUM_THREADS"] = "1"  # nothing here is timed, and on a busy machine threads wait for each other
    from mbf_mlx.device import backend

    backend.setup("cpu")
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        found = of_steps(synthetic.write_model(folder / "small", "small", num_hidden_layers=3))
        tiny = synthetic.write_model(folder / "tiny", "tiny", quantization=flatness.QUANTIZATION)
        found |= of_stream(folder, tiny)
        check_commands(folder)
    if options.update:
        COMMITTED.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
        print(f"{len(found)} figures written to {COMMITTED.name}")
        return
    expected = json.loads(COMMITTED.read_text(encoding="utf-8"))
    missing = sorted(expected.keys() ^ found.keys())
    worse = [name for name in expected.keys() & found.keys() if found[name] > WORSE * expected[name]]
    for name in sorted(worse):
        print(f"{name}: {found[name]:,}, committed {expected[name]:,} ({found[name] / expected[name] - 1:+.0%})")
    if missing:
        print(f"not in both: {', '.join(missing)}")
    if worse or missing:
        raise SystemExit("worse than what is committed; if that is meant: python benchmarks/check.py --update")
    better = sum(found[name] < expected[name] / WORSE for name in expected)
    print(f"{len(found)} figures, none more than 10 % worse than the committed" + f", {better} better" * bool(better))


if __name__ == "__main__":
    main()
