"""The record of a stream's tasks: what a commit writes of it, and how any part of it is read at a bounded cost.

`history.jsonl` of a generation has one line a task. Once it would have twice SPAN lines, its first SPAN lines move to a
file of their own, `STREAM/history/000001-000128.jsonl`, which never changes again; the manifest has its hash, and the
generation keeps a table with every task's scores (task_scores.py). So a commit, and reading what is recent, cost the
same after ten tasks and after ten thousand. A stream of fewer tasks has everything in its generations.
"""

from collections.abc import Iterable, Sequence
from itertools import islice
from pathlib import Path

from mbf_mlx.errors import InputError
from mbf_mlx.files.storage import Files, read_file, require_space, sha256
from mbf_mlx.stream.generations import Generation, Generations, HistoryFiles
from mbf_mlx.stream.records import CHANGED, HISTORY, TASK_SCORES, FileRecord, TaskRecord, parse
from mbf_mlx.stream.task_scores import TaskScores

SPAN = 128  # tasks in one file of the earlier history
FOLDER = "history"


class HistoryReader:
    """Reads the record of a stream's tasks as one of its generations has it, and extends it by one task."""

    def __init__(self, generations: Generations) -> None:
        self._generations = generations
        self._parsed: dict[bytes, TaskRecord] = {}  # the newest lines as they were read last

    def newest(self, generation: Generation) -> list[TaskRecord]:
        """Return the records inside a generation: those of all tasks, or of the newest SPAN at least.

        Raises:
            InputError: a line is damaged.
        """
        where, lines = generation.folder / HISTORY, self._newest_lines(generation)
        self._parsed = {line: self._parsed.get(line) or parse(TaskRecord, line, where) for line in lines}
        return [self._parsed[line] for line in lines]

    def all(self, generation: Generation) -> list[TaskRecord]:
        """Return the records of all tasks.

        Raises:
            InputError: a file is damaged.
        """
        spans = [(1, number * SPAN) for number in [len(generation.manifest.earlier)] if number]
        return self.tasks(generation, spans) + self.newest(generation)

    def tasks(self, generation: Generation, spans: Sequence[tuple[int, int]]) -> list[TaskRecord]:
        """Return the records of the tasks in `spans`, each of them the first and the last task, counted from 1.

        Raises:
            InputError: a file is damaged.
        """
        moved, found = len(generation.manifest.earlier) * SPAN, []
        for first, last in spans:
            for number in range((first - 1) // SPAN, -(-min(last, moved) // SPAN)):
                where, lines = self._earlier_lines(generation, number)
                wanted = islice(lines, max(0, first - 1 - number * SPAN), last - number * SPAN)
                found += [parse(TaskRecord, line, where) for line in wanted]
            if last > moved:
                found += self.newest(generation)[max(0, first - 1 - moved) : last - moved]
        return found

    def scores(self, generation: Generation) -> TaskScores:
        """Return the table of all tasks' scores.

        Raises:
            InputError: a file is damaged.
        """
        if TASK_SCORES in generation.manifest.files:
            data = self._generations.content(generation, TASK_SCORES)
            return TaskScores.from_bytes(data, generation.manifest.t, generation.folder / TASK_SCORES)
        return _table(self.newest(generation))

    def extended(self, started: Generation, record: TaskRecord, files: Files) -> HistoryFiles:
        """Return the record with one more task. Needs the stream's lock.

        Args:
            started: The generation that the task was learned on.
            record: The task.
            files: The file operations to write with.

        Raises:
            InputError: a file is damaged, or the lines of earlier tasks cannot be written.
        """
        earlier, lines = list(started.manifest.earlier), self._newest_lines(started)
        record = record.bounded()
        if record.scored is None:
            return HistoryFiles(b"".join([*lines, record.to_json()]))  # a short stream needs no table
        table = self.scores(started)
        table.add(record)
        lines.append(record.model_copy(update={"average": table.averages().accuracy}).to_json())
        while len(lines) >= 2 * SPAN:
            earlier.append(self._move(len(earlier), b"".join(lines[:SPAN]), files))
            del lines[:SPAN]
        return HistoryFiles(b"".join(lines), tuple(earlier), table.to_bytes() if earlier else None)

    def verify(self, generation: Generation) -> None:
        """Check every byte of the earlier history.

        Raises:
            InputError: a file does not hold what was committed.
        """
        for number in range(len(generation.manifest.earlier)):
            self._earlier_lines(generation, number)

    def _newest_lines(self, generation: Generation) -> list[bytes]:
        return bytes(self._generations.content(generation, HISTORY)).splitlines(keepends=True)

    def _earlier_lines(self, generation: Generation, number: int) -> tuple[Path, list[bytes]]:
        """Return a file of the earlier history and its lines."""
        path, record = self._path(number), generation.manifest.earlier[number]
        try:
            data = read_file(path)
        except FileNotFoundError:
            raise _damage(path, "missing") from None
        if sha256(data) != record.sha256:
            raise _damage(path, CHANGED)
        return path, data.splitlines(keepends=True)

    def _move(self, number: int, lines: bytes, files: Files) -> FileRecord:
        """Write a file of the earlier history. It is there already after an undo or a crash."""
        path, record = self._path(number), FileRecord(bytes=len(lines), sha256=sha256(lines))
        if not (path.is_file() and sha256(read_file(path)) == record.sha256):
            require_space(self._generations.path, len(lines), "a commit")
            files.make_folder(path.parent)
            files.replace(path, lines)
        return record

    def _path(self, number: int) -> Path:
        return self._generations.path / FOLDER / f"{number * SPAN + 1:06d}-{(number + 1) * SPAN:06d}.jsonl"


def _table(records: Iterable[TaskRecord]) -> TaskScores:
    table = TaskScores()
    for record in records:
        table.add(record)
    return table


def _damage(path: Path, what: str) -> InputError:
    return InputError(
        f"{path}: damaged: {what}\nhint: it holds the record of earlier tasks; the stream learns and answers without"
        " it; a copy of the file that you made earlier restores it"
    )
