"""Loads a base model's folder, with little memory, in the form that computes fast on this device.

Where a base comes from is said in sources.py, on which device it runs in device/backend.py. LoRA layers are attached by
engine/lora_layers.py.
"""

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten, tree_map
from mlx_lm import tokenizer_utils
from mlx_lm import utils as mlx_lm
from mlx_lm.tokenizer_utils import TokenizerWrapper

from mbf_mlx.base import first_try, light_tokenizer, unpack
from mbf_mlx.base.apply_template import bound_template
from mbf_mlx.base.fingerprint import fingerprint
from mbf_mlx.base.folder import describe_quantization, vocabulary_rows
from mbf_mlx.base.sources import check_folder, read_config, stated_config, translated_fields, weight_files
from mbf_mlx.errors import InputError
from mbf_mlx.files.safetensors_file import read_header

SHOWN = 8  # lines of a message of mlx-lm's
_NO_CODE = {"trust_remote_code": False}


@dataclass(frozen=True, kw_only=True)
class Base:
    """A loaded base model."""

    model: nn.Module
    tokenizer: Any  # mlx-lm's wrapper
    config: dict[str, Any]  # config.json, with the end tokens of generation_config.json
    path: Path
    fingerprint: str
    quantization: str  # "4 bits, group 32, affine; some layers 8 bits", or "none"


def load_base(
    folder: Path,
    *,
    dequantize: bool = False,
    dtype: str | None = None,
    prepare: Callable[[nn.Module], None] = lambda model: None,
) -> Base:
    """Load a model folder, one module at a time, so that no weight is in memory twice.

    Args:
        folder: A local MLX or Hugging Face model folder, as `sources.resolve_base` returns it.
        dequantize: Unpack quantized linear layers and embeddings once, to float32. Their values stay the same.
        dtype: None leaves all numbers as mlx-lm loads them. "float32", for CPUs, converts everything to float32;
            quantized layers are then unpacked in every pass, unless `dequantize` has unpacked them. That takes least
            memory.
        prepare: Called with the model before its weights are read. It may replace layers.

    Raises:
        InputError: mlx-lm cannot load a model from this folder.
        ValueError: `dtype` is something else.
    """
    if dtype not in (None, "float32"):
        raise ValueError(f"load_base: expected dtype None or 'float32', got {dtype!r}")
    check_folder(folder)
    _check_sizes(folder)
    model, config = _load_model(folder, lazy=True)
    with ThreadPoolExecutor(1) as pool:
        tokenizer = pool.submit(load_tokenizer, folder, config)  # computes nothing with mlx
        prepare(model)
        settle(model, dequantize=dequantize, float32=dtype is not None)
    return Base(
        model=model,
        tokenizer=tokenizer.result(),
        config=config,
        path=folder,
        fingerprint=fingerprint(folder),
        quantization=describe_quantization(config),
    )


def load_to_answer(
    folder: Path,
    adapter: str | None = None,
    *,
    lazy: bool = False,
    prepare: Callable[[nn.Module], None] = lambda model: None,
) -> tuple[nn.Module, Any]:
    """Return model and tokenizer for answers, as `mlx_lm.load` does. Code in the folder is never run.

    Args:
        folder: A local model folder.
        adapter: The folder of an adapter in mlx-lm's layout.
        lazy: Leave the weights on the disk until they are used.
        prepare: Called with the model while another thread loads the tokenizer.

    Raises:
        InputError: mlx-lm cannot load a model from this folder.
    """
    check_folder(folder)
    model, config = _load_model(folder, lazy=lazy)
    with ThreadPoolExecutor(1) as pool:
        tokenizer = pool.submit(load_tokenizer, folder, config)
        if adapter is not None:
            model = mlx_lm.load_adapters(model, adapter)
            model.eval()
        prepare(model)
    return model, tokenizer.result()


def _load_model(folder: Path, *, lazy: bool) -> tuple[nn.Module, dict[str, Any]]:
    """Return mlx-lm's model of a folder, with config.json as mlx-lm has to read it, and that."""
    try:
        translated = translated_fields(folder, stated_config(folder))
        model, config = mlx_lm.load_model(folder, lazy=lazy, model_config=translated)
        return model, config
    except InputError:
        raise
    except (ValueError, LookupError, TypeError, AttributeError, ArithmeticError, NameError, RuntimeError) as error:
        if method := _packed_by(folder):
            raise InputError(
                f"{folder}: mlx-lm cannot read weights that {method} has quantized"
                "\nhint: take an MLX or GGUF copy, or the model before it was quantized"
            ) from error
        said = f"missing in config.json: {error}" if isinstance(error, KeyError) else str(error)
        raise InputError(f"{folder}: mlx-lm cannot load this model: {_shortened(said)}") from error


def _packed_by(folder: Path) -> str:
    """Return which other program has quantized a model's weights, and how; "" if none did."""
    config = read_config(folder)
    settings = config.get("quantization_config") or {}
    if config.get("quantization") or not isinstance(settings, dict) or not settings.get("quant_method"):
        return ""
    bits = settings.get("bits") or next((n for n in (4, 8) if settings.get(f"load_in_{n}bit")), None)
    return f"{settings['quant_method']}{f' ({bits} bits)' if bits else ''}"


def _shortened(text: str) -> str:
    """Return the first lines of a message that may name thousands of tensors."""
    lines = text.splitlines()
    more = f"\n  and {len(lines) - SHOWN} more lines" if len(lines) > SHOWN else ""
    return "\n".join(line[:200] for line in lines[:SHOWN]) + more


def not_finite_weight(model: nn.Module) -> str:
    """Return the name of a base's weight that holds NaN or infinity; "" if there is none. LoRA factors are left out."""
    weights = dict(tree_flatten(model.parameters()))
    for name, array in weights.items():
        if ".lora_" not in name and mx.issubdtype(array.dtype, mx.floating) and not bool(mx.isfinite(array).all()):
            return str(name)
    return ""


def _check_sizes(folder: Path) -> None:
    """Refuse a config.json that describes more blocks than the files can hold, before they are built."""
    config = read_config(folder)
    tensors = sum(len(read_header(path)[0]) for path in weight_files(folder))
    for name in ("num_hidden_layers", "n_layer", "n_layers", "num_layers"):
        blocks = config.get(name, 1)
        if not isinstance(blocks, int) or not 0 < blocks <= tensors:
            raise InputError(f"{folder}/config.json: {name}: expected 1 to {tensors} (the tensors), got {blocks!r}")


def load_tokenizer(folder: Path, config: dict[str, Any] | None = None) -> Any:
    """Return mlx-lm's tokenizer for a model folder. Code in the folder is never run.

    Its chat template is rendered under bounds.

    Raises:
        InputError: the tokenizer files cannot be read, take too much time or memory, or a token has no row in the
            embedding.
    """
    first_try.try_tokenizer(folder)
    ends = (config if config is not None else mlx_lm.load_config(folder)).get("eos_token_id")
    try:
        tokenizer = _light(folder, ends) or mlx_lm.load_tokenizer(folder, _NO_CODE, eos_token_ids=ends)
    except Exception as error:  # the tokenizers library raises plain Exception
        own_code = "trust_remote_code" in str(error)
        said = "it needs its own Python code, which we never run" if own_code else _shortened(str(error))
        raise InputError(f"{folder}: its tokenizer cannot be read: {said}") from error
    _check_vocabulary(folder, tokenizer)
    bound_template(tokenizer)
    return tokenizer


def _light(folder: Path, ends: Any) -> Any:
    """Return mlx-lm's wrapper of a tokenizer that needs no transformers; None where a folder needs it."""

    def full() -> Any:
        loaded = mlx_lm.load_tokenizer(folder, _NO_CODE, eos_token_ids=ends)
        bound_template(loaded)
        return loaded._tokenizer

    tokenizer = light_tokenizer.read(folder, full)
    if tokenizer is None or tokenizer_utils._infer_tool_parser(tokenizer) is not None:
        return None
    numbers = [ends] if isinstance(ends, int) else ends
    wrapped = TokenizerWrapper(tokenizer, tokenizer_utils.BPEStreamingDetokenizer, eos_token_ids=numbers)
    wrapped.has_chat_template = tokenizer.chat_template is not None
    return wrapped


def _check_vocabulary(folder: Path, tokenizer: Any) -> None:
    """Refuse a tokenizer with tokens that have no row in the model's embedding or head.

    mlx does not check such a number: it would read memory that belongs to something else. Rows without a token are
    padding, and fine.
    """
    rows = vocabulary_rows(folder)
    vocabulary: dict[str, int] = tokenizer.get_vocab()
    outside = sorted((number, repr(text[:40])) for text, number in vocabulary.items() if not 0 <= number < rows)
    outside += sorted((end, "an end token") for end in tokenizer.eos_token_ids if not 0 <= end < rows)
    if outside:
        named = ", ".join(f"{number} ({text})" for number, text in outside[:3]) + (", ..." if len(outside) > 3 else "")
        raise InputError(
            f"{folder}: its tokenizer does not fit its weights: expected token numbers below {rows}, the rows of the"
            f" embedding, got {named}\nhint: use the tokenizer that was saved with these weights, or save the weights"
            " again after resize_token_embeddings"
        )


def settle(model: nn.Module, *, dequantize: bool, float32: bool) -> None:
    """Read the weights of a model that was loaded lazily, module by module, so that none is in memory twice.

    Args:
        model: With or without factors attached.
        dequantize: Unpack quantized layers once, to float32.
        float32: Compute in float32. Quantized layers are unpacked in every pass, unless `dequantize` is set.
    """
    if dequantize:
        unpack.unpack_all(model)
    modules = model.named_modules()
    while modules:
        _, module = modules.pop()  # the list must not keep modules that are done
        if any(tree_flatten(module.children())):
            continue
        if float32 and type(module) in (nn.QuantizedLinear, nn.QuantizedEmbedding):
            unpack.keep_packed(module)
        if float32:
            module.update(tree_map(unpack.to_float32, module.parameters()))
        mx.eval(module.parameters())
    if float32:  # arrays that modules with children hold themselves
        model.update(tree_map(unpack.to_float32, model.parameters()))
    unpack.evaluate(model)
    model.eval()
