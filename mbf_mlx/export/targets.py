"""The targets: each function writes one export, opens it again, measures it and returns what it found.

Every export is checked, and refused where it lost too much, before it gets its name. What is returned is plain values,
the document of `mbf export --json`.
"""

import json
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from mbf_mlx.adapters import mlx_lm as adapter
from mbf_mlx.adapters import peft
from mbf_mlx.errors import InputError
from mbf_mlx.export.adapter_folder import read_back, write_files
from mbf_mlx.export.job import Job
from mbf_mlx.export.mlx_folder import (
    MIXED_BITS,
    FolderReport,
    check_bits,
    keeps_few_bits,
    planned_bytes,
    write_mlx_folder,
)
from mbf_mlx.export.outcome import Document, add_card, check, fused_document, small_document
from mbf_mlx.export.place import check_folder_place, check_place

MUCH_LARGER = 0.2  # than the base: an export of which its user hears that there is a smaller one


def mlx(job: Job) -> Document:
    """Write a fused model folder."""
    from mbf_mlx.export.quality.live_model import Live

    check_bits(job.bits)
    check_folder_place(job.out, force=job.force, forbidden=(*job.forbidden, job.base))
    live, document = Live(job, keeps_few_bits(job.base, job.factors, job.bits)), Document()

    def finish(folder: Path, report: FolderReport) -> None:
        document.update(_folder_document(job, live, folder, report))
        document["next"] = [
            f'mlx_lm.generate --model {job.out} --prompt "..."',
            f"mlx_lm.server --model {job.out}",
        ]
        check(job, document, partial(planned_bytes, job.base, job.factors, job.scale))
        add_card(job, folder, "mlx", document)

    _write(job, write_mlx_folder, bits=job.bits, rounders=live.rounder, finish=finish)
    return document


def plain_adapter(job: Job) -> Document:
    """Write the adapter as mlx-lm lays it out."""
    files = adapter.encode(job.factors, scale=job.scale, num_layers=job.num_layers, base=job.about.base)
    document = small_document(files)
    document["next"] = [
        f'mlx_lm.generate --model {job.base} --adapter-path {job.out} --prompt "..."',
        f"mlx_lm.server --model {job.base} --adapter-path {job.out}",
    ]

    def finish(folder: Path) -> None:
        read_back(folder, job.factors, job.scale)
        add_card(job, folder, "adapter", document)

    write_files(files, job.out, finish=finish, **_place(job))
    return document


def peft_adapter(job: Job) -> Document:
    """Write the adapter as PEFT lays it out."""
    base = job.about.original or job.about.base
    files = peft.encode(job.factors, job.scale, base=base, num_blocks=job.num_blocks)
    document = small_document(files)
    document["lora_alpha"] = json.loads(bytes(files[peft.CONFIG]))["lora_alpha"]
    document["next"] = [f"vllm serve {base} --enable-lora --lora-modules tuned={job.out}"]
    if job.about.original is None:
        document["notes"] = [f"base_model_name_or_path is {base}; PEFT and vLLM want the unquantized model there"]

    def finish(folder: Path) -> None:
        stored = peft.read(folder)
        for name, pair in job.factors.items():
            meant, got = job.scale * pair.b @ pair.a, stored.scale * stored.factors[name].b @ stored.factors[name].a
            if np.abs(got - meant).max() > 1e-6 * np.abs(meant).max():
                raise RuntimeError(f"{folder}: {name}: what was read back is not what was meant")
        add_card(job, folder, "peft", document)

    write_files(files, job.out, finish=finish, **_place(job))
    return document


def gguf(job: Job) -> Document:
    """Write the whole model as one GGUF file."""
    from mbf_mlx.export.gguf.adapter import is_ours
    from mbf_mlx.export.gguf.write import GGUFReport, planned_bytes, quantize_line, write_gguf

    check_place(job.out, force=job.force, needs=0, forbidden=(*job.forbidden, job.base), is_ours=is_ours)
    kind, document = _gguf_kind(job), Document()
    live = _live_for_gguf(job, kind)

    def finish(path: Path, report: GGUFReport) -> None:
        document.update(_gguf_document(job, live, path, report))
        document["next"] = [f"llama-server -m {job.out}"]
        if kind in ("F16", "F32", "BF16"):
            document["next"].append(quantize_line(job.out))
        check(job, document, partial(planned_bytes, job.base, job.factors))

    named = {"name": job.out.stem, "license_id": job.about.licence}
    _write(job, write_gguf, kind=kind, rounders=live.rounder, finish=finish, **named)
    return document


def gguf_adapter(job: Job) -> Document:
    """Write the adapter alone as a GGUF file."""
    from mbf_mlx.export.gguf.adapter import write_gguf_adapter

    report = write_gguf_adapter(job.base, job.factors, job.scale, job.out, name=job.out.stem, **_place(job))
    command = f"llama-server -m BASE.gguf --lora {job.out}"
    return {"bytes": report.nbytes, "alpha": report.alpha, "next": [command], "notes": []}


def ollama(job: Job) -> Document:
    """Write a folder for `ollama create`."""
    from mbf_mlx.export.gguf.write import planned_bytes
    from mbf_mlx.export.ollama import OllamaReport, write_ollama

    check_folder_place(job.out, force=job.force, forbidden=(*job.forbidden, job.base))
    kind, document = _gguf_kind(job), Document()
    live = _live_for_gguf(job, kind)

    def finish(folder: Path, report: OllamaReport) -> None:
        document.update(_gguf_document(job, live, folder / report.gguf.out.name, report.gguf))
        document.update(template=report.template, next=report.next)
        document["notes"] += report.notes
        check(job, document, partial(planned_bytes, job.base, job.factors))
        add_card(job, folder, "ollama", document)

    named = {"name": job.out.name, "license_id": job.about.licence}
    _write(job, write_ollama, kind=kind, template=job.template, rounders=live.rounder, finish=finish, **named)
    return document


def lmstudio(job: Job) -> Document:
    """Write a folder in LM Studio's layout: a GGUF file, or with `--type mlx` a folder for its MLX engine."""
    from mbf_mlx.export.gguf import write as gguf
    from mbf_mlx.export.gguf.write import GGUFReport
    from mbf_mlx.export.lmstudio import LMStudioReport, write_lmstudio
    from mbf_mlx.export.quality.live_model import Live

    check_folder_place(job.out, force=job.force, forbidden=(*job.forbidden, job.base))
    document, options = Document(), dict[str, Any]()
    if (job.kind or "").lower() == "mlx":
        check_bits(job.bits)
        live = Live(job, keeps_few_bits(job.base, job.factors, job.bits))
        options.update(engine="mlx", bits=job.bits)
    else:
        options.update(engine="gguf", kind=_gguf_kind(job))
        live = _live_for_gguf(job, options["kind"])

    def finish(folder: Path, report: LMStudioReport) -> None:
        written, model = report.written, folder / report.model.relative_to(report.out)
        if isinstance(written, GGUFReport):
            document.update(_gguf_document(job, live, model, written))
            planned = partial(gguf.planned_bytes, job.base, job.factors)
        else:
            document.update(_folder_document(job, live, model, written))
            planned = partial(planned_bytes, job.base, job.factors, job.scale)
        document["next"] = report.next
        check(job, document, planned)
        add_card(job, folder, "lmstudio", document)

    named = {"name": job.out.name, "license_id": job.about.licence}
    _write(job, write_lmstudio, rounders=live.rounder, finish=finish, **named, **options)
    return document


# target -> what writes it; the names are those of `export.TARGETS`
WRITERS: dict[str, Callable[[Job], Document]] = {
    "mlx": mlx,
    "adapter": plain_adapter,
    "peft": peft_adapter,
    "gguf": gguf,
    "gguf-adapter": gguf_adapter,
    "ollama": ollama,
    "lmstudio": lmstudio,
}


def _place(job: Job) -> dict[str, Any]:
    return {"force": job.force, "forbidden": job.forbidden}


def _write(job: Job, writer: Callable[..., Any], **options: Any) -> None:
    """Call a writer of fused weights, which counts bytes, and show how far it is."""
    with job.show("fusing, writing, reading back", 100, "percent") as update:
        writer(
            job.base,
            job.factors,
            job.scale,
            job.out,
            progress=lambda done, total, name: update(100 * done // max(total, 1)),
            **options,
            **_place(job),
        )


def _live_for_gguf(job: Job, kind: str | None) -> Any:
    from mbf_mlx.export.gguf import write as gguf
    from mbf_mlx.export.quality.live_model import Live

    return Live(job, gguf.keeps_few_bits(job.base, job.factors, kind))


def _gguf_kind(job: Job) -> str | None:
    """Return the GGUF type that --type or --bits names.

    Raises:
        InputError: GGUF has no type of so many bits that we write.
    """
    from mbf_mlx.export.gguf.tensor_types import BITS

    if job.kind is not None or job.bits is None:
        return job.kind
    if job.bits not in BITS:
        raise InputError(f"--bits: expected one of {', '.join(map(str, BITS))} for GGUF, got {job.bits}")
    return str(BITS[job.bits].name)


def _folder_document(job: Job, live: Any, folder: Path, report: FolderReport) -> Document:
    document = fused_document(report.layers, report.bytes_base, report.bytes_out)
    document["quality"] = live.compare(folder)
    document["notes"] += job.rows.notes
    more = report.bytes_out / report.bytes_base - 1
    if job.bits is None and more > MUCH_LARGER:
        mixed = planned_bytes(job.base, job.factors, job.scale, MIXED_BITS) / 1e6
        document["notes"].append(
            f"{100 * more:.0f} % larger than the base: many layers have learned, and each goes to 8 bits; "
            f"--bits {MIXED_BITS}, where their update survives it, takes {mixed:,.1f} MB"
        )
    return document


def _gguf_document(job: Job, live: Any, path: Path, report: Any) -> Document:
    from mbf_mlx.export.gguf.read_back import stored_matrices

    document = fused_document(report.layers, report.bytes_base, report.bytes_out)
    document["types"] = report.types
    document["quality"] = live.compare(job.base, stored_matrices(path, report.matrices))
    document["notes"] += [*report.notes, *job.rows.notes]
    return document
