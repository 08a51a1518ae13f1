"""Adapters trained elsewhere: hand out the start of the next task, absorb the tuned result. NumPy alone, no model:
where a method looks at a task's inputs, whoever calls brings what runs the model.

Shapes: A (rank, in), B (out, rank). What PEFT, Unsloth, axolotl, LLaMA-Factory or mlx-lm trained from our start comes
back as one adapter, whose update is brought to the stream's own scale: B' = B * their scale / ours. The base is
compared by its architecture, its layers and their shapes, because elsewhere training may run on the unquantized model.
"""

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from mbf_mlx.adapters import mlx_lm as adapter
from mbf_mlx.adapters import peft
from mbf_mlx.base.sources import read_config
from mbf_mlx.device.machine import freed_memory_kept
from mbf_mlx.device.threads import one_thread_each
from mbf_mlx.errors import InputError
from mbf_mlx.files.storage import Data
from mbf_mlx.methods import Factors, Method, Pair, Seen, State, hooks, make, names, not_finite
from mbf_mlx.methods.slao import Slao
from mbf_mlx.reference import orthogonal_init
from mbf_mlx.stream.folder import StreamFolder
from mbf_mlx.stream.records import TaskRecord

Look = Callable[[Method, State, Factors, str], dict[str, Seen]]  # what a task's file shows the tuned layers

FORMATS = ("peft", "mlx")
PLAUSIBLE = 0.3  # mean cosine between the rows of the start's A and of the tuned one, under which it started elsewhere
SAME = {"mistral": "llama"}  # what mlx-lm computes with one code


@dataclass(frozen=True, kw_only=True)
class Absorbed:
    """What was merged."""

    record: TaskRecord
    cosine: float  # mean over the rows of all layers, between the start's A and the tuned one
    notes: tuple[str, ...] = ()


class Tuned(NamedTuple):
    """An adapter tuned elsewhere, in the stream's own scale and order of layers."""

    factors: Factors
    sha256: str  # of the file that they come from
    notes: tuple[str, ...]  # what had to be changed


def check_method(method: Method) -> None:
    """Check that a method can do with what was tuned elsewhere, at most a look at the task's inputs.

    Raises:
        InputError: it takes part in the training itself.
    """
    if not _absorbs(method):
        plain = ", ".join(name for name in names() if _absorbs(make(name)))
        raise InputError(
            f"method {method.name}: expected one that merges what training leaves ({plain}); this one takes part in the"
            " training itself, so its tasks cannot be trained elsewhere\nhint: mbf learn trains them here"
        )


def _absorbs(method: Method) -> bool:
    return set(hooks(method)) <= {"measure"} or hasattr(method, "absorb")


def wants_rows(stream: StreamFolder) -> bool:
    """Return whether absorbing needs the rows that the task was trained on, and runs the model on them."""
    return hasattr(_method(stream), "measure")


def next_start(stream: StreamFolder, kind: str) -> dict[str, Data]:
    """Return the files of the adapter that the next task starts from.

    Args:
        stream: The stream that the task will be absorbed into.
        kind: "peft" or "mlx": whose layout.

    Raises:
        InputError: no such layout, or a method that takes part in the training itself.
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
) -> Absorbed:
    """Merge an adapter tuned elsewhere as the stream's next task, and commit it. Needs the stream's writer lock.

    Args:
        stream: The stream whose start it was trained from.
        folder: The adapter, in PEFT's or mlx-lm's layout.
        name: Of the task.
        source: The task's file or folder, to be scored on later; may be left out unless the method measures inputs.
        force: Absorb an adapter that does not look as if it started from our start, or on our architecture.
        again: Absorb under a name that the stream has already.
        look: Runs the model for a method that measures inputs.

    Raises:
        InputError: an adapter that does not belong, a name that is taken, no rows where the method measures their
            inputs; the stream is as it was.
    """
    history = stream.history()
    if not again and any(record.name == name for record in history):
        raise InputError(f"--name: {stream.path} has learned a task named {name!r}; choose another name, or --again")
    method, measures = _method(stream), wants_rows(stream)
    if measures and not (source and look):
        raise InputError(
            f"--task: method {method.name} measures the inputs that a task has; expected the task file that the adapter"
            " was trained on, got none"
        )
    with ThreadPoolExecutor(1) as pool:
        reading = pool.submit(read_tuned, stream, folder, force=force)
        state = stream.state()
        tuned = reading.result()
    cosine = _cosine(method, state, tuned.factors)
    if cosine < PLAUSIBLE and not force:
        raise InputError(
            f"{folder}: expected an adapter trained from this stream's start of task {state.t + 1} (mean cosine of A's"
            f" rows at least {PLAUSIBLE}), got {cosine:.2f}\nhint: mbf next {stream.path} OUT writes that start;"
            " --force absorbs the adapter all the same"
        )
    if measures and look:
        finish: Any = getattr(method, "absorb", method.finish)
        state = finish(state, tuned.factors, inputs=look(method, state, tuned.factors, source))
    else:
        state = method.finish(state, tuned.factors)
    _check_finite(state, folder)
    record = _record(name, state.t, folder, tuned.sha256, source)
    generation = stream.current().manifest
    stream.commit(state, record, generation.base_path, {"absorbed": str(folder)})
    return Absorbed(record=record, cosine=cosine, notes=tuned.notes)


def read_tuned(stream: StreamFolder, folder: Path, *, force: bool = False) -> Tuned:
    """Read an adapter for a stream.

    Raises:
        InputError: another architecture (not with `force`), rank, layers or shapes; everything wrong is named at once.
    """
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
        return Tuned({layer: factors[layer] for layer in identity.layers}, digest, notes)
    share = np.float32(scale / identity.scale)
    notes = (*notes, f"its scale is {scale:g}, the stream's {identity.scale:g}: the ratio goes into B")
    scaled = {layer: Pair(factors[layer].a, factors[layer].b * share) for layer in identity.layers}
    return Tuned(scaled, digest, notes)


def _other_architecture(base: object, expected: str) -> list[str]:
    """Return the line that says so where an adapter's base is a folder here and of another architecture.

    A hub id is not looked up: what it trained on is then seen by its layers and their shapes alone.
    """
    try:
        found = str(read_config(Path(str(base)))["model_type"])
    except (InputError, OSError, KeyError):
        return []  # it is not here, or does not say
    if SAME.get(found, found) == SAME.get(expected, expected):
        return []
    return [f"  it was trained on {base}: expected architecture {expected!r}, got {found!r} (--force: absorb it still)"]


def _method(stream: StreamFolder) -> Method:
    method = make(stream.identity.method, stream.identity.method_options)
    check_method(method)
    return method


def _cosine(method: Method, state: State, tuned: Factors) -> float:
    """Return the mean over all layers and rows of the cosine between a row of the start's A and the tuned one's."""
    if state.t and isinstance(method, Slao) and method.settings["start_a"] == "qr":
        with one_thread_each():  # one layer after the other: they are too small for threads to gain
            found = [_basis_cosines(method.tuned(state, layer).a, a) for layer, (a, _) in tuned.items()]
    else:
        start = method.start(state)
        found = [_cosines(start[layer].a, a) for layer, (a, _) in tuned.items()]
    return float(np.mean(found))


def _cosines(one: np.ndarray, other: np.ndarray) -> np.ndarray:
    """Return the cosines between the rows of two matrices, (rank,)."""
    one, other = one.astype(np.float64), other.astype(np.float64)
    lengths = np.linalg.norm(one, axis=1) * np.linalg.norm(other, axis=1)
    return np.einsum("ri,ri->r", one, other) / np.maximum(lengths, 1e-30)


def _basis_cosines(a: np.ndarray, other: np.ndarray) -> np.ndarray:
    """Return what `_cosines` does of `orthogonal_init(a)` and `other`, in a fifth of the time: QR is left out.

    With a a^T = L L^T, L lower triangular, that basis is L^-1 a, and its products with `other` are L^-1 (a other^T).
    """
    gram, shared = (a @ a.T).astype(np.float64), (a @ other.T).astype(np.float64)
    if np.linalg.cond(gram) > 1e4:  # rows that nearly depend on each other: float32 lost their difference when squared
        return _cosines(orthogonal_init(a.astype(np.float64)), other)
    products = np.diagonal(np.linalg.solve(np.linalg.cholesky(gram), shared))
    return products / np.maximum(np.linalg.norm(other, axis=1), 1e-30)


def _check_finite(state: State, folder: Path) -> None:
    if bad := not_finite(state):
        raise InputError(f"{folder}: the merged factors of {bad[0]} are not finite; the stream is as it was")


def _record(name: str, t: int, folder: Path, digest: str, source: str) -> TaskRecord:
    counts, metric = (0, 0, 0, 0), "loss"
    labels: tuple[str, ...] | str = ()
    if source:
        from mbf_mlx.data.task import read_task

        task = read_task(source, name=name)
        digest, labels = task.sha256, task.labels
        counts = (len(task.train), len(task.valid), len(task.test), task.held_out)
        metric = "exact_match"
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
