"""`mbf check`: what training would see of a task, and every line that does not fit."""

from array import array
from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from mbf_mlx.commands.console import err, out, print_json, progress, warn
from mbf_mlx.commands.flags import Given, takes
from mbf_mlx.commands.options import Base, Config, Json, Quantize
from mbf_mlx.config import DataConfig

if TYPE_CHECKING:
    from mbf_mlx.data.encode import Encoded, Encoder
    from mbf_mlx.data.row import BadRow, Row
    from mbf_mlx.data.task import Task

_MARKS = ("⟦", "⟧")  # around the text that is trained on, for people who see no colours
_SHOWN_LABELS = 20
_MANY_ROWS, _LARGE_FILE = 2000, 50_000_000  # from so many rows or bytes on there is a progress bar
_SHOWN_TEXT = 600  # most characters of one piece of the example


@takes("max_seq_length", "mask_prompt", "template")
def check(
    tasks: Annotated[list[Path], typer.Argument(metavar="TASK...", help="Task files, or folders with train.*.")],
    *,
    model: Base = None,
    quantize: Quantize = 0,
    stream: Annotated[
        Path | None,
        typer.Option("--stream", metavar="STREAM", help="Check for this stream, with its model and its template."),
    ] = None,
    given: Given,
    config: Config = None,
    json: Json = False,
) -> None:
    """Show what training would see of tasks, and every line that does not fit.

    Without --model or --stream, lengths are counted in characters and no template is applied.

    Example: mbf check mail.jsonl notes/ --model smollm2-135m-instruct
    """
    from mbf_mlx.base.renderer import TemplateLimitError
    from mbf_mlx.data.task import read_tasks
    from mbf_mlx.errors import InputError

    if model is not None and stream is not None:
        raise InputError("--model and --stream: expected one of them (a stream has its own model)")
    data = given.make(DataConfig)
    # Files are read first, so that their problems are reported before a model is looked for.
    with progress("reading", unit="MB") if _is_large(tasks) else nullcontext(_silent) as update:
        found = read_tasks(tasks, report=lambda file, offset: update(offset // 1_000_000, file=file.name))
    encoder = _encoder(model, quantize, stream, data)
    surveys, problems = [], []
    for task in found:
        try:
            surveys.append(_survey(task, encoder))
        except InputError as error:
            problems.append(str(error))
            if isinstance(error, TemplateLimitError):
                break  # each other task would take as long
    if problems:
        raise InputError("\n".join(problems))
    if json:
        print_json({"tasks": surveys})
        return
    for survey in surveys:
        _print(survey)


def _is_large(tasks: list[Path]) -> bool:
    try:
        files = [file for task in tasks for file in (task.iterdir() if task.is_dir() else [task])]
        return sum(file.stat().st_size for file in files if file.is_file()) > _LARGE_FILE
    except OSError:  # reading the file will report it
        return False


def _encoder(model: str | None, quantize: int, stream: Path | None, data: DataConfig) -> "Encoder | None":
    """Return the encoder of a model, or of a stream with its template; None if neither is given."""
    if model is None and stream is None:
        return None
    from dataclasses import replace

    from mbf_mlx.base.sources import recorded_base, resolve_base
    from mbf_mlx.data.encode import Encoder
    from mbf_mlx.device import backend, lighter_imports

    if stream is not None:
        from mbf_mlx.learning.new_stream import own_base
        from mbf_mlx.stream.folder import StreamFolder

        opened = StreamFolder.open(stream)
        data = replace(data, template=opened.identity.template, date=opened.date())
        backend.require_mlx()
        folder = own_base(opened, recorded_base(opened.current().manifest.base_path, stream)).path
    else:
        backend.require_mlx()
        folder = resolve_base(str(model), quantize=quantize, report=err.print).path
    lighter_imports.import_mlx_lm()
    from mbf_mlx.base.load import load_tokenizer

    return Encoder(load_tokenizer(folder), data)


def _survey(task: "Task", encoder: "Encoder | None") -> dict[str, Any]:
    """Return everything that is printed about a task, as the JSON document has it."""
    seen = _Seen(task, encoder)
    total = len(task.train) + len(task.valid) + len(task.test)
    with progress(f"checking {task.name}", total, "rows") if total > _MANY_ROWS else nullcontext(_silent) as update:
        done = 0
        for split, rows in (("train", task.train), ("valid", task.valid), ("test", task.test)):
            for row, encoded in encoder.stream(rows) if encoder else ((row, None) for row in rows):
                seen.note(split, row, encoded)
                done += 1
                if done % 1000 == 0 or done == total:
                    update(done)
    seen.problems.raise_any(task.path)
    return {
        "name": task.name,
        "path": str(task.path),
        "format": task.format,
        "sha256": task.sha256,
        "rows": {"train": len(task.train), "valid": len(task.valid), "test": len(task.test)},
        "held_out": task.held_out,
        "unit": "tokens" if encoder else "characters",
        "lengths": {split: _statistics(counts) for split, counts in seen.lengths.items()},
        "cut_rows": seen.cut,
        "max_seq_length": encoder.data.max_seq_length if encoder else None,
        "labels": task.labels if isinstance(task.labels, str) else list(task.labels),
        "warnings": [*task.warnings, *seen.warnings()],
        "example": seen.example,
    }


class _Seen:
    """Collects what `mbf check` says of a task's rows."""

    def __init__(self, task: "Task", encoder: "Encoder | None"):
        from mbf_mlx.data.problems import Problems

        self.task, self.encoder, self.problems = task, encoder, Problems()
        self.lengths: dict[str, array[int]] = {}
        self.cut = 0  # rows
        self.example: dict[str, Any] | None = None
        self.special: tuple[str, int] = ("", 0)  # the text of a special token, and rows with one

    def note(self, split: str, row: "Row", encoded: "Encoded | BadRow | None") -> None:
        """Count a row; `encoded` is None if there is no model."""
        if isinstance(encoded, Exception):
            self.problems.add_row(row.file, row.line, str(encoded))
            return
        length = row.letters if encoded is None else len(encoded.tokens) + encoded.cut
        self.lengths.setdefault(split, array("I")).append(length)
        self.cut += encoded is not None and encoded.cut > 0
        if self.encoder and (mark := self.encoder.special_in(row)):
            self.special = (self.special[0] or mark, self.special[1] + 1)
        if self.example is None:
            pieces = self.encoder.marked(encoded) if self.encoder and encoded else _pieces(row)
            shown = [{"text": text, "supervised": supervised} for text, supervised in pieces]
            self.example = {"place": row.where, "pieces": shown}

    def warnings(self) -> list[str]:
        """Return warnings about the rows and the model's template."""
        mark, count = self.special
        rows = f"{self.task.path}: {count} {'row holds' if count == 1 else 'rows hold'}"
        odd = f"{rows} text that this model reads as special tokens, such as {mark}"
        if self.encoder and self.encoder.fills_template(self.task):
            odd += "; its template adds its own"
        return ([odd] if count else []) + (self.encoder.warnings(self.task) if self.encoder else [])


def _silent(done: int, **values: Any) -> None:
    """Show no progress: the work is short."""


def _pieces(row: "Row") -> list[tuple[str, bool]]:
    """Return a row's text without a template, in pieces: (text, whether it is trained on)."""
    if row.kind == "text":
        return [(row.text, True)]
    if row.kind == "completion":
        system = [(f"system: {row.system}\n", False)] if row.system else []
        return [*system, (row.prompt, False), (row.completion, True)]
    from mbf_mlx.data.row import is_learned

    pieces = []
    for message in row.messages:
        pieces += [(f"{message['role']}: ", False), (message["content"], is_learned(message)), ("\n", False)]
    return pieces


def _statistics(counts: "array[int]") -> dict[str, int]:
    import numpy as np

    lengths = np.frombuffer(counts, np.uint32)
    middle, high = np.percentile(lengths, (50, 95), method="higher")
    return {"median": int(middle), "p95": int(high), "max": int(lengths.max()), "sum": int(lengths.sum(dtype=np.int64))}


def _print(survey: dict[str, Any]) -> None:
    """Print what a survey says, for a person."""
    out.print(f"{survey['name']}: {survey['format']} rows, {survey['path']}", style="bold")
    for split, count in survey["rows"].items():
        lengths = survey["lengths"].get(split)
        if lengths:
            words = ", ".join(f"{name} {lengths[key]}" for key, name in _STATISTICS.items())
            held = "  (held out of training: there are no test rows)" if split == "test" and survey["held_out"] else ""
            out.print(f"  {split:5} {count:7} rows  {survey['unit']}: {words}{held}")
    labels = survey["labels"]
    if isinstance(labels, str):
        out.print("  answers: more than 64 different ones")
    elif labels:
        more = f", … ({len(labels)} in all)" if len(labels) > _SHOWN_LABELS else ""
        out.print(f"  answers: {', '.join(_short(label) for label in labels[:_SHOWN_LABELS])}{more}")
    if survey["cut_rows"]:
        out.print(f"  cut: {survey['cut_rows']} rows are longer than --max-seq-length {survey['max_seq_length']}")
    for warning in survey["warnings"]:
        warn(warning)
    out.print(f"  the first row, {survey['example']['place']}; the text in {' '.join(_MARKS)} is trained on:")
    for piece in survey["example"]["pieces"]:
        text = _short(piece["text"], _SHOWN_TEXT)
        if piece["supervised"]:
            out.print(f"{_MARKS[0]}{text}{_MARKS[1]}", style="bold green", end="")
        else:
            out.print(text, end="")
    out.print("\n")


_STATISTICS = {"median": "median", "p95": "95%", "max": "longest"}


def _short(text: str, limit: int = 60) -> str:
    """Return a text without the middle that makes it too long."""
    return text if len(text) <= limit else f"{text[: limit // 2]} … {text[-limit // 2 :]}"
