"""A training step of SmolLM2-135M, rank 8: ours, mlx_lm.lora's, and torch + PEFT's, on the same batches.

Every peer is a process of its own that does one step when it is told to; the steps alternate, so that whatever else the
machine does falls on all alike. A row of the table is the median of the steps and, against ours, the median of the
ratios of neighbouring steps with the smallest and largest.

Cases: `last8`, 8 rows of 64 random tokens, the last 8 supervised; `all`, the same, all supervised; `rows`, real rows
with the chat template at their natural lengths, 8 at a time (needs the tasks of $MBF_TASK_DATA). `--keys all` puts
factors on all seven linear layers instead of q and v.

    python benchmarks/step.py [--cases last8 all rows] [--peers mlx_lm torch32 torch16] [--repeats 5]

Long, because each peer's step stands beside ours, to be compared line by line.
"""

import argparse
import contextlib
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import common
import numpy as np
from common import ROOT

from mbf_mlx.device.machine import freed_memory_kept

RANK, SCALE, RATE = 8, 2.0, 1e-4
ROWS, LENGTH, SUPERVISED = 8, 64, 8
ALL_KEYS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
PEERS = {"mlx_lm": "mlx_lm.lora", "torch32": "torch + PEFT float32", "torch16": "torch + PEFT bfloat16"}
REAL_TASKS = ("newsgroups", "sst2", "wic", "wordnet", "langid")
REST = 1  # seconds before each step, in which the threads of the step before, a peer's, stop spinning
CURVE_STEPS, CURVE_TOLERANCE = 20, 1e-3


# -- the workers: `start(model, keys)` gives a function from rows to the loss per token and the seconds of one step ----


def ours(model: Path, keys: list[str]) -> Any:
    from mbf_mlx.device import backend, bfloat16

    device = backend.setup("cpu" if sys.platform == "linux" else None)
    import mlx.core as mx
    import mlx.optimizers as optim
    from mlx import nn
    from mlx.utils import tree_map

    from mbf_mlx.base.load import load_base
    from mbf_mlx.config import LoRAConfig
    from mbf_mlx.data.batches import make_batch
    from mbf_mlx.engine.choose import prepare
    from mbf_mlx.engine.lora_layers import attach

    base = load_base(model, dequantize=device.kind == "cpu", dtype=device.dtype)
    attach(base.model, LoRAConfig(rank=RANK, scale=SCALE, keys=tuple(keys)))
    engine, optimizer = prepare(base.model), optim.AdamW(learning_rate=RATE)
    if engine.by_hand and bfloat16.is_faster():  # as `mbf learn` does
        engine.multiply_in("bfloat16")
    loss_and_grad = nn.value_and_grad(base.model, engine.loss_sum)

    def step(rows: list[Any]) -> tuple[float, float]:
        started = time.perf_counter()
        batch = make_batch(rows, range(len(rows)))
        loss, gradients = loss_and_grad(batch)
        gradients = tree_map(lambda g: g / len(batch.targets), gradients)
        optimizer.update(base.model, gradients)
        mx.eval(loss, base.model.trainable_parameters(), optimizer.state)
        return loss.item() / len(batch.targets), time.perf_counter() - started

    def floor(rows: list[Any]) -> float:
        """Seconds of the step's matrix products alone: each shape timed by itself."""
        batch, linears = make_batch(rows, range(len(rows))), base.model.layers[0]
        tokens, picked = len(batch.prefix) + int(batch.lengths.sum()), len(batch.targets)
        attention, mlp = linears.self_attn, linears.mlp
        shapes = [getattr(p, "linear", p).weight.shape for p in (attention.k_proj, attention.v_proj)]
        rest = [attention.q_proj, attention.o_proj, mlp.gate_proj, mlp.up_proj, mlp.down_proj]
        others = [getattr(p, "linear", p).weight.shape for p in rest]
        blocks = len(base.model.layers)
        seconds = 0.0
        for out, inner in shapes + others:
            seconds += _product_seconds(mx, tokens, inner, out) * (2 * blocks - 1 - ((out, inner) in others))
        for out, inner in others:
            seconds += _product_seconds(mx, picked, inner, out) * 2
        out, inner = base.model.model.embed_tokens.weight.shape
        return seconds + 2 * _product_seconds(mx, picked, inner, out)

    step.floor = floor  # type: ignore[attr-defined]
    step.curve = lambda batches: _curves(mx, nn, optim, base.model, engine, batches)  # type: ignore[attr-defined]
    return step


def _product_seconds(mx: Any, tokens: int, inner: int, out: int) -> float:
    x, weight = mx.random.normal((tokens, inner)), mx.random.normal((out, inner))
    mx.eval(x, weight)
    taken = []
    for _ in range(6):
        started = time.perf_counter()
        mx.eval(x @ weight.T)
        taken.append(time.perf_counter() - started)
    return statistics.median(taken[1:])


def _curves(mx: Any, nn: Any, optim: Any, model: Any, engine: Any, batches: list[list[Any]]) -> list[list[float]]:
    """Return the losses of the same steps with the engine's loss and with a plain one over all logits."""
    from mlx.utils import tree_flatten, tree_map, tree_unflatten

    from mbf_mlx.data.batches import make_batch

    def plain(rows: list[Any]) -> Any:
        total = mx.array(0.0)
        for row in rows:
            logits = model(mx.array(row.tokens[None, :-1]))[0]
            losses = nn.losses.cross_entropy(logits, mx.array(row.tokens[1:]), reduction="none")
            total = total + (losses * mx.array(row.supervised[1:].astype(np.float32))).sum()
        return total

    start = [(name, mx.array(np.array(value))) for name, value in tree_flatten(model.trainable_parameters())]
    curves = []
    for loss in (lambda rows: engine.loss_sum(make_batch(rows, range(len(rows)))), plain):
        model.update(tree_unflatten(start))
        optimizer, losses = optim.AdamW(learning_rate=RATE), []
        loss_and_grad = nn.value_and_grad(model, loss)
        for rows in batches:
            count = sum(int(row.supervised[1:].sum()) for row in rows)
            value, gradients = loss_and_grad(rows)
            optimizer.update(model, tree_map(lambda g, count=count: g / count, gradients))
            mx.eval(value, model.trainable_parameters(), optimizer.state)
            losses.append(value.item() / count)
        curves.append(losses)
    return curves


def mlx_lm_lora(model: Path, keys: list[str]) -> None:
    """mlx-lm's own loop; its batches come from the commands, and its reports are the answers."""
    import mlx.core as mx
    import mlx.optimizers as optim
    from mlx_lm.tuner.trainer import TrainingArgs, default_loss, train
    from mlx_lm.tuner.utils import linear_to_lora_layers
    from mlx_lm.utils import load_model

    network, _ = load_model(model)
    dtype = _fastest_dtype(mx, network)
    network.set_dtype(dtype)
    network.freeze()
    prefix = {name: "self_attn" if name[0] in "qkvo" and name != "up_proj" else "mlp" for name in ALL_KEYS}
    paths = [f"{prefix[key]}.{key}" for key in keys]
    linear_to_lora_layers(network, len(network.layers), {"rank": RANK, "scale": SCALE, "dropout": 0.0, "keys": paths})
    answers = _answers()
    answers({"dtype": str(dtype).removeprefix("mlx.core.")})

    def batches(**_: Any) -> Iterator[tuple[Any, Any]]:
        for command in _commands():
            rows = command["step"]
            width = 1 + 32 * -(-max(len(row.tokens) for row in rows) // 32)  # as mlx-lm pads
            tokens = np.zeros((len(rows), width), np.int32)
            for line, row in zip(tokens, rows, strict=True):
                line[: len(row.tokens)] = row.tokens
            spans = [(int(np.flatnonzero(row.supervised)[0]), len(row.tokens) - 1) for row in rows]
            yield mx.array(tokens), mx.array(spans)

    class Answering:
        def on_train_loss_report(self, info: dict[str, Any]) -> None:
            answers({"loss": info["train_loss"], "seconds": 1 / info["iterations_per_second"]})

        def on_val_loss_report(self, info: dict[str, Any]) -> None:
            pass

    with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(sys.stderr):
        settings = TrainingArgs(iters=10**6, steps_per_report=1, steps_per_save=10**9, adapter_file=f"{folder}/a")
        train(network, optim.AdamW(learning_rate=RATE), [None], None, settings, default_loss, batches, Answering())


def _fastest_dtype(mx: Any, network: Any) -> Any:
    """Return the dtype in which a short forward pass is fastest on this machine."""
    taken = {}
    for dtype in (mx.float32, mx.bfloat16, mx.float16):
        network.set_dtype(dtype)
        for _ in range(2):
            started = time.perf_counter()
            mx.eval(network(mx.ones((1, 4), mx.int32)))
            taken[dtype] = time.perf_counter() - started
    return min(taken, key=taken.__getitem__)


def torch_peft(model: Path, keys: list[str], bfloat16: bool) -> Any:
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM, LlamaConfig

    config = {k: v for k, v in json.loads((model / "config.json").read_text()).items() if k[:5] != "quant"}
    network = AutoModelForCausalLM.from_config(LlamaConfig(**config), attn_implementation="sdpa")
    left = network.load_state_dict(_dense(torch, model), strict=False)
    assert not left.unexpected_keys and set(left.missing_keys) <= {"lm_head.weight"}, left
    network.tie_weights()
    network = network.to(torch.bfloat16 if bfloat16 else torch.float32)
    lora = LoraConfig(r=RANK, lora_alpha=RANK * SCALE, target_modules=keys, lora_dropout=0.0)
    network = get_peft_model(network, lora)
    network.train()
    trained = [p for p in network.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=RATE)

    def step(rows: list[Any]) -> tuple[float, float]:
        started = time.perf_counter()
        width = max(len(row.tokens) for row in rows)
        tokens = torch.zeros((len(rows), width), dtype=torch.long)
        labels = torch.full((len(rows), width), -100)
        mask = torch.zeros((len(rows), width), dtype=torch.long)
        for i, row in enumerate(rows):
            count = len(row.tokens)
            tokens[i, :count] = torch.from_numpy(row.tokens.astype(np.int64))
            labels[i, :count] = torch.where(torch.from_numpy(row.supervised), tokens[i, :count], -100)
            mask[i, :count] = 1
        loss = network(input_ids=tokens, attention_mask=mask, labels=labels).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return float(loss), time.perf_counter() - started

    return step


def _dense(torch: Any, model: Path) -> dict[str, Any]:
    """Return the folder's weights as torch tensors in float32, unpacked."""
    import mlx.core as mx
    from mlx.utils import tree_flatten
    from mlx_lm.utils import dequantize_model, load_model

    network = dequantize_model(load_model(model)[0])
    network.set_dtype(mx.float32)
    return {name: torch.from_numpy(np.array(value)) for name, value in tree_flatten(network.parameters())}


# -- how the processes talk: one JSON document a line -----------------------------------------------------------------


def _answers() -> Any:
    stdout = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what libraries print does not go between the answers

    def answer(document: dict[str, Any]) -> None:
        stdout.write(json.dumps(document) + "\n")
        stdout.flush()

    return answer


def _commands() -> Iterator[dict[str, Any]]:
    for line in sys.stdin:
        command = json.loads(line)
        yield {
            name: _decoded(value) if name != "curve" else [_decoded(b) for b in value]
            for name, value in command.items()
        }


def _encoded(rows: list[Any]) -> list[Any]:
    return [[row.tokens.tolist(), row.supervised.tolist()] for row in rows]


def _decoded(rows: list[Any]) -> list[Any]:
    return [SimpleNamespace(tokens=np.array(t, np.int32), supervised=np.array(s, bool)) for t, s in rows]


def work(name: str, model: Path, keys: list[str]) -> None:
    if name == "mlx_lm":
        return mlx_lm_lora(model, keys)
    answer = _answers()
    step = ours(model, keys) if name == "ours" else torch_peft(model, keys, name == "torch16")
    answer({"dtype": {"ours": "float32", "torch32": "float32", "torch16": "bfloat16"}[name]})
    with freed_memory_kept() if name == "ours" else contextlib.nullcontext():  # as mbf learn trains
        for command in _commands():
            if "step" in command:
                loss, seconds = step(command["step"])
                answer({"loss": loss, "seconds": seconds})
            elif "floor" in command:
                answer({"seconds": step.floor(command["floor"])})
            else:
                answer({"curves": step.curve(command["curve"])})


class Worker:
    """One process that does steps."""

    def __init__(self, name: str, model: Path, keys: list[str]):
        command = [sys.executable, __file__, "--worker", name, "--model", str(model), "--keys", *keys]
        quiet = {} if os.environ.get("MBF_BENCH_VERBOSE") else {"stderr": subprocess.DEVNULL}
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, **quiet)
        self.name = name
        self.dtype = self._read()["dtype"]

    def ask(self, **command: Any) -> dict[str, Any]:
        assert self.process.stdin
        self.process.stdin.write(json.dumps(command) + "\n")
        self.process.stdin.flush()
        return self._read()

    def _read(self) -> dict[str, Any]:
        assert self.process.stdout
        line = self.process.stdout.readline()
        if not line:
            raise SystemExit(f"{self.name} has died; MBF_BENCH_VERBOSE=1 shows what it said")
        return json.loads(line)

    def close(self) -> None:
        assert self.process.stdin
        self.process.stdin.close()
        self.process.wait()


# -- the measurement ---------------------------------------------------------------------------------------------------


def real_tasks() -> Path:
    """Return the folder of real tasks; end with a sentence if one of them is not there."""
    folder = Path(os.environ.get("MBF_TASK_DATA") or ROOT.parent / "shared" / "data") / "tasks"
    if missing := [name for name in REAL_TASKS if not (folder / name).is_dir()]:
        raise SystemExit(
            f"{folder}: expected the tasks {', '.join(missing)}, got none\nhint: MBF_TASK_DATA names the folder that"
            " holds tasks/, or leave out the case: --cases last8 all"
        )
    return folder


def batches_of(case: str, model: Path, count: int) -> list[list[Any]]:
    rng = np.random.default_rng(0)
    if case != "rows":
        vocabulary = json.loads((model / "config.json").read_text())["vocab_size"]
        tokens = rng.integers(1, min(40_000, vocabulary), (count, ROWS, LENGTH + 1)).astype(np.int32)
        supervised = np.arange(LENGTH + 1) > (LENGTH - SUPERVISED if case == "last8" else 0)
        return [[SimpleNamespace(tokens=row, supervised=supervised) for row in batch] for batch in tokens]
    from mbf_mlx.base.load import load_tokenizer
    from mbf_mlx.config import DataConfig
    from mbf_mlx.data.batches import lengths_of, plan_batches
    from mbf_mlx.data.encode import Encoder
    from mbf_mlx.data.task import read_task

    folder = real_tasks()
    encoder, found = Encoder(load_tokenizer(model), DataConfig()), []
    for name in REAL_TASKS:
        rows = encoder.all(list(read_task(folder / name).train)[:400], folder / name)
        plan = plan_batches(lengths_of(rows), ROWS, 0, 0)
        found.append([[rows[i] for i in indices] for indices in plan if len(indices) == ROWS])
    return [found[i % len(found)][i // len(found)] for i in range(count)]


def measure(case: str, model: Path, keys: list[str], peers: list[str], repeats: int) -> dict[str, Any]:
    batches = batches_of(case, model, repeats + 1)
    workers = [Worker(name, model, keys) for name in ["ours", *peers]]
    in_turn = sorted(workers, key=lambda worker: worker.name != "mlx_lm")  # else its minutes lie between the others
    steps: list[dict[str, Any]] = []
    try:
        for number, rows in enumerate(batches):
            for worker in in_turn:
                if number == 0 and worker.name == "mlx_lm":
                    continue  # a step of its takes minutes on a CPU, its compilation seconds
                time.sleep(REST)
                loads = os.getloadavg()[0]
                answer = worker.ask(step=_encoded(rows))
                steps.append({"batch": number, "who": worker.name, "load": loads, **answer})
                print(f"{case} {number} {worker.name}: {answer['seconds']:.3f} s", file=sys.stderr)
        floor = statistics.median(workers[0].ask(floor=_encoded(rows))["seconds"] for rows in batches[1:4])
        curves = workers[0].ask(curve=[_encoded(batches[i % len(batches)]) for i in range(CURVE_STEPS)])["curves"]
    finally:
        for worker in workers:
            worker.close()
    return summary(case, batches, steps, floor, curves, {worker.name: worker.dtype for worker in workers})


def summary(
    case: str, batches: list[Any], steps: list[Any], floor: float, curves: list[Any], dtypes: dict[str, str]
) -> dict[str, Any]:
    seconds = {who: [s["seconds"] for s in steps if s["who"] == who and s["batch"]] for who in dtypes}
    tokens = statistics.median(sum(len(row.tokens) for row in rows) for rows in batches[1:])
    document: dict[str, Any] = {"case": case, "rows": ROWS, "tokens": tokens, "matmul_floor_seconds": floor}
    document["share_of_floor"] = floor / statistics.median(seconds["ours"])
    ours, plain = (np.array(curve) for curve in curves)
    document["curve_difference"] = float(np.abs(ours - plain).max())
    document["curve_within_tolerance"] = bool(document["curve_difference"] <= CURVE_TOLERANCE)
    for who, taken in seconds.items():
        ratios = [theirs / own for theirs, own in zip(taken, seconds["ours"], strict=True)]
        median = statistics.median(taken)
        document[who] = {
            "dtype": dtypes[who],
            "seconds": taken,
            "median_seconds": median,
            "tokens_per_second": tokens / median,
            "rows_per_second": ROWS / median,
            "ratio": statistics.median(ratios),
            "ratio_spread": [min(ratios), max(ratios)],
        }
    document["steps"] = steps
    return document


def markdown(document: dict[str, Any]) -> list[str]:
    lines = []
    for who in ("ours", *PEERS):
        if who not in document:
            continue
        found, low_high = document[who], document[who]["ratio_spread"]
        ratio = "1" if who == "ours" else f"{found['ratio']:.2f} ({low_high[0]:.2f} to {low_high[1]:.2f})"
        name = "mbf-mlx" if who == "ours" else PEERS[who]
        cells = [document["case"], name, found["dtype"], f"{found['median_seconds']:.2f}"]
        cells += [f"{found['tokens_per_second']:.0f}", f"{found['rows_per_second']:.2f}", ratio]
        lines.append(f"| {' | '.join(cells)} |")
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, default=common.SMOLLM2)
    parser.add_argument("--cases", nargs="+", default=["last8", "all", "rows"])
    parser.add_argument("--peers", nargs="*", default=list(PEERS), choices=list(PEERS))
    parser.add_argument("--keys", nargs="+", default=["q_proj", "v_proj"])
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--out", type=Path, help="a JSON file for the results")
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    options = parser.parse_args()
    keys = ALL_KEYS if options.keys == ["all"] else options.keys
    if options.worker:
        return work(options.worker, options.model, keys)
    if "rows" in options.cases:
        real_tasks()  # before the other cases have run for minutes
    kept = common.Kept("step", options.out)
    kept.save("keys", keys)
    results = [
        kept.once(case, lambda case=case: measure(case, options.model, keys, options.peers, options.repeats))
        for case in options.cases
    ]
    lines = ["| case | who | dtype | s a step | tokens/s | rows/s | times ours |", "|---|---|---|---|---|---|---|"]
    lines += [line for result in results for line in markdown(result)]
    for result in results:
        lines += [
            "",
            f"{result['case']}: matrix products alone {result['matmul_floor_seconds']:.2f} s,"
            f" {result['share_of_floor']:.0%} of our step; losses of {CURVE_STEPS} steps differ from a plain"
            f" computation's by at most {result['curve_difference']:.1e}",
        ]
    common.finish(common.document("step", kept.results), lines, options.out)
    if off := [result["case"] for result in results if not result["curve_within_tolerance"]]:
        raise SystemExit(f"{', '.join(off)}: the loss curve is off by more than {CURVE_TOLERANCE:g}")


if __name__ == "__main__":
    main()
