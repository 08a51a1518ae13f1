"""class Experiment: runs an experiment's cells and returns their results.

A cell's result is one line in `results.jsonl`, under the hash of all that determines it; a finished cell is never run
again. Cells of one setting, order and seed share trainings, so they run together, behind one lock. A killed run goes
on, and several processes may run one experiment: each takes the cells that no other process is running, and a training
continues from its last save.
"""

from collections.abc import Sequence
from dataclasses import replace
from itertools import groupby
from pathlib import Path
from typing import cast

from filelock import FileLock, Timeout

from mbf_mlx.base.folder import chosen_layers
from mbf_mlx.errors import InputError
from mbf_mlx.experiment.cell import RunningCell, Watch
from mbf_mlx.experiment.hashes import digest, of_cell, settings_of_cell
from mbf_mlx.experiment.plan_file import Cell, ExperimentPlan, read_plan
from mbf_mlx.experiment.results import RESULTS, CellRow
from mbf_mlx.experiment.workbench import Workbench
from mbf_mlx.files.log import Log
from mbf_mlx.learning.learner import LoadLearner, load_learner
from mbf_mlx.learning.precision import expected
from mbf_mlx.methods import empty_state, make

POLL = 1.0  # seconds between two looks at cells that another process is running


class Experiment:
    """A checked plan and the folder of its results. `Experiment.open` reads the plan from a file.

    Args:
        plan: The checked plan.
        folder: The folder of the results; made where there is none.
        watch: Told what happens.
        load: Loads a base model with factors attached.

    Raises:
        InputError: layers that the base does not have, methods that do not fit them; nothing has run then.
    """

    def __init__(
        self, plan: ExperimentPlan, folder: Path, watch: Watch | None = None, load: LoadLearner = load_learner
    ) -> None:
        self.folder, self.watch = folder, watch or Watch()
        self.bench = Workbench(plan, folder, load)
        self.plan = replace(plan, cells=tuple(map(self._decided, plan.cells)))
        self.results = Log(folder / RESULTS)
        self._check()

    @classmethod
    def open(
        cls,
        file: str | Path,
        *,
        out: str | Path | None = None,
        tasks: str | Path | None = None,
        watch: Watch | None = None,
    ) -> "Experiment":
        """Read an experiment's file, and take up its results where there are some.

        Args:
            file: The TOML file, as docs/experiments.md describes it.
            out: The folder of the results; by default NAME-results for NAME.toml, in the working folder.
            tasks: The folder of the tasks, in place of the one that the file names.
            watch: Told what happens.

        Raises:
            InputError: everything in the file that does not fit.
        """
        plan = read_plan(Path(file), Path(tasks) if tasks is not None else None)
        return cls(plan, Path(out) if out is not None else plan.results_folder, watch)

    def _decided(self, cell: Cell) -> Cell:
        """Return a cell whose precision is decided, for it decides the result."""
        precision = expected(cell.train, cell.lora, self.bench.source.path)
        return replace(cell, train=replace(cell.train, precision=precision))

    def _check(self) -> None:
        """Refuse layers that the base does not have and methods that do not fit them, before anything runs.

        Raises:
            InputError: all that does not fit.
        """
        problems: list[str] = []
        different = {(cell.label, repr(cell.lora)): cell for cell in self.plan.cells}
        for cell in different.values():
            try:
                layers, _ = chosen_layers(self.bench.source.path, cell.lora.keys, cell.lora.num_layers)
                make(cell.method, cell.options).start(empty_state(layers, cell.lora.rank, cell.seed))
            except InputError as error:
                said = f"{cell.label}: {error}"
                problems += [said] if said not in problems else []
        if problems:
            raise InputError("\n".join(problems))

    def rows(self) -> list[CellRow]:
        """Return the results of the plan's finished cells, in the plan's order."""
        found = {row["hash"]: cast(CellRow, row) for row in self.results.read() if "hash" in row}
        rows: list[CellRow] = []
        for cell in self.plan.cells:
            if (key := self.key(cell)) in found:  # the same cell under another name is the same cell
                rows.append({**found[key], "label": cell.label, "setting": cell.setting, "order": cell.order})
        return rows

    def missing(self) -> list[Cell]:
        """Return the cells that are not finished."""
        return [cell for _, cell in self._unfinished(list(enumerate(self.plan.cells)))]

    def run(self) -> list[CellRow]:
        """Run what is missing and return all results.

        Several processes may do so at the same time: each takes the cells of one setting, order and seed, because
        these share trainings.

        Raises:
            InputError: rows that do not fit the model, a training whose numbers go wrong; finished cells stay.
        """
        todo = list(enumerate(self.missing()))
        together = [(key, list(group)) for key, group in groupby(todo, lambda each: _sharing(each[1]))]
        for wait in (False, True):  # in the end, wait for what others have begun: they may stop before its end
            for key, group in together:
                self._share(self.bench.cache / f"{key}.lock", group, wait)
        return self.rows()

    def _share(self, lock: Path, group: Sequence[tuple[int, Cell]], wait: bool) -> None:
        """Run the unfinished cells of a group; if another process is at them now, wait for it or leave them to it."""
        while self._unfinished(group):
            try:
                with FileLock(lock, timeout=POLL if wait else 0, fallback_to_soft=False):
                    while todo := self._unfinished(group):  # asked again: a cell may stand there under two names
                        number, cell = todo[0]
                        self.results.add(dict(RunningCell(self.bench, number, cell, self.watch).run()))
            except Timeout:
                if not wait:
                    return

    def _unfinished(self, cells: Sequence[tuple[int, Cell]]) -> list[tuple[int, Cell]]:
        """Return those of some numbered cells that nobody has finished."""
        done = {row.get("hash") for row in self.results.read()}
        return [(number, cell) for number, cell in cells if self.key(cell) not in done]

    def key(self, cell: Cell) -> str:
        """Return the hash of all that determines a cell's result."""
        return of_cell(self.bench.always, self.plan, cell)


def _sharing(cell: Cell) -> str:
    """Return what is the same for cells that may share a training."""
    return digest(settings_of_cell(cell), list(cell.tasks), cell.seed)
