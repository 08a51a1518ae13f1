"""The `lmstudio` target: a model in LM Studio's layout, `<publisher>/<model>/`, below a folder of its own.

LM Studio has no adapters, so the update is fused: into a GGUF file, which it runs everywhere, or into an MLX folder for
its MLX engine on a Mac.
"""

import shlex
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

from mbf_mlx.errors import InputError
from mbf_mlx.export.gguf.write import GGUFReport, Progress, write_gguf
from mbf_mlx.export.mlx_folder import FolderReport, write_mlx_folder
from mbf_mlx.export.place import fresh_folder
from mbf_mlx.export.weights.rounding import Rounders, no_rounder
from mbf_mlx.methods import Factors

PUBLISHER = "mbf"
ENGINES = ("gguf", "mlx")
MODELS = "~/.lmstudio/models"  # where LM Studio looks


@dataclass(frozen=True)
class LMStudioReport:
    """What an `lmstudio` export did."""

    out: Path
    model: Path  # the GGUF file or MLX folder inside `out`
    written: GGUFReport | FolderReport
    next: list[str]  # commands to type


def write_lmstudio(
    base_folder: Path,
    factors: Factors,
    scale: float,
    out: Path,
    *,
    name: str,
    publisher: str = PUBLISHER,
    engine: str = "gguf",
    kind: str | None = None,
    bits: int | None = None,
    license_id: str | None = None,
    force: bool = False,
    forbidden: tuple[Path, ...] = (),
    rounders: Rounders = no_rounder,
    progress: Progress | None = None,
    finish: Callable[[Path, LMStudioReport], None] | None = None,
) -> LMStudioReport:
    """Write `<out>/<publisher>/<name>/` with the fused model in it.

    Args:
        base_folder: As for `write_gguf` and `write_mlx_folder`, like all arguments that are not named here.
        factors: The deployed pair of every layer.
        scale: delta = scale * B @ A.
        out: The folder to make.
        name: Of the model in LM Studio.
        publisher: Whose model LM Studio says it is.
        engine: "gguf", or "mlx" for the MLX engine.
        kind: Type of the GGUF file's matrices.
        bits: Of the MLX folder's layers with factors.
        license_id: SPDX id of the model's licence.
        force: Replace an earlier export.
        forbidden: Folders to stay out of beside the base.
        rounders: Layer -> the rounder of its inputs.
        progress: Called after each tensor.
        finish: Called with the folder before it gets its name.

    Raises:
        InputError: another engine, a name that is no name of a folder, or what the writer refuses.
    """
    if engine not in ENGINES:
        raise InputError(f"engine: expected {' or '.join(ENGINES)}, got {engine!r}")
    for part in (name, publisher):
        if not part or part.startswith(".") or "/" in part or "\\" in part:
            raise InputError(f"LM Studio's <publisher>/<model>: expected names of folders, got {part!r}")
    inside = Path(publisher) / name
    with fresh_folder(out, force=force, forbidden=(base_folder, *forbidden)) as folder:
        written: GGUFReport | FolderReport
        if engine == "gguf":
            (folder / inside).mkdir(parents=True)
            model = inside / f"{name}.gguf"
            written = write_gguf(
                base_folder,
                factors,
                scale,
                folder / model,
                kind=kind,
                name=name,
                license_id=license_id,
                rounders=rounders,
                progress=progress,
            )
        else:
            (folder / publisher).mkdir()
            model = inside
            written = write_mlx_folder(
                base_folder, factors, scale, folder / model, bits=bits, rounders=rounders, progress=progress
            )
        report = LMStudioReport(
            out, out / model, replace(written, out=out / model), _next(out, publisher, model, engine)
        )
        if finish:
            finish(folder, report)
    return report


def _next(out: Path, publisher: str, model: Path, engine: str) -> list[str]:
    """Return the command that puts the model where LM Studio looks, and the one that starts it."""
    load = f"lms load {shlex.quote('/'.join(model.parts[:2]))}"
    if engine == "gguf":  # without --copy it would move the file away
        repo = shlex.quote("/".join(model.parts[:2]))
        return [f"lms import {shlex.quote(str(out / model))} --user-repo {repo} --copy --yes", load]
    return [f"mkdir -p {MODELS} && cp -R {shlex.quote(str(out / publisher))} {MODELS}/", load]
