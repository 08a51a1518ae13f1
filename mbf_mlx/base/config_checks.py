"""Checks of a model folder's JSON files, made before a library builds a model or a tokenizer from them.

mlx-lm and transformers decide what the fields mean. We check the fields that they misread, or fail on without naming.
Each table here lists fields, a test and its words; null fits everywhere.
"""

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

from mbf_mlx.errors import InputError
from mbf_mlx.files.documents import read_object
from mbf_mlx.files.safetensors_file import MAX_LENGTH

Fields = tuple[tuple[tuple[str, ...], Callable[[Any], bool], str], ...]  # names, whether a value fits, what is expected


def _is_size(value: Any) -> bool:
    """Return whether a value is a size; some architectures have a list, a size for each block."""
    return isinstance(value, list) or (type(value) is int and 0 < value <= MAX_LENGTH)


def _is_whole(value: Any) -> bool:
    return type(value) is int


def _is_positive(value: Any) -> bool:
    return type(value) in (int, float) and 0 < value < math.inf


def _is_object(value: Any) -> bool:
    return isinstance(value, dict)


def _is_quantization(value: Any) -> bool:
    """Return whether a value is a quantization; it may hold others for single layers."""
    if not isinstance(value, dict):
        return False
    numbers = [part.get(key, 1) for part in (value, *value.values()) if isinstance(part, dict) for key in _COUNTS]
    return all(type(number) is int and number > 0 for number in numbers)


def _is_token(value: Any) -> bool:
    return all(type(token) is int for token in (value if isinstance(value, list) else [value]))


def _is_template(value: Any) -> bool:
    if isinstance(value, list):
        return all(isinstance(one, dict) and {type(one.get(key)) for key in _NAMED} == {str} for one in value)
    texts = value.values() if isinstance(value, dict) else [value]
    return all(isinstance(text, str) for text in texts)


_COUNTS, _NAMED = ("group_size", "bits"), ("name", "template")
_END_TOKENS = (("eos_token_id",), _is_token, "a token's number, or a list of them")
CONFIG: Fields = (
    (
        ("hidden_size", "intermediate_size", "num_attention_heads", "num_key_value_heads", "head_dim", "vocab_size"),
        _is_size,
        f"a whole number from 1 to {MAX_LENGTH:,}",
    ),
    (("max_position_embeddings", "sliding_window"), _is_whole, "a whole number"),
    (("rope_theta", "rms_norm_eps"), _is_positive, "a number above 0"),
    (("rope_scaling", "rope_parameters"), _is_object, "a JSON object"),
    (("quantization",), _is_quantization, "group_size and bits, whole numbers above 0"),
    _END_TOKENS,
)
# Files that may lie beside config.json.
OTHERS: dict[str, Fields] = {
    "generation_config.json": (_END_TOKENS,),
    "tokenizer_config.json": (
        (("chat_template",), _is_template, 'a text, or a list of {"name": …, "template": …}'),
        (("model_max_length",), lambda value: type(value) in (int, float), "a number of tokens"),
        (("tokenizer_class",), lambda value: isinstance(value, str), "a name"),
    ),
}


def check_fields(document: dict[str, Any], where: Path, fields: Fields) -> None:
    """Check the fields of a document.

    Raises:
        InputError: one that does not fit.
    """
    for names, fits, expected in fields:
        for name in names:
            if (value := document.get(name)) is not None and not fits(value):
                raise InputError(f"{where}: {name}: expected {expected}, got {repr(value)[:80]}")


def check_other_files(folder: Path) -> None:
    """Check the JSON files beside a folder's config.json.

    Raises:
        InputError: one that cannot be read, or a field that does not fit.
    """
    for name, fields in OTHERS.items():
        path = folder / name
        if path.is_file():
            try:
                check_fields(read_object(path), path, fields)
            except InputError as error:
                hint = "copy the file again from the model's source, or correct that field"
                raise InputError(f"{error}\nhint: {hint}") from error
