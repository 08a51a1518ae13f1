"""What an export came to: the document that is reported, the refusal where too much was lost, and the card."""

import shutil
from collections.abc import Callable, Mapping
from dataclasses import asdict
from math import sqrt
from pathlib import Path
from typing import Any

import numpy as np

from mbf_mlx.errors import InputError
from mbf_mlx.export import card
from mbf_mlx.export.job import Job
from mbf_mlx.export.place import LICENCES
from mbf_mlx.export.weights.fuse import MAX_ERROR, MIN_RETENTION, Fused
from mbf_mlx.files.storage import Data

# Under this, or beyond weights/fuse.py's limits for the weights, an export is refused. An answer in twenty that turns
# out otherwise, or a fifth of the update gone, is something a user has to know of and agree to.
MIN_AGREEMENT = 0.95
ERRORS = 2  # standard errors by which few rows may miss it by chance
Document = dict[str, Any]


def small_document(files: Mapping[str, Data]) -> Document:
    """Return what is said of an adapter, in which nothing is lost."""
    return {"bytes": sum(len(data) for data in files.values()), "notes": []}


def fused_document(layers: list[Fused], bytes_base: int, bytes_out: int) -> Document:
    """Return what is said of an export that fused the update into weights.

    `retention` is the share of the update that the stored weights hold: the mean over the layers, and the lowest.
    `error` is the length of what they hold beside it, in lengths of the update: the mean over the layers.
    """
    kept = [layer.retention for layer in layers]
    return {
        "bytes": bytes_out,
        "bytes_base": bytes_base,
        "retention": float(np.mean(kept)) if kept else 1.0,
        "retention_lowest": min(kept, default=1.0),
        "error": float(np.mean([layer.error for layer in layers])) if layers else 0.0,
        "layers": [asdict(layer) for layer in layers],
        "quality": None,
        "notes": [],
    }


def check(job: Job, document: Document, planned: Callable[[int], int]) -> None:
    """Refuse an export that lost too much, unless the user allowed it.

    How its answers agree with the live adapter's decides; without rows to ask for, its retention and its error.

    Args:
        job: The export.
        document: Its own; gets `lost`, what it lost too much of.
        planned: Bits -> bytes of an export with them.

    Raises:
        InputError: with what was lost, and what the alternatives cost.
    """
    lost, quality = [], document["quality"]
    if quality is None and document["retention"] < MIN_RETENTION:
        lost.append(f"it keeps {document['retention']:.2f} of the update; expected at least {MIN_RETENTION}")
    if quality is None and document["error"] > MAX_ERROR:
        lost.append(
            f"its rounding is {document['error']:.1f} times as large as the update, and there are no rows to show that "
            "answers survive it; name some with --calibration"
        )
    if quality is not None and quality["agreement"] < least_agreement(quality["positions"]):
        same = f"{100 * quality['agreement']:.1f} % of {quality['positions']} places"
        lost.append(f"it says what the live adapter says at {same}; expected at least {100 * MIN_AGREEMENT:.0f} %")
    document["lost"] = lost
    if lost and not job.allow_loss:
        has = job.bits or (4 if (job.kind or "").upper().startswith("Q4") else 8)
        costs = [f"  --bits {bits}: {planned(bits) / 1e6:,.1f} MB" for bits in (8, 16) if bits > has]
        raise InputError(
            f"{job.out} was not written: {'; '.join(lost)} (it would have {document['bytes'] / 1e6:,.1f} MB)\n"
            + "\n".join([*costs, "  the adapter target: nothing is lost, and the base stays as it is"])
            + "\nhint: --allow-loss writes it all the same"
        )


def least_agreement(positions: int) -> float:
    """Return the share of agreement under which so many positions show that less than MIN_AGREEMENT is left.

    One place that differs shows nothing, however few there are.
    """
    by_chance = ERRORS * sqrt(MIN_AGREEMENT * (1 - MIN_AGREEMENT) / positions)
    return min(MIN_AGREEMENT - by_chance, 1 - 1 / positions)


def survived(document: Document) -> list[str]:
    """Return what an export kept, in sentences."""
    sentences, quality = [], document.get("quality")
    if "retention" in document:
        sentences.append(
            f"{document['retention']:.3f} of the update is in the weights (lowest layer "
            f"{document['retention_lowest']:.3f}); {document['bytes'] / 1e6:,.1f} MB, the base "
            f"{document['bytes_base'] / 1e6:,.1f} MB"
        )
    if quality:
        same, right, live = (f"{100 * quality[key]:.1f} %" for key in ("agreement", "exported", "live"))
        sentences.append(
            f"On {quality['source']}: the live adapter's token at {same} of {quality['positions']} places in answers, "
            f"KL divergence {quality['kl']:.4f} nats, {right} of {quality['rows']} rows right (live {live})"
        )
    return sentences


def add_card(job: Job, folder: Path, target: str, document: Document) -> None:
    """Write the model card into an export, and the base's licence beside it."""
    page = card.text(job.about, target, document["next"], survived(document))
    (folder / card.NAME).write_text(page, encoding="utf-8")
    for pattern in LICENCES:
        for path in sorted(job.base.glob(pattern)):
            if path.is_file() and not (folder / path.name).exists():
                shutil.copyfile(path, folder / path.name)
