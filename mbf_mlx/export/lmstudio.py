"""The `lmstudio` target: a model in LM Studio's layout, `<publisher>/<model>/`, inside a folder of its own.

LM Studio loads no adapters, so the update is fused: into a GGUF file, which LM Studio runs everywhere, or into an MLX
folder for its MLX engine on a Mac.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

from mbf_mlx.errors import InputError, quoted
from mbf_mlx.export.gguf.write import GGUFReport, write_gguf
from mbf_mlx.export.job import Job
from mbf_mlx.export.mlx_folder import FolderReport, write_mlx_folder
from mbf_mlx.export.place import fresh_folder
from mbf_mlx.export.weights.rounding import Rounders, no_rounder

PUBLISHER = "mbf"  # LM Studio shows it as the model's author
MODELS = "~/.lmstudio/models"  # where LM Studio looks for models


@dataclass(frozen=True)
class LMStudioReport:
    """What an `lmstudio` export did."""

    model: Path  # the GGUF file or MLX folder, as a path inside the export
    written: GGUFReport | FolderReport


def for_mlx(job: Job) -> bool:
    """Return whether the export is for LM Studio's MLX engine."""
    return (job.kind or "").lower() == "mlx"


def write_lmstudio(
    job: Job, rounders: Rounders = no_rounder, finish: Callable[[Path, LMStudioReport], None] | None = None
) -> LMStudioReport:
    """Write `<out>/mbf/<name>/` with the fused model in it. The name is that of the folder `out`.

    Args:
        job: The export; `job.kind` "mlx" writes an MLX folder, anything else a GGUF file.
        rounders: As for `write_gguf` and `write_mlx_folder`.
        finish: Called with the folder before it gets its name.

    Raises:
        InputError: a name that LM Studio cannot use, or what the writer refuses.
    """
    name = job.out.name
    if not name or name.startswith(".") or "\\" in name:
        raise InputError(f"{job.out}: LM Studio calls the model as this folder: expected a plain name, got {name!r}")
    with fresh_folder(job.out, force=job.force, forbidden=job.off_limits) as folder:
        model = Path(PUBLISHER) / name
        written: GGUFReport | FolderReport
        if for_mlx(job):
            (folder / PUBLISHER).mkdir()
            written = write_mlx_folder(replace(job, out=folder / model), rounders)
        else:
            (folder / model).mkdir(parents=True)
            model /= f"{name}.gguf"
            written = write_gguf(replace(job, out=folder / model), rounders)
        report = LMStudioReport(model, written)
        if finish:
            finish(folder, report)
    return report


def gguf_commands(out: str, base: str) -> list[str]:
    """Return the command that gives the GGUF file in `out` to LM Studio, and the one that loads it."""
    name = Path(out).name
    model, file = quoted(f"{PUBLISHER}/{name}"), quoted(f"{out}/{PUBLISHER}/{name}/{name}.gguf")
    # Without --copy it would move the file away.
    return [f"lms import {file} --user-repo {model} --copy --yes", f"lms load {model}"]


def mlx_commands(out: str, base: str) -> list[str]:
    """Return the command that puts the MLX folder in `out` where LM Studio looks, and the one that loads it."""
    copy = f"mkdir -p {MODELS} && cp -R {quoted(f'{out}/{PUBLISHER}')} {MODELS}/"
    return [copy, f"lms load {quoted(f'{PUBLISHER}/{Path(out).name}')}"]
