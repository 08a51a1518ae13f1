"""The `mlx` target: a fused model folder that mlx-lm, LM Studio's MLX engine and mlx-swift load as it is.

Untouched tensors are copied byte for byte, unless the whole export is to have 16 or 32 bits. Layers with factors are
fused (weights/fuse.py) and stored with more bits;
`quantization` in config.json says so layer by layer. The tokenizer, chat template and licence files are the base's own.
"""

import json
import shutil
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path

import numpy as np

from mbf_mlx.base.sources import stated_config
from mbf_mlx.errors import InputError
from mbf_mlx.export.job import Job
from mbf_mlx.export.place import LICENCES, fresh_folder
from mbf_mlx.export.weights.checkpoint import PARTS, Checkpoint, Layer, row_ranges
from mbf_mlx.export.weights.fuse import (
    MAX_ERROR,
    MIN_RETENTION,
    SAFE_BITS,
    DeltaRows,
    Form,
    Fused,
    Survival,
    delta_rows,
    find_layers,
    keeps_grid,
    store,
    touched_form,
)
from mbf_mlx.export.weights.half_type import FLOAT16
from mbf_mlx.export.weights.rounding import Rounders, no_rounder
from mbf_mlx.export.weights.tensors import Stored, Tensor, Writer
from mbf_mlx.files.dtypes import CONFIG_NAMES, from_float32

BITS = (4, 5, 6, 8, 16, 32)
FLOAT_BITS = (16, 32)  # store floats, and no quantized layer
MIXED_BITS = 6  # for layers whose update survives 6 bits; the others get 8
COPIED = ("*.json", "*.txt", "*.jinja", "*.model", "*.tiktoken", *LICENCES)
INDEX = "model.safetensors.index.json"
TEMPLATE = "chat_template.jinja"  # where transformers looks for it first


@dataclass(frozen=True)
class FolderReport:
    """What an `mlx` export did."""

    bytes_base: int  # of the base's tensors
    bytes_out: int
    layers: list[Fused] = field(default_factory=list)  # those with factors


def write_mlx_folder(
    job: Job, rounders: Rounders = no_rounder, finish: Callable[[Path, FolderReport], None] | None = None
) -> FolderReport:
    """Write the base with the adapter fused into it as a folder of its own.

    `job.bits` None stores layers with factors at 8 bits. 6 stores 6 where the update survives it, and 8 elsewhere.
    16 and 32 dequantize the whole model and store all of it in one float type; weights/half_type.py chooses that of 16.

    Args:
        job: The export.
        rounders: Layer -> the rounder of its inputs, for layers that keep few bits.
        finish: Called with the folder before it gets its name, to check it and to add the card.

    Raises:
        InputError: the adapter does not fit the base, or `job.out` may not be written.
    """
    check_bits(job.bits)
    base = Checkpoint(job.base)
    touched = find_layers(base, job.factors)
    dtype = job.float_type() if job.bits in FLOAT_BITS else None
    forms = _forms(base, touched, job, job.bits, dtype)
    plans = {path: _plan(base, forms, path, dtype) for path in base.files}
    bytes_out = sum(tensor.nbytes for plan in plans.values() for tensor in plan.values())
    with fresh_folder(job.out, force=job.force, needs=bytes_out, forbidden=job.off_limits) as folder:
        fuse, layers = _Fuse(base, forms, touched, job, rounders), []
        with job.counting(base.nbytes) as count:
            for path, plan in plans.items():
                with Writer(folder / path.name, plan, base.metadata[path]) as writer:
                    for name in base.names_in(path):
                        fused = fuse.write(name, plan, writer)
                        layers += [fused] if fused else []
                        count(base.tensors[name].nbytes)
        report = FolderReport(base.nbytes, bytes_out, layers)
        _write_config(base, forms, dtype, folder)
        _write_index(base, plans, folder)
        _copy_companions(job.base, folder, job.chat_template)
        if finish:
            finish(folder, report)
    return report


def check_bits(bits: int | None) -> None:
    """Raise InputError if no layer of a folder can have so many bits."""
    if bits is not None and bits not in BITS:
        raise InputError(f"--bits: expected one of {', '.join(map(str, BITS))}, got {bits}")


def planned_bytes(job: Job, bits: int | None) -> int:
    """Return the bytes of tensors that the export would have with these bits."""
    base = Checkpoint(job.base)
    dtype = {16: FLOAT16, 32: "F32"}.get(bits or 0)  # both types of 16 bits take as much
    forms = _forms(base, find_layers(base, job.factors), job, bits, dtype)
    return sum(tensor.nbytes for path in base.files for tensor in _plan(base, forms, path, dtype).values())


def keeps_few_bits(job: Job) -> bool:
    """Return whether any layer with factors would stay at few bits, and so has to be rounded with care."""
    layers = find_layers(Checkpoint(job.base), job.factors)
    return job.bits not in FLOAT_BITS and any(
        keeps_grid(layer, touched_form(layer, job.bits)) for layer in layers.values()
    )


def _forms(
    base: Checkpoint, touched: dict[str, Layer], job: Job, bits: int | None, dtype: str | None
) -> dict[str, Form]:
    """Return the new form of every layer that changes; `dtype` is the float type of the whole export, if it has one."""
    moved = [name for name in touched if np.any(job.factors[name].b)]
    if dtype is None:
        forms = {name: touched_form(touched[name], bits) for name in moved}
        if bits == MIXED_BITS:
            for name, form in forms.items():
                if not _survives(touched[name], form, partial(delta_rows, job.factors[name], job.scale)):
                    forms[name] = touched_form(touched[name], SAFE_BITS)
        return forms
    forms = {}
    for name in base.layer_names():
        layer = touched.get(name) or base.layer(name)
        form = Form(None, dtype)
        if name in moved or layer.setting or layer.dtype != form.dtype:
            forms[name] = form
    return forms


def _survives(layer: Layer, form: Form, delta: DeltaRows) -> bool:
    """Return whether an update survives a form: enough of it is stored, and the rounding noise is no larger."""
    survival = Survival()
    for _ in store(layer, form, delta, survival):
        pass
    return survival.retention >= MIN_RETENTION and survival.error <= MAX_ERROR


def _plan(base: Checkpoint, forms: dict[str, Form], path: Path, dtype: str | None) -> dict[str, Tensor]:
    """Return the tensors of the new file for `path`. All parts of a changed layer go where its weight was."""
    plan: dict[str, Tensor] = {}
    others = set(base.other_floats()) if dtype else set()
    for name in base.names_in(path):
        layer, part = _split(name)
        if name in others and dtype:
            plan[name] = Tensor(dtype, base.tensors[name].shape)
        elif layer not in forms or part not in PARTS:
            plan[name] = base.tensors[name]
        elif part == "weight":
            plan |= forms[layer].tensors(base.layer(layer))
    return plan


def _split(name: str) -> tuple[str, str]:
    layer, _, part = name.rpartition(".")
    return layer, part


class _Fuse:
    """Writes the base's tensors one after the other, fused where they have factors."""

    def __init__(
        self, base: Checkpoint, forms: dict[str, Form], touched: dict[str, Layer], job: Job, rounders: Rounders
    ) -> None:
        self._base, self._forms, self._touched, self._job, self._rounders = base, forms, touched, job, rounders

    def write(self, name: str, plan: dict[str, Tensor], writer: Writer) -> Fused | None:
        """Write the new form of one tensor of the base. Return what became of it if its layer has factors."""
        layer_name, part = _split(name)
        if layer_name not in self._forms:
            _carry(name, self._base.tensors[name], plan[name].dtype, writer)
            still = part == "weight" and layer_name in self._touched
            return _unmoved(self._touched[layer_name]) if still else None
        if part not in PARTS:
            _carry(name, self._base.tensors[name], plan[name].dtype, writer)
        if part != "weight":
            return None
        layer = self._touched.get(layer_name) or self._base.layer(layer_name)
        form, survival = self._forms[layer_name], Survival()
        pair = self._job.factors.get(layer_name)
        delta = partial(delta_rows, pair, self._job.scale) if pair else None
        rounder = self._rounders(layer_name) if pair and keeps_grid(layer, form) else None
        for first, tensors in store(layer, form, delta, survival, rounder):
            for tensor_name, rows in tensors.items():
                writer.write(tensor_name, rows, first)
        return _fused(layer, form, survival) if pair else None


def _carry(name: str, stored: Stored, dtype: str, writer: Writer) -> None:
    """Write a tensor that has learned nothing, in a type."""
    if stored.dtype == dtype:
        writer.copy(name, stored)
        return
    for first, last in row_ranges(stored.shape):
        writer.write(name, from_float32(stored.floats(first, last), dtype), first)


def _fused(layer: Layer, form: Form, survival: Survival) -> Fused:
    bytes_after = sum(tensor.nbytes for tensor in form.tensors(layer).values())
    before = str(Form(layer.setting, layer.dtype))
    numbers = {"size": survival.size, "retention": survival.retention, "error": survival.error}
    return Fused(layer.name, before, str(form), layer.nbytes, bytes_after, **numbers)


def _unmoved(layer: Layer) -> Fused:
    return _fused(layer, Form(layer.setting, layer.dtype), Survival())


def _write_config(base: Checkpoint, forms: dict[str, Form], dtype: str | None, folder: Path) -> None:
    """Write config.json with the base's keys in their order. Where nothing changes, copy the base's own file."""
    config, quantized = dict(base.config), {name: form.setting for name, form in forms.items() if form.setting}
    if dtype:
        config = {key: value for key, value in config.items() if key not in ("quantization", "quantization_config")}
        stated = [key for key in ("torch_dtype", "dtype") if key in config] or ["torch_dtype"]
        config.update(dict.fromkeys(stated, CONFIG_NAMES[dtype]))
    elif quantized:
        entries = {name: asdict(setting) for name, setting in quantized.items()}
        for key in ("quantization", "quantization_config"):
            if config.get(key) == base.quantization:
                config[key] = {**base.quantization, **entries}
    if config == stated_config(base.folder):  # mlx-lm reads it as we do
        shutil.copyfile(base.folder / "config.json", folder / "config.json")
    else:
        text = json.dumps(config, indent=4, ensure_ascii=False)
        (folder / "config.json").write_text(text + "\n", encoding="utf-8")


def _write_index(base: Checkpoint, plans: dict[Path, dict[str, Tensor]], folder: Path) -> None:
    """Write the index of the weight files if the base has one."""
    if not (base.folder / INDEX).is_file():
        return
    index = json.loads((base.folder / INDEX).read_text(encoding="utf-8"))
    total = sum(tensor.nbytes for plan in plans.values() for tensor in plan.values())
    index["metadata"] = {**index.get("metadata", {}), "total_size": total}
    index["weight_map"] = {name: path.name for path, plan in plans.items() for name in plan}
    (folder / INDEX).write_text(json.dumps(index, indent=4) + "\n", encoding="utf-8")


def _copy_companions(base_folder: Path, folder: Path, chat_template: str | None) -> None:
    """Copy the base's tokenizer files, chat template, generation settings and licence, byte for byte.

    Args:
        base_folder, folder: From where to where.
        chat_template: The template to write in place of the base's own; None keeps that.
    """
    for pattern in COPIED:
        for path in sorted(base_folder.glob(pattern)):
            ours = path.name in ("config.json", INDEX) or path.name.startswith("mbf")
            ours |= chat_template is not None and path.name.startswith("chat_template")
            if path.is_file() and not ours and not (folder / path.name).exists():
                shutil.copyfile(path, folder / path.name)
    if chat_template is None:
        return
    (folder / TEMPLATE).write_text(chat_template, encoding="utf-8")
    place = folder / "tokenizer_config.json"
    settings = json.loads(place.read_text(encoding="utf-8")) if place.is_file() else {}
    if settings.pop("chat_template", None) is not None:
        place.write_text(json.dumps(settings, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
