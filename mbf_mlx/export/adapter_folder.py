"""The `adapter` target: the deployed adapter as a folder of mlx-lm's layout, for users who have the base."""

from collections.abc import Callable, Mapping
from pathlib import Path

from mbf_mlx.adapters.mlx_lm import read_adapter
from mbf_mlx.export.place import fresh_folder
from mbf_mlx.files.storage import Data, Files
from mbf_mlx.methods import Factors


def write_files(
    files: Mapping[str, Data],
    out: Path,
    *,
    force: bool = False,
    forbidden: tuple[Path, ...] = (),
    finish: Callable[[Path], None] | None = None,
) -> int:
    """Write a folder of a few files and return its bytes.

    Args:
        files: Content by name.
        out: The folder to make; `place.fresh_folder` says what is refused.
        force: Replace an earlier export.
        forbidden: Folders that `out` must stay out of: the stream, the base.
        finish: Called with the folder before it gets its name, to check it and to add the card.
    """
    needs = sum(len(data) for data in files.values())
    with fresh_folder(out, force=force, needs=needs, forbidden=forbidden) as folder:
        for name, data in files.items():
            Files().write(folder / name, data)
        if finish:
            finish(folder)
    return needs


def read_back(folder: Path, factors: Factors, scale: float) -> None:
    """Raise RuntimeError if an adapter folder does not hold exactly these factors and this scale."""
    stored = read_adapter(folder)
    same = stored.factors.keys() == factors.keys() and stored.scale == scale
    if not same or any(
        (stored.factors[k].a != p.a).any() or (stored.factors[k].b != p.b).any() for k, p in factors.items()
    ):
        raise RuntimeError(f"{folder}: what was read back is not what was written")
