"""`mbf plan`: the memory, time and disk that learning would take; trains nothing."""

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from mbf_mlx import units
from mbf_mlx.commands import console
from mbf_mlx.commands.options import Config, Json, bytes_of, lora_of
from mbf_mlx.config import DataConfig, LoRAConfig, TrainConfig
from mbf_mlx.errors import InputError
from mbf_mlx.memory.shapes import SHARE, run_of, shape_of_folder, shape_of_recipe

if TYPE_CHECKING:
    from mbf_mlx.data.task import Task
    from mbf_mlx.data.token_rows import EncodedRows
    from mbf_mlx.memory.formula import Load, Memory, Run, Shape
    from mbf_mlx.methods import Method

_TRAIN, _DATA = TrainConfig(), DataConfig()
_DEVICES = ("cpu", "metal", "cuda")


def plan(
    places: Annotated[
        list[Path] | None,
        typer.Argument(metavar="[STREAM [TASK...]]", help="The stream, there or not yet, and what it would learn."),
    ] = None,
    model: Annotated[
        str | None, typer.Option("--model", help="Base model; several, by comma, where no stream is named.")
    ] = None,
    memory: Annotated[
        str | None, typer.Option("--memory", help="A machine's memory, as 16GB; several by comma; else this machine's.")
    ] = None,
    device: Annotated[str | None, typer.Option("--device", help="cpu, metal or cuda; else this machine's.")] = None,
    epochs: Annotated[int, typer.Option(help="Passes over the rows.")] = _TRAIN.epochs,
    iters: Annotated[int | None, typer.Option(help="Optimizer steps, in place of epochs.")] = None,
    batch_size: Annotated[int, typer.Option(help="Rows of a pass.")] = _TRAIN.batch_size,
    grad_accumulation_steps: Annotated[
        int, typer.Option(help="Passes of an optimizer step.")
    ] = _TRAIN.grad_accumulation_steps,
    grad_checkpoint: Annotated[
        bool, typer.Option("--grad-checkpoint", help="Less memory, more time.")
    ] = _TRAIN.grad_checkpoint,
    keep_quantized: Annotated[
        bool, typer.Option("--keep-quantized", help="On a CPU: keep quantized weights; less memory, much slower.")
    ] = False,
    max_seq_length: Annotated[int, typer.Option(help="Tokens of a row at most.")] = _DATA.max_seq_length,
    answer_tokens: Annotated[
        int | None, typer.Option(help="Without tasks: supervised tokens of a row, else all of it.")
    ] = None,
    mask_prompt: Annotated[
        bool, typer.Option("--mask-prompt/--no-mask-prompt", help="Supervise answers alone.")
    ] = _DATA.mask_prompt,
    rank: Annotated[int | None, typer.Option(help="A new stream's rank.")] = None,
    keys: Annotated[str | None, typer.Option(help="A new stream's layers, by comma.")] = None,
    num_layers: Annotated[int | None, typer.Option(help="A new stream's blocks from the last.")] = None,
    time: Annotated[bool, typer.Option("--time/--no-time", help="Try a few steps to estimate the time.")] = True,
    config: Config = None,
    json: Json = False,
) -> None:
    """Say how much memory, time and disk learning would take: fits, tight or no. Trains nothing, fetches nothing.

    Example: mbf plan assistant mail.jsonl --model smollm2-135m-instruct
    """
    lora = lora_of(rank=rank, keys=keys, num_layers=num_layers)
    train = TrainConfig(
        epochs=epochs,
        iters=iters,
        batch_size=batch_size,
        grad_accumulation_steps=grad_accumulation_steps,
        grad_checkpoint=grad_checkpoint,
    )
    data = DataConfig(max_seq_length=max_seq_length, mask_prompt=mask_prompt)
    if device not in (None, *_DEVICES):
        raise InputError(f"--device: expected one of {', '.join(_DEVICES)}, got {device!r}")
    sizes: list[int | None] = [bytes_of(each, "--memory") for each in memory.split(",")] if memory else [None]
    plans = _Plans(lora, train, data, keep_quantized, device, answer_tokens, time)
    if not places:
        if not model:
            raise InputError("expected a stream and tasks, or --model\nhint: mbf plan --help has an example")
        found = [plans.of_model(name.strip(), size) for name in model.split(",") for size in sizes]
        document: dict[str, Any] = {"plans": found}
    else:
        document = plans.of_tasks(places[0], places[1:], model, sizes[0])
    if json:
        console.print_json(document)
    elif not places:
        _print_table(document["plans"])
    else:
        _print(document)


class _Plans:
    """What is planned for, however many models."""

    def __init__(
        self,
        given: dict[str, Any],
        train: TrainConfig,
        data: DataConfig,
        keep_quantized: bool,
        device: str | None,
        answer_tokens: int | None,
        time: bool,
    ):
        self.given, self.train, self.data = given, train, data
        self.lora: LoRAConfig | None = None  # of a stream that is there
        self.keep_quantized, self.device, self.answer_tokens, self.time = keep_quantized, device, answer_tokens, time

    def of_model(self, name: str, size: int | None) -> dict[str, Any]:
        """Return the plan of the largest batch that the settings allow."""
        from mbf_mlx.memory.formula import Load
        from mbf_mlx.methods import make
        from mbf_mlx.methods.registry import DEFAULT_METHOD

        folder, shape = _find(name)
        load = Load.full(self.train.batch_size, self.data.max_seq_length, self.answer_tokens)
        return self._memory(name, folder, shape, [load], size, make(DEFAULT_METHOD))[0]

    def of_tasks(self, stream: Path, tasks: list[Path], model: str | None, size: int | None) -> dict[str, Any]:
        """Return the plan of learning tasks into a stream."""
        from mbf_mlx.data.task import read_tasks
        from mbf_mlx.methods import make
        from mbf_mlx.methods.registry import DEFAULT_METHOD
        from mbf_mlx.planning import work as plan

        earlier, method = [], make(DEFAULT_METHOD)
        if (stream / "stream.json").exists():
            from mbf_mlx.stream.folder import StreamFolder

            opened = StreamFolder.open(stream)
            own, earlier = opened.identity, opened.history()
            method = make(own.method, own.method_options)
            self.lora = LoRAConfig(rank=own.rank, scale=own.scale, keys=tuple(own.keys), num_layers=own.num_layers)
            self.data = replace(self.data, template=own.template)
            model = model or opened.current().manifest.base_path
        if model is None:
            raise InputError(f"{stream}: no such stream: --model says on which base it would be made")
        read = read_tasks(tasks)
        folder, shape = _find(model)
        if not read or folder is None:
            document = self.of_model(model, size)
            document["note"] = "no tasks were named" if folder else "the model is not fetched: rows were not counted"
            return document
        encoded = [self._encoded(task, folder) for task in read]
        works = [
            plan.work_of(train, valid, test, self.train, scored=len(read) - place, method=method)
            for place, (train, valid, test) in enumerate(encoded)
        ]
        loads = list(dict.fromkeys(load for work in works for load in work.loads))
        document, run = self._memory(model, folder, shape, loads, size, method)
        tests = sum(len(task.test) for task in read) + sum(record.test_rows for record in earlier)
        document["tasks"] = [
            {"name": task.name, "rows": len(rows), "longest": int(max(rows.lengths)), "steps": work.steps}
            for task, (rows, _, _), work in zip(read, encoded, works, strict=True)
        ]
        document["scored_rows"] = tests
        document["disk_bytes"] = plan.disk_bytes(_all_layers(shape, run), run.rank)
        document["disk_free_bytes"] = _free(stream)
        if self.time and document["device"] == _here() and document["verdict"] != plan.NO:
            from mbf_mlx.base.sources import read_config

            lora = self._lora(model, folder)
            rate = plan.measure(read_config(folder), lora, run, works[0].typical)
            document["seconds"] = sum(rate.seconds(work) for work in works)
            document["seconds_a_step"] = rate.step * works[0].train_tokens / works[0].steps
        return document

    def _lora(self, name: str, folder: Path | None) -> LoRAConfig:
        """Return the settings of the stream, or those that a new one on this base would have."""
        from mbf_mlx.base.recipe import lora_config
        from mbf_mlx.base.sources import tried

        return self.lora or lora_config(tried(folder or name), self.given)

    def _encoded(self, task: "Task", folder: Path) -> "tuple[EncodedRows, EncodedRows, EncodedRows]":
        from mbf_mlx.data.encode import Encoder
        from mbf_mlx.device import backend

        backend.setup()
        from mbf_mlx.base.load import load_tokenizer

        encoder = Encoder(load_tokenizer(folder), self.data)
        train, valid, test = (encoder.all(part, task.path) for part in (task.train, task.valid, task.test))
        return train, valid, test

    def _memory(
        self,
        name: str,
        folder: Path | None,
        shape: "Shape",
        loads: "list[Load]",
        size: int | None,
        method: "Method",
    ) -> "tuple[dict[str, Any], Run]":
        from mbf_mlx.device import machine
        from mbf_mlx.memory import formula as memory
        from mbf_mlx.planning import work as plan

        kind = self.device or ("metal" if size and folder is None and not _has_mlx() else _here())
        if size is not None:
            available = plan.usable(size, kind)
        elif kind == "cpu":
            available = machine.available_memory()
        else:
            from mbf_mlx.device import backend

            available = backend.setup().memory_bytes
        by_hand = kind == "cpu" and _is_llama(folder)
        packed = kind != "cpu" or self.keep_quantized or shape.plain_bytes > available / 2
        run = run_of(
            shape, self._lora(name, folder), by_hand=by_hand, packed=packed, checkpoint=self.train.grad_checkpoint
        )
        run = replace(run, measured=plan.measured_values(method, _all_layers(shape, run), run.rank))
        worst, load = max(((memory.predict(shape, run, each), each) for each in loads), key=lambda pair: pair[0].peak)
        says = plan.verdict(worst.peak, available)
        limit = int(SHARE * available)
        document = {
            "model": name,
            "device": kind,
            "memory_bytes": size or available,
            "available_bytes": available,
            "peak_bytes": worst.peak,
            "parts": _parts(worst),
            "weights_packed": packed,
            "batch": {"rows": load.rows, "tokens": load.tokens, "supervised": load.supervised},
            "verdict": says,
            "would_fit": memory.ways_to_fit(shape, run, load, limit) if says != plan.FITS else [],
        }
        return document, run


def _parts(found: "Memory") -> dict[str, int]:
    return {name: getattr(found, name) for name in ("process", "weights", "factors", "inputs", "activations", "logits")}


def _find(name: str) -> "tuple[Path | None, Shape]":
    """Return a model's folder, or None where it is a recipe's that was not fetched, and its shape."""
    from mbf_mlx.base.recipe import models_folder, recipes
    from mbf_mlx.base.sources import resolve_base

    known = recipes()
    if name in known and not (models_folder() / name).exists():
        return None, shape_of_recipe(known[name])
    folder = resolve_base(name, offline=True, report=console.err.print).path
    return folder, shape_of_folder(folder)


def _is_llama(folder: Path | None) -> bool:
    from mbf_mlx.base.sources import read_config

    return folder is None or read_config(folder)["model_type"] == "llama"


def _has_mlx() -> bool:
    from mbf_mlx.device import backend

    return backend.has_module("mlx.core")


def _here() -> str:
    """Return the kind of device that this machine would train on."""
    from mbf_mlx.device import backend

    return backend.setup().kind if _has_mlx() else "cpu"


def _all_layers(shape: "Shape", run: "Run") -> dict[str, tuple[int, int]]:
    return {f"{i}.{key}": shape.layers[key] for i in range(run.num_layers) for key in run.keys if key in shape.layers}


def _free(stream: Path) -> int:
    import shutil

    return shutil.disk_usage(next(folder for folder in (stream, *stream.absolute().parents) if folder.exists())).free


def _print_table(plans: list[dict[str, Any]]) -> None:
    from rich.table import Table

    sizes = list(dict.fromkeys(each["memory_bytes"] for each in plans))
    table = Table()
    table.add_column("model")
    table.add_column("needs", justify="right")
    for size in sizes:
        table.add_column(units.size(size), justify="right")
    for name in dict.fromkeys(each["model"] for each in plans):
        row = {each["memory_bytes"]: each for each in plans if each["model"] == name}
        needed = units.size(max(each["peak_bytes"] for each in row.values()))
        table.add_row(name, needed, *(row[size]["verdict"] for size in sizes))
    console.out.print(table)
    first = plans[0]
    batch = first["batch"]
    console.out.print(
        f"batches of {batch['rows']} rows and {batch['tokens']} tokens, {batch['supervised']} supervised, on"
        f" {first['device']}; fits: in 80 % of what the device may take, tight: in all of it"
    )
    for each in plans:
        if each["would_fit"]:
            ways = "; or ".join(each["would_fit"])
            console.out.print(f"{each['model']} on {units.size(each['memory_bytes'])} would fit with {ways}")


def _print(document: dict[str, Any]) -> None:
    size = units.size
    for task in document.get("tasks", ()):
        console.out.print(
            f"{task['name']}: {task['rows']} rows to train on, the longest of {task['longest']} tokens;"
            f" {task['steps']} steps"
        )
    if "note" in document:
        console.out.print(f"planned for the longest batch that the settings allow: {document['note']}")
    parts = ", ".join(f"{name} {size(count)}" for name, count in document["parts"].items())
    batch = document["batch"]
    console.out.print(f"memory: {size(document['peak_bytes'])} at the peak: {parts}")
    console.out.print(f"        in its largest batch: {batch['rows']} rows, {batch['tokens']} tokens,"
                      f" {batch['supervised']} supervised")  # fmt: skip
    if "seconds" in document:
        console.out.print(
            f"time:   {units.duration(document['seconds'])} ({document['seconds_a_step']:.2f} s a step), by a short"
            f" trial now; scoring {document['scored_rows']} rows included, generated answers not"
        )
    if "disk_bytes" in document:
        console.out.print(f"disk:   {size(document['disk_bytes'])}; {size(document['disk_free_bytes'])} are free")
    console.out.print(f"{document['verdict']}: {size(document['available_bytes'])} are available on this device")
    for way in document["would_fit"]:
        console.out.print(f"would fit with {way}")
