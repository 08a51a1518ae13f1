"""Forecasts what learning would take on a machine: its peak of memory, its time, its space on disk. Trains nothing.

Memory comes from the formula in memory/formula.py, time from a short trial (work.py and timing.py). A forecast is a
document of plain values, as `mbf plan --json` prints it; sizes are in bytes and times in seconds.
"""

import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mbf_mlx.config import DataConfig, LoRAConfig, TrainConfig
from mbf_mlx.errors import InputError
from mbf_mlx.memory.shapes import SHARE, run_of, shape_of_folder, shape_of_recipe

if TYPE_CHECKING:
    from mbf_mlx.data.task import Task
    from mbf_mlx.data.token_rows import EncodedRows
    from mbf_mlx.memory.formula import Load, Memory, Run, Shape
    from mbf_mlx.methods import Method

Document = dict[str, Any]
DEVICES = ("cpu", "metal", "cuda")
FITS, TIGHT, NO = "fits", "tight", "no"
PARTS = ("process", "weights", "factors", "inputs", "activations", "logits")
# How much of a Mac's memory Metal recommends to take, as Apple's tools print it for these machines; not measured by us.
MAC_SHARE, LARGE_MAC, LARGE_MAC_SHARE = 2 / 3, 36_000_000_000, 3 / 4


def usable(memory: int, device: str) -> int:
    """Return how many bytes of a machine's memory its device ("cpu", "metal" or "cuda") may take."""
    if device != "metal":
        return memory
    return int(memory * (LARGE_MAC_SHARE if memory >= LARGE_MAC else MAC_SHARE))


def verdict(peak: int, available: int) -> str:
    """Return whether a peak fits into what is available: "fits", "tight" or "no"."""
    return FITS if peak <= SHARE * available else TIGHT if peak <= available else NO


@dataclass(frozen=True, kw_only=True)
class Forecaster:
    """Makes forecasts with one set of settings, for any number of models.

    Args:
        lora: A stream's own LoRA settings; or those that a new stream is given, the others being its base's.
        train, data: How tasks would be trained.
        keep_quantized: Whether a CPU keeps quantized weights packed.
        device: One of DEVICES; None is the device of this machine.
        answer_tokens: Where no rows are read, the supervised tokens of a row; None is all of them.
        time: Whether a few steps are tried to estimate the time.
        report: Called with one line before anything that takes long.

    Raises:
        InputError: a device that is none of DEVICES.
    """

    lora: LoRAConfig | Mapping[str, Any]
    train: TrainConfig
    data: DataConfig
    keep_quantized: bool = False
    device: str | None = None
    answer_tokens: int | None = None
    time: bool = True
    report: Callable[[str], None] = lambda line: None

    def __post_init__(self) -> None:
        if self.device not in (None, *DEVICES):
            raise InputError(f"--device: expected one of {', '.join(DEVICES)}, got {self.device!r}")

    def for_model(self, model: str, memory: int | None = None) -> Document:
        """Return the forecast for a model, with the largest batch that the settings allow.

        Args:
            model: Its recipe's name, folder or hub id. It is not fetched.
            memory: Bytes of the machine; None is this machine.

        Raises:
            InputError: no such model on this machine, or an architecture that the formula does not know.
        """
        from mbf_mlx.memory.formula import Load
        from mbf_mlx.methods import make
        from mbf_mlx.methods.registry import DEFAULT_METHOD

        folder, shape = find_shape(model, self.report)
        load = Load.full(self.train.batch_size, self.data.max_seq_length, self.answer_tokens)
        return self._memory(model, folder, shape, [load], memory, make(DEFAULT_METHOD))[0]

    def for_tasks(self, stream: Path, tasks: Sequence[Path], model: str | None, memory: int | None = None) -> Document:
        """Return the forecast for learning tasks into a stream, from the tasks' own rows.

        Args:
            stream: Its folder, which need not be there yet.
            tasks: Task files or folders. With none, or where the model is not fetched, this is `for_model` and a note.
            model: The base of a stream that is not there yet.
            memory: Bytes of the machine; None is this machine.

        Raises:
            InputError: no stream and no model, a task or model that does not fit.
        """
        from mbf_mlx.methods import make
        from mbf_mlx.methods.registry import DEFAULT_METHOD

        if not (stream / "stream.json").exists():
            if model is None:
                raise InputError(f"{stream}: no such stream: --model says on which base it would be made")
            return self._for_tasks(stream, tasks, model, memory, make(DEFAULT_METHOD), 0)
        from mbf_mlx.base.sources import recorded_base
        from mbf_mlx.stream.folder import StreamFolder
        from mbf_mlx.stream.records import spans_to_score

        opened = StreamFolder.open(stream)
        own = opened.identity
        lora = LoRAConfig(rank=own.rank, scale=own.scale, keys=tuple(own.keys), num_layers=own.num_layers)
        settled = replace(self, lora=lora, data=replace(self.data, template=own.template))
        return settled._for_tasks(
            stream,
            tasks,
            model or str(recorded_base(opened.current().manifest.base_path, stream).path),
            memory,
            make(own.method, own.method_options),
            sum(record.test_rows for record in opened.tasks(spans_to_score(opened.current().manifest.t))),
        )

    def _for_tasks(
        self,
        stream: Path,
        tasks: Sequence[Path],
        model: str,
        memory: int | None,
        method: "Method",
        earlier_rows: int,
    ) -> Document:
        """Return the forecast for tasks, all settings being those of the stream; `earlier_rows` are scored, too."""
        from mbf_mlx.data.task import read_tasks
        from mbf_mlx.planning import work

        read = read_tasks(tasks)
        folder, shape = find_shape(model, self.report)
        if not read or folder is None:
            note = "no tasks were named" if folder else "the model is not fetched: rows were not counted"
            return {**self.for_model(model, memory), "note": note}
        encoded = [self._encoded(task, folder) for task in read]
        by_hand = _by_hand(self.device or this_device(), folder)
        works = [
            work.work_of(train, valid, test, self.train, scored=len(read) - place, method=method, by_hand=by_hand)
            for place, (train, valid, test) in enumerate(encoded)
        ]
        loads = list(dict.fromkeys(load for each in works for load in each.loads))
        document, run = self._memory(model, folder, shape, loads, memory, method)
        document["tasks"] = [
            {"name": task.name, "rows": len(rows), "longest": int(max(rows.lengths)), "steps": each.steps}
            for task, (rows, _, _), each in zip(read, encoded, works, strict=True)
        ]
        document["scored_rows"] = earlier_rows + sum(len(task.test) for task in read)
        document["disk_bytes"] = work.disk_bytes(all_layers(shape, run), run.rank)
        document["disk_free_bytes"] = free_bytes(stream)
        if self.time and document["device"] == this_device() and document["verdict"] != NO:
            from mbf_mlx.base.sources import read_config

            rate = work.measured_rate(read_config(folder), self._lora_for(model, folder), run, works[0].typical)
            document["seconds"] = sum(rate.seconds(each) for each in works)
            document["seconds_a_step"] = rate.step * works[0].train_tokens / works[0].steps
        return document

    def _lora_for(self, model: str, folder: Path | None) -> LoRAConfig:
        """Return the settings of the stream, or those that a new one on this base would have."""
        from mbf_mlx.base.recipe import lora_config
        from mbf_mlx.base.sources import tried

        return self.lora if isinstance(self.lora, LoRAConfig) else lora_config(tried(folder or model), self.lora)

    def _in_bfloat16(self, device: str) -> bool:
        """Return whether a Llama's unpacked weights would be multiplied in bfloat16; only this machine is tried."""
        from mbf_mlx.device import bfloat16

        if self.train.precision == "auto":
            return device == this_device() and bfloat16.is_faster()
        return self.train.precision == "bfloat16"

    def _encoded(self, task: "Task", folder: Path) -> "tuple[EncodedRows, EncodedRows, EncodedRows]":
        """Return the rows to train on, to validate with and to test, as tokens."""
        from mbf_mlx.data.encode import Encoder
        from mbf_mlx.device import backend

        backend.setup()
        from mbf_mlx.base.load import load_tokenizer

        encoder = Encoder(load_tokenizer(folder), self.data)
        train, valid, test = (encoder.all(part, task.path) for part in (task.train, task.valid, task.test))
        return train, valid, test

    def _memory(
        self,
        model: str,
        folder: Path | None,
        shape: "Shape",
        loads: "list[Load]",
        memory: int | None,
        method: "Method",
    ) -> "tuple[Document, Run]":
        """Return the forecast of memory alone, for the batch of `loads` that takes most, and the run it is for."""
        from mbf_mlx.memory import formula
        from mbf_mlx.planning import work

        device = self.device or ("metal" if memory and folder is None and not _has_mlx() else this_device())
        available = usable(memory, device) if memory is not None else _available_bytes(device)
        packed = device != "cpu" or self.keep_quantized or shape.plain_bytes > available / 2
        by_hand = _by_hand(device, folder)
        run = run_of(
            shape,
            self._lora_for(model, folder),
            by_hand=by_hand,
            packed=packed,
            checkpoint=self.train.grad_checkpoint,
            bfloat16=by_hand and not packed and self._in_bfloat16(device),
        )
        run = replace(run, measured=work.measured_values(method, all_layers(shape, run), run.rank))
        needs: list[tuple[Memory, Load]] = [(formula.predict(shape, run, load), load) for load in loads]
        worst, load = max(needs, key=lambda pair: pair[0].peak)
        said = verdict(worst.peak, available)
        ways = formula.ways_to_fit(shape, run, load, int(SHARE * available)) if said != FITS else []
        parts = asdict(worst)
        document = {
            "model": model,
            "device": device,
            "memory_bytes": memory or available,
            "available_bytes": available,
            "peak_bytes": worst.peak,
            "parts": {name: parts[name] for name in PARTS},
            "weights_packed": packed,
            "batch": {"rows": load.rows, "tokens": load.tokens, "supervised": load.supervised},
            "verdict": said,
            "would_fit": ways,
        }
        return document, run


def find_shape(model: str, report: Callable[[str], None]) -> "tuple[Path | None, Shape]":
    """Return a model's folder, or None where it is a recipe's model that is not fetched, and its shape."""
    from mbf_mlx.base.recipe import models_folder, recipes
    from mbf_mlx.base.sources import resolve_base

    known = recipes()
    if model in known and not (models_folder() / model).exists():
        return None, shape_of_recipe(known[model])
    folder = resolve_base(model, offline=True, report=report).path
    return folder, shape_of_folder(folder)


def this_device() -> str:
    """Return the kind of device that this machine would train on."""
    from mbf_mlx.device import backend

    return backend.setup().kind if _has_mlx() else "cpu"


def all_layers(shape: "Shape", run: "Run") -> dict[str, tuple[int, int]]:
    """Return the (out, in) of every layer with factors, by a name of its own."""
    return {f"{i}.{key}": shape.layers[key] for i in range(run.num_layers) for key in run.keys if key in shape.layers}


def free_bytes(folder: Path) -> int:
    """Return the free bytes on the disk of a folder, which need not be there yet."""
    return shutil.disk_usage(next(each for each in (folder, *folder.absolute().parents) if each.exists())).free


def _available_bytes(device: str) -> int:
    """Return how many bytes this machine's device may take now."""
    from mbf_mlx.device import backend, machine

    return machine.available_memory() if device == "cpu" else backend.setup().memory_bytes


def _by_hand(device: str, folder: Path | None) -> bool:
    """Return whether engine/llama_pass.py would compute the pass: of a Llama, on a CPU."""
    from mbf_mlx.base.sources import read_config

    return device == "cpu" and (folder is None or read_config(folder)["model_type"] == "llama")


def _has_mlx() -> bool:
    from mbf_mlx.device import backend

    return backend.has_module("mlx.core")
