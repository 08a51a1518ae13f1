"""The live model, which is the base with its adapter: it answers first, and the export is compared with its answers."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from mbf_mlx.adapters.mlx_lm import block_keys
from mbf_mlx.base import unpack
from mbf_mlx.base.load import load_base
from mbf_mlx.config import LoRAConfig
from mbf_mlx.device import backend
from mbf_mlx.engine.lora_layers import attach, lora_layers, write_factors
from mbf_mlx.export.job import Job, LostTooMuchError
from mbf_mlx.export.quality.compare import NotFiniteError, Reference
from mbf_mlx.export.quality.input_moments import Shelf, moments
from mbf_mlx.export.quality.layers_on_disk import Rows, leave_on_disk
from mbf_mlx.export.weights.checkpoint import Checkpoint
from mbf_mlx.export.weights.rounding import Rounder

CACHE_BYTES = 64 << 20  # freed memory that mlx may keep for reuse


class Live:
    """Runs the live model once on the job's rows and keeps its answers.

    No two models are in memory at once. Weights that are not quantized stay in their file, and a CPU unpacks the others
    in every pass. So an export needs little more memory than the base's file.

    Args:
        job: The export.
        few_bits: Whether learned layers stay at few bits and need a rounder.
    """

    def __init__(self, job: Job, few_bits: bool) -> None:
        self._job = job
        self._reference: Reference | None = None
        self._moments: Shelf | None = None
        self._last: tuple[int, Rounder] | None = None
        rows, fit = job.rows.compare, job.rows.fit if few_bits else []
        if not rows and not fit:
            return
        with _little_spare_memory():
            self._ask(job, rows, fit)

    def _ask(self, job: Job, rows: Sequence[Any], fit: Sequence[Any]) -> None:
        rank = next(iter(job.factors.values())).a.shape[0]
        config = LoRAConfig(rank=rank, scale=job.scale, keys=block_keys(job.factors), num_layers=job.num_layers)

        def prepare(unread: nn.Module) -> None:
            attach(unread, config)
            leave_on_disk(unread, _plain_layers(job.base), _mx_dtype())

        base = load_base(job.base, dtype=_dtype(), prepare=prepare)
        write_factors(base.model, job.factors)
        unpack.step_by_step(base.model)
        if rows:
            with job.show("asking the live adapter", len(rows), "rows") as update:
                self._reference = Reference(base.model, rows, _counter(update))
        if fit:
            self._moments = Shelf(job.out.absolute().parent)
            with job.show("watching inputs", None, "rows") as update:
                for names, matrix in moments(base.model, lora_layers(base.model), fit, _counter(update)):
                    self._moments.put(names, matrix)

    def rounder(self, layer: str) -> Rounder | None:
        """Return the rounder for a layer's inputs; None if there were no rows to measure them on."""
        place = self._moments.place(layer) if self._moments else None
        if self._moments is None or place is None:
            return None
        if self._last is None or self._last[0] != place:  # q and v share it and come one after the other
            self._last = (place, Rounder(self._moments.get(layer)))
        return self._last[1]

    def compare(
        self, folder: Path, stored: Mapping[str, Rows] | None = None, *, in_float16: bool = False
    ) -> dict[str, Any] | None:
        """Load an export and return its comparison with the live model; None if there are no rows.

        Args:
            folder: An MLX model folder.
            stored: Layer -> its weight in an export that is not such a folder; replaces the folder's own.
            in_float16: Compute in float16, as other programs do with an export in float16: what a layer gives may be
                beyond that type though no weight is. Otherwise the export is computed as the live model was.

        Raises:
            LostTooMuchError: the export's logits are not finite.
        """
        on_disk = {**_plain_layers(folder), **(stored or {})}
        with _little_spare_memory():
            try:
                return self._compare(folder, on_disk, in_float16)
            except NotFiniteError as error:
                message = f"{self._job.out} was not written: {error}; try --bits 32"
                raise LostTooMuchError(message, str(error), allowed=False) from error

    def _compare(self, folder: Path, on_disk: Mapping[str, Rows], in_float16: bool) -> dict[str, Any] | None:
        dtype, mx_dtype = (None, mx.float16) if in_float16 else (_dtype(), _mx_dtype())
        exported = load_base(folder, dtype=dtype, prepare=lambda unread: leave_on_disk(unread, on_disk, mx_dtype)).model
        if in_float16:  # norms have the base's type where an export is no folder
            exported.set_dtype(mx.float16)
        unpack.step_by_step(exported)
        if not np.isfinite(np.array(exported(mx.array([[1, 2, 3]])).astype(mx.float32))).all():
            raise NotFiniteError("its logits are not finite")
        if self._reference is None:
            return None
        with self._job.show("asking the export", len(self._job.rows.compare), "rows") as update:
            quality = self._reference.compare(exported, _counter(update))
        return {**asdict(quality), "source": self._job.rows.source}


def _plain_layers(folder: Path) -> dict[str, Rows]:
    """Return the layers of a folder that are not quantized."""
    checkpoint = Checkpoint(folder)
    layers = [checkpoint.layer(name) for name in checkpoint.layer_names()]
    return {layer.name: layer for layer in layers if layer.setting is None}


@contextmanager
def _little_spare_memory() -> Iterator[None]:
    """Let mlx keep little freed memory in this block, and none after it."""
    before = mx.set_cache_limit(CACHE_BYTES)
    try:
        yield
    finally:
        mx.clear_cache()
        mx.set_cache_limit(before)


def _dtype() -> str | None:
    """Return the type that a model computes in here; with "float32", quantized layers stay packed between uses."""
    return "float32" if backend.setup().kind == "cpu" else None


def _mx_dtype() -> mx.Dtype | None:
    return mx.float32 if _dtype() else None


def _counter(update: Any) -> Any:
    done = 0

    def advance(rows: int) -> None:
        nonlocal done
        done += rows
        update(done)

    return advance
