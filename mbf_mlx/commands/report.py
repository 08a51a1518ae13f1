"""`mbf report`: a stream or an experiment's results as one HTML file."""

from pathlib import Path
from typing import Annotated

import typer

from mbf_mlx import units
from mbf_mlx.commands import console
from mbf_mlx.commands.escapes import visible
from mbf_mlx.commands.options import Json


def report(
    source: Annotated[
        Path, typer.Argument(metavar="SOURCE", help="A stream, or the results of an experiment (folder or .jsonl).")
    ],
    out: Annotated[
        Path | None, typer.Option("--out", metavar="FILE", help="HTML file to write. [default: NAME.html here]")
    ] = None,
    json: Json = False,
) -> None:
    """Write a stream or an experiment's results as one self-contained HTML page.

    Example: mbf report assistant --out assistant.html
    """
    from mbf_mlx.errors import InputError
    from mbf_mlx.experiment import results
    from mbf_mlx.export.place import fresh_file
    from mbf_mlx.files.storage import Files
    from mbf_mlx.report.results_page import results_page
    from mbf_mlx.report.stream_page import MOST, stream_page

    if (source / "stream.json").exists():
        from mbf_mlx.stream.folder import StreamFolder
        from mbf_mlx.stream.status import course, status_document

        folder = StreamFolder.open(source)
        kind, page = "stream", stream_page(status_document(folder), course(folder, MOST))
    elif (source / results.RESULTS).exists() or source.is_file():
        kind, rows = "experiment", results.read_results(source)
        name = (source.parent if source.is_file() else source).resolve().name.removesuffix("-results")
        page = results_page(name, rows)
    else:
        raise InputError(f"{source}: expected a stream or the results of mbf experiment, got neither")
    page = visible(page)  # a browser turns lines round, too
    file = out if out is not None else Path(f"{source.resolve().name}.html")
    with fresh_file(file, force=True, forbidden=(source,) if kind == "stream" else (), is_ours=_is_page) as place:
        Files().write(place, page.encode())
    if json:
        console.print_json({"kind": kind, "file": str(file), "bytes": len(page.encode())})
    else:
        console.out.print(f"{file}: {units.size(len(page.encode()))}")


def _is_page(file: Path) -> bool:
    """Return whether a file is a report of ours, which a new one may replace; any other page stays."""
    from mbf_mlx.report.page_parts import FOOTER, MARK

    if not file.is_file():
        return False
    page = file.read_bytes()
    return MARK.encode() in page[:1000] or FOOTER.encode() in page[-200:]
