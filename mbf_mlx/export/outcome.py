"""The result of an export: the document that is reported, the refusal where too much was lost, and the card."""

import shutil
from collections.abc import Callable, Mapping
from dataclasses import asdict
from math import sqrt
from pathlib import Path
from typing import Any

import numpy as np

from mbf_mlx.base.card import CARD
from mbf_mlx.export import card
from mbf_mlx.export.job import Job, LostTooMuchError
from mbf_mlx.export.place import LICENCES
from mbf_mlx.export.weights.fuse import MAX_ERROR, MIN_RETENTION, Fused
from mbf_mlx.export.weights.half_type import FLOAT16
from mbf_mlx.files.storage import Data

# An export with less agreement, or beyond the limits of weights/fuse.py, is refused. One answer in twenty that changes,
# or a fifth of the update lost, is something the user has to know and agree to.
MIN_AGREEMENT = 0.95
ENOUGH = 0.9  # rows that show less than this agreement are too few, which is said
Z = 1.96  # standard errors to either side of 95 %
ERRORS = 2  # standard errors by which a few rows may miss it by chance
Document = dict[str, Any]
Commands = Callable[[str, str], list[str]]  # (the export, the base) -> command lines that serve it


def small_document(files: Mapping[str, Data]) -> Document:
    """Return the document of an adapter export, in which nothing is lost."""
    return {"bytes": sum(len(data) for data in files.values()), "notes": []}


def fused_document(layers: list[Fused], bytes_base: int, bytes_out: int) -> Document:
    """Return the document of an export that fused the update into the weights.

    `retention` is the share of the update that the stored weights hold: the mean over the layers, and the lowest.
    `error` is how far the stored weights are from W + delta, in lengths of delta: the mean over the layers.
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


def check(job: Job, document: Document, planned: Callable[[Job, int], int]) -> None:
    """Refuse an export that lost too much, unless the user allowed it.

    The agreement of its answers with the live adapter's decides. With no rows to ask, or too few, retention and error
    decide, too.

    Args:
        job: The export.
        document: Its document; gets `lost`, a sentence for each thing that was lost.
        planned: (job, bits) -> bytes of an export with so many bits.

    Raises:
        LostTooMuchError: with what was lost, and what the alternatives cost.
    """
    lost, quality = [], document["quality"]
    shown = 0.0 if quality is None else shown_agreement(quality["agreement"], quality["positions"])
    if shown < ENOUGH and document["retention"] < MIN_RETENTION:
        lost.append(f"it keeps {document['retention']:.2f} of the update; expected at least {MIN_RETENTION}")
    if shown < ENOUGH and document["error"] > MAX_ERROR:
        lost.append(
            f"its rounding is {document['error']:.1f} times as large as the update; expected at most {MAX_ERROR:g}"
        )
    if lost:
        count = 0 if quality is None else quality["rows"]
        rows = {0: "there are no rows", 1: "1 row is too few"}.get(count, f"{count} rows are too few")
        lost[-1] += f", as {rows} to show that the answers survive all the same (--calibration FILE gives more)"
    if quality is not None and quality["agreement"] < least_agreement(quality["positions"]):
        same = f"{100 * quality['agreement']:.1f} % of {quality['positions']} places"
        lost.append(f"it agrees with the live adapter at {same}; expected at least {100 * MIN_AGREEMENT:.0f} %")
    document["lost"] = lost
    if quality is not None and shown < ENOUGH:
        document["notes"].append(
            f"{quality['positions']} places in the answers of {quality['rows']} rows were compared: they show only that"
            f" at least {100 * shown:.0f} % of places stay as they are; --calibration FILE with more rows shows more"
        )
    if lost and not job.allow_loss:
        has = job.bits or (4 if (job.kind or "").upper().startswith("Q4") else 8)
        costs = [f"  --bits {bits}: {planned(job, bits) / 1e6:,.1f} MB" for bits in (8, 16, 32) if bits > has]
        said = "; ".join(lost)
        raise LostTooMuchError(
            f"{job.out} was not written: {said} (it would have {document['bytes'] / 1e6:,.1f} MB)\n"
            + "\n".join([*costs, "  the adapter target: nothing is lost, and the base stays as it is"])
            + "\nhint: --allow-loss writes it anyway",
            said,
        )


def in_best_half_type(job: Job, write: Callable[[Job], Document]) -> Document:
    """Write an export; one in float16 that its check refuses is written in bfloat16, if that passes.

    What a layer gives may be beyond float16 though every weight is not, so the weights alone do not decide.

    Args:
        job: The export, with the type of its 16 bits.
        write: Writes and checks it, and returns its document.

    Raises:
        LostTooMuchError: neither type passes; about float16.
    """
    if job.half is None or job.half.dtype != FLOAT16:
        return write(job)
    try:
        return write(job.changed(allow_loss=False))
    except LostTooMuchError as error:
        refused = error
    other = job.changed(half=job.half.instead(refused.lost))
    try:
        return write(other.changed(allow_loss=False))
    except LostTooMuchError:
        if not job.allow_loss:
            raise refused from None
    return write(job if refused.allowed else other)


def least_agreement(positions: int) -> float:
    """Return the agreement below which so many positions show that the true one is under MIN_AGREEMENT.

    A single position that differs shows nothing, however few positions there are.
    """
    by_chance = ERRORS * sqrt(MIN_AGREEMENT * (1 - MIN_AGREEMENT) / positions)
    return min(MIN_AGREEMENT - by_chance, 1 - 1 / positions)


def shown_agreement(agreement: float, positions: int) -> float:
    """Return the least true agreement that goes with the one that was measured, at 95 % confidence.

    Source: Wilson's score interval, 1927.
    """
    square = Z * Z / positions
    middle = (agreement + square / 2) / (1 + square)
    return middle - sqrt(agreement * (1 - agreement) * square + square * square / 4) / (1 + square)


def survived(document: Document) -> list[str]:
    """Return what an export kept, one sentence each."""
    sentences, quality = [], document.get("quality")
    if "retention" in document:
        sentences.append(
            f"{document['retention']:.3f} of the update is in the weights (lowest layer "
            f"{document['retention_lowest']:.3f}); {document['bytes'] / 1e6:,.1f} MB, the base "
            f"{document['bytes_base'] / 1e6:,.1f} MB"
        )
    if half := document.get("half_type"):
        sentences.append(_half_sentence(**half))
    if quality:
        same, right, live = (f"{100 * quality[key]:.1f} %" for key in ("agreement", "exported", "live"))
        sentences.append(
            f"On {quality['source']}: the live adapter's token at {same} of {quality['positions']} places in answers, "
            f"KL divergence {quality['kl']:.4f} nats, {right} of {quality['rows']} rows right (live {live})"
        )
    return sentences


def _half_sentence(chosen: str, errors: dict[str, float], why_not_float16: str | None) -> str:
    """Return which 16-bit type an export has, and what of the update that costs."""
    kept = f"Stored in {chosen}. The update keeps {100 * max(0.0, 1 - errors[chosen]):.0f} %"
    rounded = f"{chosen} rounds by {errors[chosen]:.2f} of it"
    others = [f"{name} would by {error:.2f}" for name, error in errors.items() if name != chosen]
    return f"{kept}: {', '.join([rounded, *others])}" + (f"; {why_not_float16}" if why_not_float16 else "")


def add_card(job: Job, folder: Path, target: str, document: Document, commands: Commands) -> None:
    """Write the model card into an export's folder, and copy the base's licence files beside it."""
    serve = commands(job.out.name, job.about.hub_id or job.about.base)
    (folder / CARD).write_text(card.text(job.about, target, serve, survived(document)), encoding="utf-8")
    for pattern in LICENCES:
        for path in sorted(job.base.glob(pattern)):
            if path.is_file() and not (folder / path.name).exists():
                shutil.copyfile(path, folder / path.name)


def next_commands(job: Job, commands: Commands) -> list[str]:
    """Return the commands that serve an export from where it was written."""
    return commands(str(job.out), str(job.base))
