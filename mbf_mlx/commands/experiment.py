"""`mbf experiment`: compare methods, task orders and seeds, from one file into one table."""

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from mbf_mlx.commands import console
from mbf_mlx.commands.options import Json

if TYPE_CHECKING:
    from mbf_mlx.experiment.results import CellRow


def experiment(
    file: Annotated[
        Path,
        typer.Argument(metavar="FILE", help="TOML file with the base, tasks, orders, methods, seeds and settings."),
    ],
    out: Annotated[
        Path | None,
        typer.Option("--out", metavar="FOLDER", help="Folder for the results. [default: NAME-results for NAME.toml]"),
    ] = None,
    tasks: Annotated[
        Path | None,
        typer.Option("--tasks", metavar="FOLDER", help="Folder of the tasks, instead of the one that the file names."),
    ] = None,
    show: Annotated[
        bool, typer.Option("--show", help="Only print the table of the finished cells; run nothing, read no tasks.")
    ] = False,
    against: Annotated[
        str | None,
        typer.Option(
            "--against",
            metavar="METHOD",
            help="Compare each method with this one, cell by cell, in a second table.",
        ),
    ] = None,
    markdown: Annotated[bool, typer.Option("--markdown", help="Print the tables in Markdown.")] = False,
    json: Json = False,
) -> None:
    """Run every combination of methods, task orders, seeds and settings (a cell each); compare them in one table.

    Cells run one after another. A finished cell is never run again, and a killed run continues where it stopped. Start
    the same command in other processes to share the work: each takes cells that no other is running.

    Example: mbf experiment first.toml --markdown
    """
    from mbf_mlx.experiment.plan_file import read_plan

    plan = read_plan(file, tasks, with_tasks=not show)
    if against is not None:
        from mbf_mlx.experiment.differences import reference_name

        against = reference_name((cell.name for cell in plan.cells), against)
    folder = out if out is not None else plan.results_folder
    for name, task in plan.tasks.items():
        for warning in task.warnings:
            console.warn(f"{name}: {warning}")
    if show:
        from mbf_mlx.experiment.results import cell_key, read_results

        found = {cell_key(row): row for row in read_results(folder)}
        planned = [(*cell.cell_key, (plan.file.score_on, plan.file.test_rows)) for cell in plan.cells]
        rows = [found[place] for place in planned if place in found]
    else:
        rows = _run(plan, folder)
    _print(plan.name, rows, against, json, markdown)


def _run(plan: Any, folder: Path) -> "list[CellRow]":
    from mbf_mlx.device import backend

    backend.setup()  # loads the fast BLAS, which must be there before mlx is
    from mbf_mlx.experiment.cell import Watch
    from mbf_mlx.experiment.run import Experiment
    from mbf_mlx.files.storage import Files

    Files().make_folder(folder)
    running = Experiment(plan, folder, Watch())

    class Shown(Watch):
        """One bar over all cells. It counts the tasks learned in them, here or by another process."""

        def __init__(self, update: Any, total: int) -> None:
            self.update, self.total, self.done, self.what = update, total, 0, ""
            self.told = set[tuple[str, str]]()  # a task, and what was said of it: cells share their tasks

        def task(self, name: str, t: int, rows: int, notes: Sequence[str]) -> None:
            for note in notes:
                if (name, note) not in self.told:
                    console.warn(f"{name}: {note}")
                    self.told.add((name, note))

        def cell(self, number: int, cell: Any, task: int) -> None:
            self.what = f"{cell.name}, {cell.order}, seed {cell.seed}, {cell.tasks[task]}"
            left = sum(len(each.trained) for each in running.missing())
            self.done = self.total - left + cell.trained.index(task)
            self.update(self.done, now=self.what)

        def step(self, name: str, step: Any, peak_memory: int) -> None:
            self.update(self.done, now=self.what, step=f"{step.step}/{step.steps}", loss=step.loss)

        def measuring(self, name: str, done: int, total: int) -> None:
            self.update(self.done, now=self.what, measuring=f"{done}/{total}")

    missing = running.missing()
    total = sum(len(cell.trained) for cell in missing)
    console.err.print(f"{len(plan.cells)} cells, {len(plan.cells) - len(missing)} of them finished: {folder}")
    if not missing:
        return running.rows()
    with console.progress("experiment", total, "tasks") as update:
        running.watch = Shown(update, total)
        rows = running.run()
        update(total)
    return rows


def _print(name: str, rows: "list[CellRow]", against: str | None, json: bool, markdown: bool) -> None:
    from mbf_mlx.experiment import differences as compared
    from mbf_mlx.experiment import table as tables

    gains = compared.differences(rows, against) if against is not None else []
    if json:
        document = tables.document(name, rows)
        if against is not None:
            document["against"] = {"name": against, "differences": [asdict(line) for line in gains]}
        console.print_json(document)
        return
    shown = {f"{name}: points of percent, mean ± deviation over seeds": tables.columns(tables.table(rows))}
    if against is not None and not gains:
        console.warn(f"--against: no finished cell has the order and seed of a finished one of {against!r}")
    elif against is not None:
        shown[f"average accuracy against {against}: points, cell by cell"] = compared.columns(gains)
    for number, (title, found) in enumerate(shown.items()):
        if markdown:
            console.out.print(("\n" if number else "") + tables.markdown(found))
        else:
            console.out.print(_shown(title, found))


def _shown(title: str, found: dict[str, list[str]]) -> Any:
    from rich.table import Table

    shown = Table(title=title, title_justify="left")
    for head in found:
        shown.add_column(head, justify="left" if head in ("method", "order") else "right", no_wrap=True)
    for cells in zip(*found.values()):
        shown.add_row(*cells)
    return shown
