"""The live model of an export, the base with its adapter: it answers first, exports are compared with its answers."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np

from mbf_mlx import backend, model, unpack
from mbf_mlx.adapter import block_keys
from mbf_mlx.config import LoRAConfig
from mbf_mlx.errors import InputError
from mbf_mlx.export.checkpoint import Checkpoint
from mbf_mlx.export.fuse import find_layers, keeps_grid, touched_form
from mbf_mlx.export.job import Job
from mbf_mlx.export.moments import moments
from mbf_mlx.export.quality import Reference
from mbf_mlx.export.rounding import Rounder

CACHE_BYTES = 64 << 20  # of freed memory that mlx keeps for later


class Live:
    """Runs the live model once, on the rows that the job may look at, and keeps its answers.

    No two models are in memory at once. On a CPU a model's layers stay packed and are unpacked in every pass, so that
    an export takes little more memory than the base's file.
    """

    def __init__(self, job: Job) -> None:
        self._job = job
        self._reference: Reference | None = None
        self._moments: dict[str, np.ndarray] = {}  # layers with the same inputs share one
        self._last: tuple[int, Rounder] | None = None
        rows, fit = job.rows.compare, job.rows.fit if _keeps_few_bits(job) else []
        if not rows and not fit:
            return
        with _little_spare_memory():
            self._ask(job, rows, fit)

    def _ask(self, job: Job, rows: Sequence[Any], fit: Sequence[Any]) -> None:
        base = model.load_base(job.base, dtype=_dtype())
        rank = next(iter(job.factors.values())).a.shape[0]
        model.attach(
            base.model, LoRAConfig(rank=rank, scale=job.scale, keys=block_keys(job.factors), num_layers=job.num_layers)
        )
        model.write_factors(base.model, job.factors)
        unpack.step_by_step(base.model)
        if rows:
            with job.show("asking the live adapter", len(rows), "rows") as update:
                self._reference = Reference(base.model, rows, _counter(update))
        if fit:
            with job.show("watching inputs", None, "rows") as update:
                for names, matrix in moments(base.model, model.lora_layers(base.model), fit, _counter(update)):
                    self._moments.update(dict.fromkeys(names, matrix))

    def rounder(self, layer: str) -> Rounder | None:
        """Return what rounds a layer for the inputs that it has; None where there were no rows to see them on."""
        matrix = self._moments.get(layer)
        if matrix is None:
            return None
        if self._last is None or self._last[0] != id(matrix):  # q and v come one after the other
            self._last = (id(matrix), Rounder(matrix))
        return self._last[1]

    def compare(self, folder: Path) -> dict[str, Any] | None:
        """Load an exported folder and compare it; None where there were no rows.

        Raises:
            InputError: it loads, but its logits are not finite.
        """
        with _little_spare_memory():
            return self._compare(folder)

    def _compare(self, folder: Path) -> dict[str, Any] | None:
        exported = model.load_base(folder, dtype=_dtype()).model
        unpack.step_by_step(exported)
        if not np.isfinite(np.array(exported(mx.array([[1, 2, 3]])).astype(mx.float32))).all():
            raise InputError(f"{self._job.out} was not written: its logits are not finite; try --bits 32")
        if self._reference is None:
            return None
        with self._job.show("asking the export", len(self._job.rows.compare), "rows") as update:
            quality = self._reference.compare(exported, _counter(update))
        return {**asdict(quality), "source": self._job.rows.source}


@contextmanager
def _little_spare_memory() -> Iterator[None]:
    """Let mlx keep little of the memory that it has done with, and nothing of it afterwards."""
    before = mx.set_cache_limit(CACHE_BYTES)
    try:
        yield
    finally:
        mx.clear_cache()
        mx.set_cache_limit(before)


def _keeps_few_bits(job: Job) -> bool:
    """Return whether any layer with factors stays at few bits, and so has to be rounded with care."""
    layers = find_layers(Checkpoint(job.base), job.factors)
    return job.bits not in (16, 32) and any(
        keeps_grid(layer, touched_form(layer, job.bits)) for layer in layers.values()
    )


def _dtype() -> str | None:
    """Return what a model computes in here; "float32" leaves quantized layers packed between their uses."""
    return "float32" if backend.setup().kind == "cpu" else None


def _counter(update: Any) -> Any:
    done = 0

    def advance(rows: int) -> None:
        nonlocal done
        done += rows
        update(done)

    return advance
