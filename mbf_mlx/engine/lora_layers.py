"""The LoRA layers of a model: attach them, read and write their factors."""

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx.utils import tree_unflatten
from mlx_lm.tuner.lora import LoRALinear

from mbf_mlx.base import unpack
from mbf_mlx.config import LoRAConfig
from mbf_mlx.errors import InputError
from mbf_mlx.methods import Factors, Layers, Pair

LINEAR = (nn.Linear, nn.QuantizedLinear, unpack.UnpackingLinear)  # what can get factors


_PROBE_TOKENS = 8  # of the row on which `effect` compares logits


def attach(model: nn.Module, config: LoRAConfig) -> Layers:
    """Put LoRA factors beside linear layers and freeze everything else; A is random, B zero, both float32.

    Args:
        model: A model of mlx-lm's without factors.
        config: Which layers, and how large.

    Returns:
        The (out, in) of every layer that got factors, by its path in the model, first block first.

    Raises:
        InputError: keys that name no layer, layers that cannot get factors, more blocks or rows of A than fit.
    """
    chosen = find_layers(model, config)
    config.check_rank({name: (0, _inputs(module)) for name, module in chosen.items()})  # before they are made
    model.freeze()
    adapted = {
        name: LoRALinear.from_base(module, r=config.rank, dropout=config.dropout, scale=config.scale)
        for name, module in chosen.items()
    }
    model.update_modules(tree_unflatten(list(adapted.items())))
    mx.eval(model.trainable_parameters())
    model.eval()
    return {name: (layer.lora_b.shape[1], layer.lora_a.shape[0]) for name, layer in adapted.items()}


def _inputs(layer: nn.Module) -> int:
    """Return how many inputs a linear layer has, packed or not."""
    stored = int(layer.weight.shape[-1])
    return stored * 32 // layer.bits if "scales" in layer else stored


def find_layers(model: nn.Module, config: LoRAConfig) -> dict[str, nn.Module]:
    """Return the linear layers that `config` chooses, by their path in the model, first block first.

    A key is a layer's own name, "q_proj", or its path inside a block, "self_attn.q_proj".
    """
    blocks = _blocks(model)
    if config.num_layers > len(blocks):
        raise InputError(f"num_layers: expected at most the model's {len(blocks)} blocks, got {config.num_layers}")
    if config.num_layers > 0:
        blocks = dict(list(blocks.items())[-config.num_layers :])
    found: dict[str, nn.Module] = {}
    used, available, refused = set(), set(), {}
    for block, layer in blocks.items():
        for path, module in reversed(layer.named_modules()):
            if "weight" not in module or module.weight.ndim < 2:
                continue
            fits = type(module) in LINEAR
            available |= {path} if fits else set()
            matching = [key for key in config.keys if path == key or path.endswith(f".{key}")]
            used |= set(matching)
            if matching and fits:
                found[f"{block}.{path}"] = module
            elif matching:
                refused[path] = type(module).__name__
    if refused:
        names = [f"  {path}: {kind}" for path, kind in sorted(refused.items())]
        raise InputError(
            "only ordinary linear layers can get factors, not mixtures of experts or other kinds:\n" + "\n".join(names)
        )
    unknown = [key for key in config.keys if key not in used]
    if unknown:
        raise InputError(_unknown_keys(model, unknown, available))
    return found


def _blocks(model: nn.Module) -> dict[str, nn.Module]:
    """Return the transformer blocks by their path in the model."""
    layers = getattr(model, "layers", None)
    if not isinstance(layers, list) or not layers:
        raise InputError(f"{type(model).__module__}: this architecture has no list of blocks; cannot attach factors")
    paths = {id(module): path for path, module in model.named_modules()}
    return {paths[id(layer)]: layer for layer in layers}


def _unknown_keys(model: nn.Module, unknown: list[str], available: set[str]) -> str:
    outside = {path.rpartition(".")[2]: path for path, module in model.named_modules() if "weight" in module}
    message = f"keys: no layer called {', '.join(unknown)}; expected of {', '.join(sorted(available))}"
    for key in unknown:
        if (leaf := key.rpartition(".")[2]) in outside and outside[leaf].rpartition(".")[2] not in {
            path.rpartition(".")[2] for path in available
        }:
            message += f"\nhint: {outside[leaf]} lies outside the blocks; embeddings and heads cannot get factors yet"
    return message


def lora_layers(model: nn.Module) -> dict[str, LoRALinear]:
    """Return the layers with factors, by their path in the model, first block first."""
    return {name: module for name, module in _in_order(model) if isinstance(module, LoRALinear)}


def _in_order(model: nn.Module) -> list[tuple[str, nn.Module]]:
    return [
        (f"{block}.{path}", module)
        for block, layer in _blocks(model).items()
        for path, module in reversed(layer.named_modules())
    ]


def read_factors(model: nn.Module) -> Factors:
    """Return copies of all factors: A (rank, in) and B (out, rank), NumPy float32."""
    layers = lora_layers(model)
    mx.eval([(layer.lora_a, layer.lora_b) for layer in layers.values()])
    return {
        name: Pair(np.ascontiguousarray(np.array(layer.lora_a).T), np.ascontiguousarray(np.array(layer.lora_b).T))
        for name, layer in layers.items()
    }


def write_factors(model: nn.Module, factors: Factors) -> None:
    """Set all factors of a model.

    Args:
        model: With factors attached.
        factors: A (k, in) and B (out, k) of NumPy or MLX, of any rank, for exactly the layers that have them.

    Raises:
        InputError: layers that are missing, unknown or of another shape; all are named.
    """
    layers = lora_layers(model)
    problems = [f"  {name}: missing" for name in layers if name not in factors]
    problems += [f"  {name}: the model has no factors there" for name in factors if name not in layers]
    for name, pair in factors.items():
        if name in layers:
            rank, shapes = pair.b.shape[-1], (layers[name].lora_a.shape[0], layers[name].lora_b.shape[1])
            for letter, value, expected in (("A", pair.a, (rank, shapes[0])), ("B", pair.b, (shapes[1], rank))):
                if tuple(value.shape) != expected:
                    problems.append(f"  {name}: expected {letter} of shape {expected}, got {tuple(value.shape)}")
    if problems:
        raise InputError("the factors do not fit the model:\n" + "\n".join(problems))
    for name, pair in factors.items():
        layers[name].lora_a = mx.contiguous(mx.array(pair.a).astype(mx.float32).T)
        layers[name].lora_b = mx.contiguous(mx.array(pair.b).astype(mx.float32).T)
    mx.eval([(layer.lora_a, layer.lora_b) for layer in layers.values()])


def effect(model: nn.Module) -> float:
    """Return the largest difference that the factors make to any logit of a short row; 0 where they do nothing."""
    layers = lora_layers(model)
    tokens = mx.arange(1, 1 + _PROBE_TOKENS)[None]
    with_factors = model(tokens)
    kept = {name: layer.lora_b for name, layer in layers.items()}
    try:
        for layer in layers.values():
            layer.lora_b = mx.zeros_like(layer.lora_b)
        difference = mx.abs(with_factors.astype(mx.float32) - model(tokens).astype(mx.float32)).max()
        return float(np.array(difference))
    finally:
        for name, layer in layers.items():
            layer.lora_b = kept[name]
