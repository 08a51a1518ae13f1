"""Exports: what a stream has learned, in the formats that other programs load."""

from pathlib import Path
from typing import Any

from mbf_mlx.config import DataConfig
from mbf_mlx.errors import InputError
from mbf_mlx.export.job import ExportRows, Job, Show, show_nothing

# target -> what it is, in the order of the help
TARGETS = {
    "mlx": "a fused model folder for mlx-lm, LM Studio's MLX engine and mlx-swift",
    "adapter": "the adapter in mlx-lm's layout, for users who have the base",
    "peft": "the adapter in PEFT's layout, for transformers and vLLM",
    "gguf": "the whole model as one file for llama.cpp",
    "gguf-adapter": "the adapter as one file, for llama.cpp beside the base's own GGUF file",
    "ollama": "a GGUF file with a Modelfile",
    "lmstudio": "LM Studio's folders with a GGUF file, or with --type mlx for its MLX engine",
}
WITH_BITS = ("mlx", "gguf", "ollama", "lmstudio")
WITH_TYPE = ("gguf", "ollama", "lmstudio")


def export(
    stream: Any,
    target: str,
    out: Path,
    *,
    bits: int | None = None,
    kind: str | None = None,
    force: bool = False,
    allow_loss: bool = False,
    calibration: Path | None = None,
    show: Show = show_nothing,
) -> dict[str, Any]:
    """Write what a stream has learned as `target` to `out`, open it again and measure how much survived.

    Args:
        stream: An `api.Stream`.
        target: One of TARGETS.
        out: The folder or file to make.
        bits: Bits of the layers with factors, for the targets that quantize; None lets the target choose.
        kind: A GGUF type instead of bits, or "mlx" for LM Studio's MLX engine.
        force: Replace an earlier export.
        allow_loss: Write an export even where it lost too much.
        calibration: A task file or a text to fit and measure on, instead of the stream's own tasks.
        show: Shows progress, as `commands.console.progress` does.

    Returns:
        The document of `mbf export --json`.

    Raises:
        InputError: no such target, options that do not fit it, a stream that has learned nothing, another base, a
            place that may not be written, an export that lost too much.
    """
    check_options(target, bits, kind)
    job = make_job(
        stream, out, bits=bits, kind=kind, force=force, allow_loss=allow_loss, calibration=calibration, show=show
    )
    return run(job, target)


def check_options(target: str, bits: int | None, kind: str | None) -> None:
    """Raise InputError if there is no such target, or the options do not fit it."""
    if target not in TARGETS:
        raise InputError(f"target: expected one of {', '.join(TARGETS)}, got {target!r}")
    if bits is not None and target not in WITH_BITS:
        raise InputError(f"--bits: the target {target} stores float32 and takes no bits")
    if kind is not None and target not in WITH_TYPE:
        raise InputError(f"--type: expected with {', '.join(WITH_TYPE)}, got it with {target}")
    if bits is not None and kind is not None and kind.lower() != "mlx":
        raise InputError(f"--bits and --type: expected one of them, got --bits {bits} and --type {kind}")


def run(job: Job, target: str) -> dict[str, Any]:
    """Write one target and return its document, as `export` does."""
    from mbf_mlx.export.targets import WRITERS

    document = WRITERS[target](job)
    return {"target": target, "out": str(job.out), **document, "notes": [*job.notes, *document["notes"]]}


def make_job(stream: Any, out: Path, *, calibration: Path | None = None, **options: Any) -> Job:
    """Return the export of a stream. Arguments and errors are those of `export`; `options` are fields of `Job`."""
    from mbf_mlx.base.card import public_name, read_card
    from mbf_mlx.export.card import About

    identity, state = stream.folder.identity, stream.folder.state()
    if not state.t:
        raise InputError(f"{stream.folder.path}: nothing to export: it has learned no task")
    base = stream.base_folder()
    # A model that is not quantized is the original itself, and its card names the model that it was tuned from.
    public, quantized = public_name(base.path), identity.base.quantization != "none"
    own = public if "/" in public else None
    card, data = read_card(base.path), DataConfig(template=identity.template, date=stream.folder.date())

    def read_rows() -> ExportRows:
        from mbf_mlx.base.load import load_tokenizer
        from mbf_mlx.export.quality.sample_rows import rows_of_file, rows_of_tasks
        from mbf_mlx.stream.records import spans_to_score

        tokenizer = load_tokenizer(base.path)
        if calibration is not None:
            return rows_of_file(calibration, tokenizer, data)
        return rows_of_tasks(stream.folder.tasks(spans_to_score(state.t)), tokenizer, data, stream.folder.path)

    return Job(
        base=base.path,
        base_name=base.name,
        factors=state.deployed,
        scale=identity.scale,
        num_layers=identity.num_layers,
        num_blocks=identity.base.num_layers,
        about=About(public, stream.status(), card.licence, card.original if quantized else own),
        notes=card.notes,
        template=identity.template,
        chat_template=_carried_template(base.path, data),
        out=out,
        forbidden=(stream.folder.path,),
        read_rows=read_rows,
        **options,
    )


def _carried_template(base: Path, data: DataConfig) -> str | None:
    """Return the chat template that an export carries; None where it is the base's own."""
    from mbf_mlx.base.chat_templates import raw_template, with_date, writes_date
    from mbf_mlx.base.folder import template_text

    own = template_text(base)
    if data.template == "none":
        from mbf_mlx.base.load import load_tokenizer
        from mbf_mlx.data.tokenizer_pieces import PieceTokenizer

        return raw_template(PieceTokenizer(load_tokenizer(base)).begin)
    if not own or not data.date or not writes_date(own):
        return None
    return with_date(own, data.date)
