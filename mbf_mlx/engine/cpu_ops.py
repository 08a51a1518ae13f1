"""What lies between the matrix products of a Llama, forward and backward, for CPUs: NumPy on all cores.

mlx's CPU backend computes `exp`, `sqrt` and `where` one element at a time, and everything but matrix products on one
core. These functions work in place on mlx arrays, through NumPy views of their memory. A parameter whose name ends in
`_` is overwritten. So an array must be evaluated, nothing else may refer to it, and no mlx gradient may go through it.
llama_pass.py and llama_attention.py, which use these functions, have their own backward pass. float32 only.

Letters: T tokens, D the hidden size, N supervised positions, V the vocabulary.
"""

import contextlib
import threading
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from typing import TypeVar

import mlx.core as mx
import numpy as np

from mbf_mlx.device.backend import stay_on_cpu
from mbf_mlx.device.blas import one_thread
from mbf_mlx.device.machine import cpu_count

Result = TypeVar("Result")

CORES = cpu_count()
BLOCK = 2**16  # elements of each array that a core works on at a time: 256 kB, so that they fit into its cache

_threads = [ThreadPoolExecutor(1, "mbf-core", initializer=stay_on_cpu) for _ in range(CORES)]


class _Here(threading.local):
    alone = False  # whether this thread runs beside others, and has one core to itself


_here = _Here()


def view(array: mx.array) -> np.ndarray:
    """Evaluate an array, and return a NumPy view of its memory."""
    return np.asarray(array)


def blank(*shape: int) -> mx.array:
    """Return evaluated zeros of a shape, to write into."""
    zeros = mx.zeros(shape)
    mx.eval(zeros)
    return zeros


def rms_norm(x: mx.array, weight: np.ndarray, eps: float) -> tuple[mx.array, np.ndarray]:
    """Return x (T, D) divided by its root mean square, times `weight` (D,); and the inverse of that root, (T, 1)."""
    out, inverse = blank(*x.shape), np.empty((x.shape[0], 1), np.float32)

    def block(x: np.ndarray, out: np.ndarray, inverse: np.ndarray) -> None:
        inverse[:, 0] = 1 / np.sqrt(np.einsum("td,td->t", x, x) / x.shape[1] + eps)
        np.multiply(x, inverse, out=out)
        out *= weight

    by_rows(block, view(x), view(out), inverse)
    return out, inverse


def rms_norm_backward_(d_: mx.array, x: mx.array, inverse: np.ndarray, weight: np.ndarray, onto: mx.array) -> mx.array:
    """Return `onto` plus the gradient (T, D) of x, given the gradient `d_` of the result."""

    def block(d: np.ndarray, x: np.ndarray, inverse: np.ndarray, onto: np.ndarray) -> None:
        d *= weight
        along = np.einsum("td,td->t", d, x)[:, None] * (inverse**3 / x.shape[1])
        d *= inverse
        d -= x * along
        d += onto

    by_rows(block, view(d_), view(x), inverse, view(onto))
    return d_


def swiglu(gate: mx.array, up: mx.array) -> mx.array:
    """Return silu(gate) * up; all three are (T, width)."""
    out = blank(*gate.shape)

    def block(gate: np.ndarray, up: np.ndarray, out: np.ndarray) -> None:
        np.negative(gate, out=out)
        _exp_(out)
        out += 1
        np.divide(gate, out, out=out)
        out *= up

    by_rows(block, view(gate), view(up), view(out))
    return out


def swiglu_backward_(d: mx.array, gate_: mx.array, up_: mx.array) -> tuple[mx.array, mx.array]:
    """Return the gradients of gate and up, in their memory, given the gradient `d` of the result."""

    def block(d: np.ndarray, gate: np.ndarray, up: np.ndarray) -> None:
        sigmoid = np.negative(gate)
        _exp_(sigmoid)
        sigmoid += 1
        np.reciprocal(sigmoid, out=sigmoid)
        silu = gate * sigmoid
        slope = silu * sigmoid  # silu' = sigmoid + silu * (1 - sigmoid)
        np.subtract(sigmoid, slope, out=slope)
        slope += silu
        slope *= up
        np.multiply(slope, d, out=gate)
        np.multiply(silu, d, out=up)

    by_rows(block, view(d), view(gate_), view(up_))
    return gate_, up_


def _exp_(x: np.ndarray) -> None:
    with np.errstate(over="ignore"):  # infinity is right here: 1 / (1 + inf) is 0
        np.exp(x, out=x)


def cross_entropy_(logits_: mx.array, targets: np.ndarray) -> np.ndarray:
    """Return the cross-entropy of each target (N,) and turn the logits (N, V) into its gradient."""
    losses = np.empty(len(targets), np.float32)

    def block(z: np.ndarray, right: np.ndarray, losses: np.ndarray) -> None:
        z -= z.max(axis=1, keepdims=True)
        rows = np.arange(len(right))
        at_target = z[rows, right]
        np.exp(z, out=z)
        total = z.sum(axis=1)
        losses[:] = np.log(total) - at_target
        z *= 1 / total[:, None]
        z[rows, right] -= 1

    by_rows(block, view(logits_), targets, losses)
    return losses


def by_rows(block: Callable[..., None], *arrays: np.ndarray) -> None:
    """Call `block` on all cores, each time with the same rows of all arrays."""
    count = len(arrays[0])
    rows = max(1, min(BLOCK * count // max(arrays[0].size, 1), -(-count // CORES)))
    for_each(lambda a: block(*(each[a : a + rows] for each in arrays)), ((a,) for a in range(0, count, rows)))


def for_each(work: Callable[..., None], calls: Iterable[tuple[int, ...]]) -> None:
    """Call `work` with each tuple of arguments, on all cores; a core takes the next call as soon as it is free."""
    if _here.alone:
        for call in calls:
            work(*call)
        return
    todo = deque(calls)

    def run() -> None:
        while True:
            try:
                call = todo.popleft()
            except IndexError:
                return
            work(*call)

    others = [
        thread.submit(run) for thread in _threads[1 : len(todo)]
    ]  # the first thread may be waiting for us, or be us
    run()
    for each in others:
        if not each.cancel():  # a thread that has not started by now has nothing left to do
            each.result()


def on_own_cores(works: Sequence[Callable[[], Result]]) -> list[Result]:
    """Run at most CORES functions at the same time, each on its own core, and return their results.

    A thread must evaluate its mlx arrays before another thread uses them. The i-th function runs in the i-th thread in
    every call. None runs in the caller's thread: there, while mlx takes gradients, an array would keep all that it was
    made of.
    """
    with contextlib.nullcontext() if len(works) == 1 else one_thread():
        running = [thread.submit(_run, work, len(works) > 1) for thread, work in zip(_threads, works, strict=False)]
        wait(running)
        return [each.result() for each in running]


def _run(work: Callable[[], Result], alone: bool) -> Result:
    _here.alone = alone
    return work()
