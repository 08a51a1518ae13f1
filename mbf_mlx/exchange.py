"""Adapters trained elsewhere: hand out the start of the next task, and absorb the tuned adapter.

This module needs NumPy alone and runs no model. If a method measures a task's inputs, the caller passes a function that
runs the model.

Shapes: A (rank, in), B (out, rank). PEFT, Unsloth, axolotl, LLaMA-Factory or mlx-lm train from our start and give
back one adapter. Its update is brought to the stream's own scale: B' = B * their scale / ours. Training elsewhere may
run on the unquantized model, so only the base's architecture, its layers and their shapes are compared, not its
weights.
"""

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np

from mbf_mlx.adapters import mlx_lm as adapter
from mbf_mlx.adapters import peft
from mbf_mlx.base.sources import read_config
from mbf_mlx.data.task import Task, read_task
from mbf_mlx.data.words import metric_by_words
from mbf_mlx.device.machine import freed_memory_kept
from mbf_mlx.device.threads import one_thread_each
from mbf_mlx.errors import InputError, quoted
from mbf_mlx.files.storage import Data
from mbf_mlx.methods import Factors, Method, Pair, Seen, State, make, names, not_finite
from mbf_mlx.methods.slao import Slao
from mbf_mlx.reference import orthogonal_init
from mbf_mlx.stream.folder import StreamFolder
from mbf_mlx.stream.records import TaskRecord

# (method, state, tuned factors, task file) -> what the method measures of the task's inputs; runs the model
ChooseMetric = Callable[[Task], str]  # "exact_match", "rouge_l" or "loss"
Look = Callable[[Method, State, Factors, str], dict[str, Seen]]

FORMATS = ("peft", "mlx")
PLAUSIBLE = 0.3  # an adapter with a smaller mean cosine between the start's A and the tuned A did not start from ours
TOO_LARGE, MOST_HEADER = 16, 1 << 24  # times the bytes of the stream's factors, and bytes beside them
START_BITS = 1e-6  # relative; a start that was handed out in another scale has other last bits
SAME = {"mistral": "llama"}  # architectures that mlx-lm runs with the same code


@dataclass(frozen=True, kw_only=True)
class Absorbed:
    """What was merged."""

    record: TaskRecord
    cosine: float  # between a row of the start's A and of the tuned A, mean over the rows of all layers
    notes: tuple[str, ...] = ()


class TunedAdapter(NamedTuple):
    """An adapter tuned elsewhere, in the stream's own scale and order of layers."""

    factors: Factors
    sha256: str  # of the weights file
    notes: tuple[str, ...]  # one line for each thing that had to be changed


def check_method(method: Method) -> None:
    """Check that a method's tasks can be trained elsewhere.

    Raises:
        InputError: the method takes part in the training itself.
    """
    if not method.absorbs:
        plain = ", ".join(name for name in names() if make(name).absorbs)
        raise InputError(
            f"method {method.name}: expected a method that only merges ({plain}); this one takes part in the training"
            " itself, so its tasks cannot be trained elsewhere\nhint: mbf learn trains them here"
        )


def wants_rows(stream: StreamFolder) -> bool:
    """Return whether absorbing needs the rows that the task was trained on, to run the model on them."""
    return "inputs" in _method(stream).needs


def next_start(stream: StreamFolder, kind: str) -> dict[str, Data]:
    """Return the files of the adapter that the next task starts from.

    Args:
        stream: The stream that the task will be absorbed into.
        kind: The adapter's layout, "peft" or "mlx".

    Raises:
        InputError: another layout, or a method that takes part in the training itself.
    """
    if kind not in FORMATS:
        raise InputError(f"--format: expected {' or '.join(FORMATS)}, got {kind!r}")
    state, identity = stream.state(), stream.identity
    start = _method(stream).start(state)
    if kind == "peft":
        return peft.peft_files(start, identity.scale, base=identity.base.name, num_blocks=identity.base.num_layers)
    extra = {"stream": identity.id, "start_of_task": state.t + 1}
    return adapter.adapter_files(
        start, scale=identity.scale, num_layers=identity.num_layers, base=identity.base.name, extra=extra
    )


@freed_memory_kept()
def absorb(
    stream: StreamFolder,
    folder: Path,
    name: str,
    *,
    source: str = "",
    force: bool = False,
    again: bool = False,
    look: Look | None = None,
    choose_metric: ChooseMetric | None = None,
) -> Absorbed:
    """Merge an adapter tuned elsewhere as the stream's next task, and commit it. Needs the stream's writer lock.

    Args:
        stream: The stream that handed out the start.
        folder: The adapter, in PEFT's or mlx-lm's layout.
        name: The task's name.
        source: The task's file or folder, for later scoring. A method that measures inputs needs it.
        force: Absorb the adapter even if it did not start from our start, was trained on another architecture, or has
            learned nothing.
        again: Absorb it even if the stream has a task of this name.
        look: Runs the model for a method that measures inputs.
        choose_metric: Says by which metric the task is scored later. Without it words are counted, not tokens.

    Raises:
        InputError: an adapter that does not fit, a name that is taken, or no task file where the method needs one. The
            stream is unchanged.
    """
    started = stream.current()
    if not again and stream.task_scores().contents_of(name):
        raise InputError(f"--name: {stream.path} has learned a task named {name!r}; choose another name, or --again")
    method, measures = _method(stream), wants_rows(stream)
    if measures and not (source and look):
        raise InputError(
            f"--task: method {method.name} measures a task's inputs; expected the task file that the adapter was"
            " trained on, got none"
        )
    with ThreadPoolExecutor(1) as pool:
        reading = pool.submit(read_tuned, stream, folder, force=force)
        state = stream.state()
        tuned = reading.result()
    cosine = _cosine(method, state, tuned.factors)
    if not force:
        _check_trained(method, state, tuned.factors, folder, cosine)
    if cosine < PLAUSIBLE and not force:
        raise InputError(
            f"{folder}: expected an adapter trained from this stream's start of task {state.t + 1} (mean cosine of A's"
            f" rows at least {PLAUSIBLE}), got {cosine:.2f}\nhint: mbf next {quoted(stream.path)} OUT writes that"
            " start; --force absorbs the adapter anyway"
        )
    inputs = look(method, state, tuned.factors, source) if measures and look else None
    state = method.absorb(state, tuned.factors, inputs)
    _check_finite(state, folder, stream.identity.scale)
    record = _record(name, state.t, folder, tuned.sha256, source, choose_metric or metric_by_words)
    date = stream.date()
    settings = {"absorbed": str(folder)} | ({"data": {"date": date}} if date else {})
    stream.commit(started, state, record, started.manifest.base_path, settings)
    return Absorbed(record=record, cosine=cosine, notes=tuned.notes)


def read_tuned(stream: StreamFolder, folder: Path, *, force: bool = False) -> TunedAdapter:
    """Read an adapter for a stream.

    Raises:
        InputError: another architecture (unless `force`), rank, layers or shapes; the message names all of them.
    """
    _check_size(stream, folder)
    if not (folder / peft.WEIGHTS).exists() and (folder / "adapter_model.bin").exists():
        raise InputError(f"{folder}: adapter_model.bin is a pickle, which can run code; save it as safetensors")
    if (folder / peft.WEIGHTS).exists():
        theirs = peft.read_peft(folder)
        factors, scale, digest, notes, base = theirs.factors, theirs.scale, theirs.sha256, theirs.notes, theirs.base
    else:
        own = adapter.read_adapter(folder)
        factors, scale, digest, notes, base = own.factors, own.scale, own.sha256, (), own.config.get("model")
    identity = stream.identity
    problems = [] if force else _other_architecture(base, identity.base.architecture)
    for layer, (out, inner) in identity.layers.items():
        if layer not in factors:
            problems.append(f"  {layer}: missing")
            continue
        a, b = factors[layer]
        expected = ((identity.rank, inner), (out, identity.rank))
        if (a.shape, b.shape) != expected:
            problems.append(f"  {layer}: expected A {expected[0]} and B {expected[1]}, got {a.shape} and {b.shape}")
    problems += [f"  {layer}: not a layer of this stream" for layer in factors if layer not in identity.layers]
    if problems:
        shown = [*problems[:12], *([f"  and {len(problems) - 12} more"] if len(problems) > 12 else [])]
        raise InputError(
            f"{folder} does not fit {stream.path} (rank {identity.rank}, base {identity.base.name}):\n"
            + "\n".join(shown)
        )
    if scale == identity.scale:
        return TunedAdapter({layer: factors[layer] for layer in identity.layers}, digest, notes)
    share = np.float32(scale / identity.scale)
    notes = (*notes, f"its scale is {scale:g}, the stream's {identity.scale:g}: the ratio goes into B")
    scaled = {layer: Pair(factors[layer].a, factors[layer].b * share) for layer in identity.layers}
    return TunedAdapter(scaled, digest, notes)


def _check_size(stream: StreamFolder, folder: Path) -> None:
    """Refuse a weights file that is far too large for the stream's factors, before it is read.

    Raises:
        InputError: with both sizes.
    """
    layers, rank = stream.identity.layers, stream.identity.rank
    expected = sum(8 * rank * (out + inner) for out, inner in layers.values())  # in float64
    for name in (peft.WEIGHTS, adapter.WEIGHTS):
        size = (folder / name).stat().st_size if (folder / name).is_file() else 0
        if size > TOO_LARGE * expected + MOST_HEADER:
            raise InputError(
                f"{folder / name}: expected factors of rank {rank}, at most {expected:,} bytes, got {size:,} bytes"
                f"\nhint: it has to be trained from the start that mbf next {quoted(stream.path)} OUT writes"
            )


def _other_architecture(base: object, expected: str) -> list[str]:
    """Return a problem line if the adapter's base is a folder on this machine with another architecture.

    A hub id is not looked up; then only the layers and their shapes are compared.
    """
    try:
        found = str(read_config(Path(str(base)))["model_type"])
    except (ValueError, OSError, KeyError):  # a name with a zero byte is a ValueError
        return []  # the folder is not here, or does not name its architecture
    if SAME.get(found, found) == SAME.get(expected, expected):
        return []
    return [
        f"  it was trained on {base}: expected architecture {expected!r}, got {found!r} (--force absorbs it anyway)"
    ]


def _method(stream: StreamFolder) -> Method:
    method = make(stream.identity.method, stream.identity.method_options)
    check_method(method)
    return method


def _check_trained(method: Method, state: State, tuned: Factors, folder: Path, cosine: float) -> None:
    """Refuse an adapter that changes nothing: the start that was handed out, or an update of zeros.

    Raises:
        InputError: it has learned nothing.
    """
    if not any(np.any(pair.a) and np.any(pair.b) for pair in tuned.values()):
        raise InputError(f"{folder}: its update is zero in every layer (a scale of 0?), so it has learned nothing")
    if cosine < 1 - START_BITS:
        return
    start = method.start(state)
    if all(_same(start[layer].a, a) and _same(start[layer].b, b) for layer, (a, b) in tuned.items()):
        raise InputError(
            f"{folder}: it is the start of task {state.t + 1} as `mbf next` wrote it, so it has learned nothing"
            "\nhint: train it first; --force absorbs it anyway"
        )


def _same(one: np.ndarray, other: np.ndarray) -> bool:
    return bool(np.abs(one - other).max() <= START_BITS * np.abs(one).max())


def _cosine(method: Method, state: State, tuned: Factors) -> float:
    """Return the cosine between a row of the start's A and the same row of the tuned A, mean over layers and rows."""
    if state.t and isinstance(method, Slao) and method.settings["start_a"] == "qr":
        with one_thread_each():  # the layers are too small to gain from threads
            found = [_basis_cosines(method.tuned(state, layer).a, a) for layer, (a, _) in tuned.items()]
    else:
        start = method.start(state)
        found = [_cosines(start[layer].a, a) for layer, (a, _) in tuned.items()]
    return float(np.mean(found))


def _cosines(one: np.ndarray, other: np.ndarray) -> np.ndarray:
    """Return the cosines between the rows of two (rank, in) matrices, (rank,)."""
    one, other = one.astype(np.float64), other.astype(np.float64)
    lengths = np.linalg.norm(one, axis=1) * np.linalg.norm(other, axis=1)
    cosines: np.ndarray = np.einsum("ri,ri->r", one, other) / np.maximum(lengths, 1e-30)
    return cosines


def _basis_cosines(a: np.ndarray, other: np.ndarray) -> np.ndarray:
    """Return `_cosines(orthogonal_init(a), other)` without the QR, in a fifth of the time.

    With a a^T = L L^T and L lower triangular, the basis is L^-1 a, and its products with `other` are L^-1 (a other^T).
    """
    gram, shared = (a @ a.T).astype(np.float64), (a @ other.T).astype(np.float64)
    if np.linalg.cond(gram) > 1e4:  # the rows are nearly dependent, and squaring in float32 lost their difference
        return _cosines(orthogonal_init(a.astype(np.float64)), other)
    products = np.diagonal(np.linalg.solve(np.linalg.cholesky(gram), shared))
    cosines: np.ndarray = products / np.maximum(np.linalg.norm(other, axis=1), 1e-30)
    return cosines


def _check_finite(state: State, folder: Path, scale: float) -> None:
    if bad := not_finite(state):
        raise InputError(f"{folder}: the merged factors of {bad[0]} are not finite; the stream is unchanged")
    for layer, (a, b) in state.deployed.items():
        largest = float(np.abs(b).max()) * float(np.abs(a).max()) * len(a) * scale
        if largest > float(np.finfo(np.float32).max):
            raise InputError(f"{folder}: the update of {layer} is beyond float32; the stream is unchanged")


def _record(name: str, t: int, folder: Path, digest: str, source: str, choose_metric: ChooseMetric) -> TaskRecord:
    counts, metric = (0, 0, 0, 0), "loss"
    labels: tuple[str, ...] | str = ()
    if source:
        task = read_task(source, name=name)
        digest, labels = task.sha256, task.labels
        counts = (len(task.train), len(task.valid), len(task.test), task.held_out)
        metric = choose_metric(task)
    return TaskRecord(
        name=name,
        t=t,
        path=str(Path(source or folder).resolve()),
        sha256=digest,
        format="absorbed",
        metric=metric,
        train_rows=counts[0],
        valid_rows=counts[1],
        test_rows=counts[2],
        held_out=counts[3],
        cut_rows=0,
        train_tokens=0,
        computed_tokens=0,
        steps=0,
        best_step=0,
        seconds=0.0,
        tokens_per_second=0.0,
        loss_before=None,
        loss_after=None,
        peak_memory_bytes=0,
        settings={},
        labels=labels,
        curve=[],
        machine={},
        scores=[None] * t,
        losses=[None] * t,
    )
