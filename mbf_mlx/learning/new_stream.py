"""What is fixed for a stream's life: made with a new stream, compared when settings are given to an old one.

`identity_from_files` runs without mlx.
"""

import hashlib
import uuid
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from mbf_mlx.adapters import mlx_lm as adapter
from mbf_mlx.base import folder as base_files
from mbf_mlx.base.decisive_files import check_decisive_files
from mbf_mlx.base.fingerprint import fingerprint
from mbf_mlx.base.sources import BaseFolder, read_config
from mbf_mlx.config import DataConfig, LoRAConfig, settings_of
from mbf_mlx.errors import InputError
from mbf_mlx.methods import Layers, Method, make
from mbf_mlx.stream.folder import StreamFolder
from mbf_mlx.stream.records import FORMAT_VERSION, BaseRecord, Identity

if TYPE_CHECKING:
    from mbf_mlx.learning.learner import Learner


def identity_from_learner(
    source: BaseFolder, method: Method, lora: LoRAConfig, data: DataConfig, learner: "Learner"
) -> Identity:
    """Return the identity of a new stream whose base model is loaded."""
    base = learner.base
    record = BaseRecord(
        name=source.name,
        fingerprint=base.fingerprint,
        quantization=base.quantization,
        architecture=str(base.config.get("model_type")),
        num_layers=len(base.model.layers),
    )
    template = base.tokenizer.chat_template if data.template == "chat" else None
    return _identity(record, method, lora, learner.layers, template)


def identity_from_files(source: BaseFolder, method: Method, lora: LoRAConfig, data: DataConfig) -> Identity:
    """Return the identity of a new stream from the files of its base alone: no model is loaded."""
    config = read_config(source.path)
    layers, blocks = base_files.chosen_layers(source.path, lora.keys, lora.num_layers)
    record = BaseRecord(
        name=source.name,
        fingerprint=fingerprint(source.path),
        quantization=base_files.describe_quantization(config),
        architecture=str(config.get("model_type")),
        num_layers=blocks,
    )
    template = base_files.template_text(source.path) if data.template == "chat" else None
    return _identity(record, method, lora, layers, template)


def _identity(base: BaseRecord, method: Method, lora: LoRAConfig, layers: Layers, template: str | None) -> Identity:
    lora.check_rank(layers)
    return Identity(
        format_version=FORMAT_VERSION,
        id=uuid.uuid4().hex,
        base=base,
        method=method.name,
        method_options=method.options,
        rank=lora.rank,
        scale=lora.scale,
        keys=list(adapter.block_keys(layers)),
        num_layers=lora.num_layers if lora.num_layers > 0 else base.num_layers,
        dropout=lora.dropout,
        template="chat" if template else "none",
        template_sha256=hashlib.sha256(str(template or "").encode()).hexdigest(),
        layers=layers,
    )


def lora_of(identity: Identity) -> LoRAConfig:
    """Return which layers of a stream's base get factors."""
    return LoRAConfig(
        rank=identity.rank,
        scale=identity.scale,
        keys=tuple(identity.keys),
        num_layers=identity.num_layers,
        dropout=identity.dropout,
    )


def check_fixed(
    stream: StreamFolder,
    method: str | None,
    options: dict[str, Any] | None,
    lora: LoRAConfig | Mapping[str, Any] | None,
    template: str | None,
) -> None:
    """Compare settings that were given for a stream with its own; None, and what `lora` leaves out, is not compared.

    Raises:
        InputError: names all that differ.
    """
    identity = stream.identity
    asked: list[tuple[str, Any, Any]] = [("method", method, identity.method)]
    if options is not None:
        asked.append(("method options", make(method or identity.method, options).options, identity.method_options))
    asked.append(("template", template, identity.template))
    given: dict[str, Any] = settings_of(lora) if isinstance(lora, LoRAConfig) else dict(lora or {})
    own = settings_of(lora_of(identity))
    asked += [(key, given.get(key), own[key]) for key in ("rank", "scale", "dropout")]
    if "num_layers" in given:
        blocks = identity.base.num_layers if given["num_layers"] == -1 else given["num_layers"]
        asked.append(("num_layers", blocks, identity.num_layers))
    if "keys" in given and not _same_keys(given["keys"], identity.keys):
        asked.append(("keys", list(given["keys"]), identity.keys))
    wrong = [f"  {key}: expected {has!r}, got {want!r}" for key, want, has in asked if want not in (None, has)]
    if wrong:
        raise InputError(
            f"{stream.path} was made with other settings, which stay for its life:\n"
            + "\n".join(wrong)
            + "\nhint: leave them out, or learn into a new stream"
        )


def _same_keys(given: Sequence[str], own: Sequence[str]) -> bool:
    """Return whether names of layers, short or as paths inside a block, are all of a stream's keys and no others."""
    named = [{key for key in own if name in (key, key.rpartition(".")[2])} for name in given]
    return all(named) and set().union(*named) == set(own)


def own_base(stream: StreamFolder, source: BaseFolder) -> BaseFolder:
    """Return a base model's folder if it holds the stream's own base.

    Raises:
        InputError: another model is there, or its settings, tokenizer or chat template are others now.
    """
    base, found = stream.identity.base, fingerprint(source.path)
    if found != base.fingerprint:
        raise InputError(
            f"{source.path} is not the base model of {stream.path}: expected {base.name} with fingerprint"
            f" {base.fingerprint[:12]}, got {found[:12]}\nhint: --model names the base that the stream was made with"
        )
    check_decisive_files(source.path, stream.current().manifest.base_files, stream.path)
    base_files.check_template(source.path, stream.identity.template_sha256, stream.path)
    return source
