"""The targets: each function writes one export, opens it again, measures it and returns what it found.

Every export is checked, and refused where it lost too much, before it gets its name. The returned document holds plain
values; `mbf export --json` prints it.
"""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from mbf_mlx.adapters.mlx_lm import adapter_files
from mbf_mlx.adapters.peft import CONFIG as PEFT_CONFIG
from mbf_mlx.adapters.peft import peft_files, read_peft
from mbf_mlx.errors import quoted
from mbf_mlx.export import mlx_folder
from mbf_mlx.export.adapter_folder import read_back, write_files
from mbf_mlx.export.job import Job
from mbf_mlx.export.mlx_folder import MIXED_BITS, TEMPLATE, FolderReport, check_bits, write_mlx_folder
from mbf_mlx.export.outcome import (
    Document,
    add_card,
    check,
    fused_document,
    in_best_half_type,
    next_commands,
    small_document,
)
from mbf_mlx.export.place import check_folder_place, check_place
from mbf_mlx.export.weights.half_type import FLOAT16
from mbf_mlx.files.dtypes import CONFIG_NAMES
from mbf_mlx.files.storage import Data

VLLM_RANKS = (16, 32, 64, 128, 256, 320, 512)  # what vLLM's --max-lora-rank takes; the first is its default
MUCH_LARGER = 0.2  # an export that is larger than the base by more than this names a smaller one
MUCH_SMALLER = 0.98  # ... which has to take less than this share of its bytes
COARSE = 0.05  # an error in lengths of the update that a user of 16 bits is told of


def mlx(job: Job) -> Document:
    """Write a fused model folder."""
    from mbf_mlx.export.quality.live_model import Live

    check_bits(job.bits)
    check_folder_place(job.out, force=job.force, forbidden=job.off_limits)
    job = job.with_half_type()
    live = Live(job, mlx_folder.keeps_few_bits(job))

    def commands(out: str, base: str) -> list[str]:
        return _mlx_lm(f"--model {quoted(out)}")

    def write(job: Job) -> Document:
        document = Document()

        def finish(folder: Path, report: FolderReport) -> None:
            document.update(_folder_document(job, live, folder, report))
            document["next"] = next_commands(job, commands)
            check(job, document, mlx_folder.planned_bytes)
            add_card(job, folder, "mlx", document, commands)

        write_mlx_folder(job, live.rounder, finish)
        return document

    return in_best_half_type(job, write)


def plain_adapter(job: Job) -> Document:
    """Write the adapter in mlx-lm's layout."""
    files = adapter_files(job.factors, scale=job.scale, num_layers=job.num_layers, base=job.base_name)
    files |= _template_file(job)
    document = small_document(files)

    def commands(out: str, base: str) -> list[str]:
        generate, serve = _mlx_lm(f"--model {quoted(base)} --adapter-path {quoted(out)}")
        if job.template == "none":
            generate += " --ignore-chat-template"
        if job.chat_template is not None:
            serve += f' --chat-template "$(cat {quoted(f"{out}/{TEMPLATE}")})"'
        return [generate, serve]

    def finish(folder: Path) -> None:
        read_back(folder, job.factors, job.scale)
        add_card(job, folder, "adapter", document, commands)

    document["next"] = next_commands(job, commands)
    write_files(files, job.out, force=job.force, forbidden=job.off_limits, finish=finish)
    return document


def _template_file(job: Job) -> dict[str, Data]:
    """Return the chat template that goes beside an adapter, where it is not the base's own."""
    return {} if job.chat_template is None else {TEMPLATE: job.chat_template.encode()}


def _mlx_lm(model: str) -> list[str]:
    return [f'mlx_lm.generate {model} --prompt "..."', f"mlx_lm.server {model}"]


def peft_adapter(job: Job) -> Document:
    """Write the adapter in PEFT's layout."""
    original = job.about.original
    files = peft_files(job.factors, job.scale, base=original or job.base_name, num_blocks=job.num_blocks)
    files |= _template_file(job)
    document, rank = small_document(files), max(len(pair.a) for pair in job.factors.values())
    document["lora_alpha"] = json.loads(bytes(files[PEFT_CONFIG]))["lora_alpha"]
    if original is None and job.about.status.get("base", {}).get("quantization") != "none":
        document["notes"] = [
            f"adapter_config.json names {job.base_name} as the base; PEFT and vLLM need the unquantized model there"
        ]

    def commands(out: str, base: str) -> list[str]:
        serve = f"vllm serve {quoted(original or base)} --enable-lora --lora-modules tuned={quoted(out)}"
        if job.chat_template is not None:
            serve += f" --chat-template {quoted(f'{out}/{TEMPLATE}')}"
        most = next((each for each in VLLM_RANKS if each >= rank), None)
        return [serve if most == VLLM_RANKS[0] else f"{serve} --max-lora-rank {most or rank}"]

    def finish(folder: Path) -> None:
        stored = read_peft(folder)
        for name, pair in job.factors.items():
            meant, got = job.scale * pair.b @ pair.a, stored.scale * stored.factors[name].b @ stored.factors[name].a
            if np.abs(got - meant).max() > 1e-6 * np.abs(meant).max():
                raise RuntimeError(f"{folder}: {name}: what was read back is not what was meant")
        add_card(job, folder, "peft", document, commands)

    document["next"] = next_commands(job, commands)
    write_files(files, job.out, force=job.force, forbidden=job.off_limits, finish=finish)
    return document


def gguf(job: Job) -> Document:
    """Write the whole model as one GGUF file."""
    from mbf_mlx.export.gguf.adapter import is_ours
    from mbf_mlx.export.gguf.write import GGUFReport, has_float_type, planned_bytes, quantize_line, write_gguf

    check_place(job.out, force=job.force, needs=0, forbidden=job.off_limits, is_ours=is_ours)
    job = job.with_half_type()
    live = _live_for_gguf(job)

    def commands(out: str, base: str) -> list[str]:
        return [f"llama-server -m {quoted(out)}"]

    def write(job: Job) -> Document:
        document = Document()

        def finish(path: Path, report: GGUFReport) -> None:
            document.update(_gguf_document(job, live, path, report))
            document["next"] = next_commands(job, commands)
            if has_float_type(job):
                document["next"].append(quantize_line(job.out))
            check(job, document, planned_bytes)

        write_gguf(job, live.rounder, finish)
        return document

    return in_best_half_type(job, write)


def gguf_adapter(job: Job) -> Document:
    """Write the adapter alone as a GGUF file."""
    from mbf_mlx.export.gguf.adapter import write_gguf_adapter

    report = write_gguf_adapter(job)
    command = f"llama-server -m BASE.gguf --lora {quoted(job.out)}"
    if job.chat_template is not None:
        command += f" --jinja --chat-template {quoted(job.chat_template)}"
    return {"bytes": report.nbytes, "alpha": report.alpha, "next": [command], "notes": []}


def ollama(job: Job) -> Document:
    """Write a folder for `ollama create`."""
    from mbf_mlx.export.gguf.write import planned_bytes
    from mbf_mlx.export.ollama import OllamaReport, commands, write_ollama

    check_folder_place(job.out, force=job.force, forbidden=job.off_limits)
    job = job.with_half_type()
    live = _live_for_gguf(job)

    def write(job: Job) -> Document:
        document = Document()

        def finish(folder: Path, report: OllamaReport) -> None:
            document.update(_gguf_document(job, live, folder / f"{job.out.name}.gguf", report.gguf))
            document.update(template=report.template, next=next_commands(job, commands))
            document["notes"] += report.notes
            check(job, document, planned_bytes)
            add_card(job, folder, "ollama", document, commands)

        write_ollama(job, live.rounder, finish)
        return document

    return in_best_half_type(job, write)


def lmstudio(job: Job) -> Document:
    """Write a folder in LM Studio's layout: a GGUF file, or with `--type mlx` a folder for its MLX engine."""
    from mbf_mlx.export import lmstudio
    from mbf_mlx.export.gguf.write import GGUFReport, planned_bytes
    from mbf_mlx.export.quality.live_model import Live

    check_folder_place(job.out, force=job.force, forbidden=job.off_limits)
    planned, commands = planned_bytes, lmstudio.gguf_commands
    if lmstudio.for_mlx(job):
        check_bits(job.bits)
        planned, commands = mlx_folder.planned_bytes, lmstudio.mlx_commands
    job = job.with_half_type()
    live = Live(job, mlx_folder.keeps_few_bits(job)) if lmstudio.for_mlx(job) else _live_for_gguf(job)

    def write(job: Job) -> Document:
        document = Document()

        def finish(folder: Path, report: lmstudio.LMStudioReport) -> None:
            written, model = report.written, folder / report.model
            if isinstance(written, GGUFReport):
                document.update(_gguf_document(job, live, model, written))
            else:
                document.update(_folder_document(job, live, model, written))
            document["next"] = next_commands(job, commands)
            check(job, document, planned)
            # LM Studio's MLX engine is given the model's folder alone.
            add_card(job, model if model.is_dir() else folder, "lmstudio", document, commands)

        lmstudio.write_lmstudio(job, live.rounder, finish)
        return document

    return in_best_half_type(job, write)


# target -> the function that writes it; the names are those of `export.TARGETS`
WRITERS: dict[str, Callable[[Job], Document]] = {
    "mlx": mlx,
    "adapter": plain_adapter,
    "peft": peft_adapter,
    "gguf": gguf,
    "gguf-adapter": gguf_adapter,
    "ollama": ollama,
    "lmstudio": lmstudio,
}


def _live_for_gguf(job: Job) -> Any:
    from mbf_mlx.export.gguf.write import keeps_few_bits
    from mbf_mlx.export.quality.live_model import Live

    return Live(job, keeps_few_bits(job))


def _is_float16(job: Job) -> bool:
    """Return whether float16 was chosen for the whole export."""
    return job.half is not None and job.half.dtype == FLOAT16


def _fused_document(job: Job, report: Any) -> Document:
    """Return the document of a fused export, with what its 16-bit type costs."""
    document = fused_document(report.layers, report.bytes_base, report.bytes_out)
    document["half_type"] = job.half.document() if job.half else None
    halves = {layer.after for layer in report.layers} & {"F16", "BF16"}
    if halves and document["error"] > COARSE:
        more = "" if job.half else "--bits 16 takes the 16-bit type that keeps most of it, "
        document["notes"].append(
            f"{100 * document['error']:.0f} % of the update is lost to the rounding of"
            f" {' and '.join(CONFIG_NAMES[each] for each in sorted(halves))}; {more}--bits 32 keeps all of it"
        )
    return document


def _folder_document(job: Job, live: Any, folder: Path, report: FolderReport) -> Document:
    document = _fused_document(job, report)
    document["quality"] = live.compare(folder, in_float16=_is_float16(job))
    document["notes"] += job.rows.notes
    more = report.bytes_out / report.bytes_base - 1
    mixed = mlx_folder.planned_bytes(job, MIXED_BITS)
    if job.bits is None and more > MUCH_LARGER and mixed < report.bytes_out * MUCH_SMALLER:
        document["notes"].append(
            f"the export is {100 * more:.0f} % larger than the base, because many layers have learned and each of them "
            f"goes to 8 bits; --bits {MIXED_BITS} stores {MIXED_BITS} bits where the update survives that, and takes "
            f"{mixed / 1e6:,.1f} MB"
        )
    return document


def _gguf_document(job: Job, live: Any, path: Path, report: Any) -> Document:
    from mbf_mlx.export.gguf.read_back import stored_matrices

    document = _fused_document(job, report)
    document["types"] = report.types
    stored = stored_matrices(path, report.matrices)
    document["quality"] = live.compare(job.base, stored, in_float16=_is_float16(job))
    document["notes"] += [*report.notes, *job.rows.notes]
    return document
