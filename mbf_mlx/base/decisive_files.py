"""The hashes of what decides, besides the weights, what a base computes: its settings and its tokenizer.

They belong to the base's identity, as its fingerprint does. The same weights with another rope_theta, or with other
merges, are another model. The chat template is not among them: a stream has a hash of its own for that.
"""

import hashlib
import json
from pathlib import Path
from typing import Any

from mbf_mlx.base.sources import read_config
from mbf_mlx.errors import InputError
from mbf_mlx.files.documents import read_object
from mbf_mlx.files.storage import read_file

# Fields of config.json that no model computes with: where it came from, how it was trained, what only others read.
_NO_MATTER = {
    *("_name_or_path", "transformers_version", "torch_dtype", "dtype", "use_cache", "pad_token_id", "bos_token_id"),
    *("attention_dropout", "hidden_dropout", "resid_dropout", "embd_dropout", "initializer_range", "pretraining_tp"),
    *("quantization_config", "id2label", "label2id", "problem_type", "torchscript", "output_attentions"),
    *("output_hidden_states", "return_dict", "return_dict_in_generate", "license", "auto_map"),
}
# Fields of tokenizer_config.json that change no token.
_NO_TOKENS = {"chat_template", "name_or_path", "model_max_length", "processor_class", "padding_side", "truncation_side"}
_WHOLE = ("tokenizer.json", "tokenizer.model", "vocab.json", "merges.txt")  # hashed byte for byte
_SETTINGS = ("special_tokens_map.json", "added_tokens.json")


def decisive_files(folder: Path) -> dict[str, str]:
    """Return the sha256 of each file of a model folder that decides what is computed, by the file's name.

    Of JSON settings only the fields that matter are hashed, whatever their order; a field that is null is not there.

    Raises:
        InputError: one of the files cannot be read.
    """
    config = read_config(folder)
    if "quantization" not in config and config.get("quantization_config"):
        config["quantization"] = config["quantization_config"]
    found = {"config.json": _fields(config, _NO_MATTER)}
    if generation := _object(folder / "generation_config.json"):
        found["generation_config.json"] = _fields({"eos_token_id": generation.get("eos_token_id")}, set())
    if settings := _object(folder / "tokenizer_config.json"):
        found["tokenizer_config.json"] = _fields(settings, _NO_TOKENS)
    found |= {name: _fields(document, set()) for name in _SETTINGS if (document := _object(folder / name))}
    for path in [folder / name for name in _WHOLE] + sorted(folder.glob("*.tiktoken")):
        if path.is_file():
            found[path.name] = hashlib.sha256(read_file(path)).hexdigest()
    return found


def check_decisive_files(folder: Path, expected: dict[str, str], stream: Path) -> None:
    """Refuse a model folder whose settings or tokenizer are not those that a stream was taught with.

    Args:
        folder: A local model folder with the stream's weights.
        expected: What `decisive_files` returned then; empty for a stream that has not written it down yet.
        stream: The stream's folder, for the message.

    Raises:
        InputError: they differ; the message names every file that does.
    """
    if not expected or (found := decisive_files(folder)) == expected:
        return
    names = sorted(name for name in expected.keys() | found.keys() if expected.get(name) != found.get(name))
    shown = [f"  {name}: expected {_short(expected.get(name))}, got {_short(found.get(name))}" for name in names]
    raise InputError(
        f"{folder} has the weights that {stream} was taught with, but not the same settings or tokenizer, so it"
        " computes something else:\n"
        + "\n".join(shown)
        + "\nhint: restore these files, or name another copy of the base with"
        " --model; a base that was changed on purpose needs a new stream"
    )


def _short(digest: str | None) -> str:
    return f"sha256 {digest[:12]}" if digest else "no such file"


def _object(path: Path) -> dict[str, Any]:
    return read_object(path) if path.is_file() else {}


def _fields(document: dict[str, Any], ignored: set[str]) -> str:
    kept = {name: value for name, value in document.items() if name not in ignored and value is not None}
    return hashlib.sha256(json.dumps(kept, sort_keys=True).encode()).hexdigest()
