"""The LoRA layers of a model: attach them, find them, read and write their factors.

Shapes: our A is (rank, in) and our B (out, rank). mlx-lm stores the transposes, `lora_a` (in, rank) and `lora_b`
(rank, out). Factors are transposed here, in adapters/mlx_lm.py and in learning/tuning.py, and nowhere else. The layers
are mlx-lm's own LoRALinear, so that what is trained is what mlx-lm loads.

A layer goes by its path in the model, "model.layers.0.self_attn.q_proj".
"""

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx.utils import tree_flatten, tree_unflatten
from mlx_lm.tuner.lora import LoRALinear

from mbf_mlx.base import unpack
from mbf_mlx.config import LoRAConfig
from mbf_mlx.errors import InputError
from mbf_mlx.methods import Factors, Layers, Pair

LINEAR = (nn.Linear, nn.QuantizedLinear, unpack.UnpackingLinear)  # layers of these types can get factors


def attach(model: nn.Module, config: LoRAConfig) -> Layers:
    """Put LoRA factors beside linear layers and freeze everything else; A is random, B zero, both float32.

    Args:
        model: A model as mlx-lm loads it, without factors.
        config: Which layers get factors, and of which rank.

    Returns:
        The (out, in) of every layer that got factors, by its path, first block first.

    Raises:
        InputError: a key names no layer, or a layer that cannot get factors; the model has fewer blocks than
            num_layers, or a layer fewer inputs than the rank.
    """
    chosen = find_layers(model, config)
    config.check_rank({name: (0, in_dims(module)) for name, module in chosen.items()})  # before they are made
    model.freeze()
    adapted = {
        name: LoRALinear.from_base(module, r=config.rank, dropout=config.dropout, scale=config.scale)
        for name, module in chosen.items()
    }
    model.update_modules(tree_unflatten(list(adapted.items())))
    mx.eval(model.trainable_parameters())
    model.eval()
    return {name: (layer.lora_b.shape[1], layer.lora_a.shape[0]) for name, layer in adapted.items()}


def in_dims(layer: nn.Module) -> int:
    """Return how many inputs a linear layer has, also if its weight is packed."""
    stored = int(layer.weight.shape[-1])
    return stored * 32 // int(layer.bits) if "scales" in layer else stored


def find_layers(model: nn.Module, config: LoRAConfig) -> dict[str, nn.Module]:
    """Return the linear layers that `config` chooses, by their path, first block first.

    A key is a layer's own name, "q_proj", or its path inside a block, "self_attn.q_proj".

    Raises:
        InputError: as `attach` says, but for the rank.
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
    """Return the layers with factors, by their path, first block first."""
    return {
        f"{block}.{path}": module
        for block, layer in _blocks(model).items()
        for path, module in reversed(layer.named_modules())
        if isinstance(module, LoRALinear)
    }


def trained_arrays(module: nn.Module) -> dict[str, mx.array]:
    """Return the arrays of a module that train, by mlx's names: "model.layers.0.self_attn.q_proj.lora_a"."""
    return dict(tree_flatten(module.trainable_parameters()))


def read_factors(model: nn.Module) -> Factors:
    """Return copies of all factors by layer: A (rank, in) and B (out, rank), NumPy float32."""
    layers = lora_layers(model)
    mx.eval([(layer.lora_a, layer.lora_b) for layer in layers.values()])
    return {
        name: Pair(np.ascontiguousarray(np.array(layer.lora_a).T), np.ascontiguousarray(np.array(layer.lora_b).T))
        for name, layer in layers.items()
    }


def write_factors(model: nn.Module, factors: Factors) -> None:
    """Set all factors of a model.

    Args:
        model: A model with factors attached.
        factors: A (k, in) and B (out, k) for exactly the layers that have factors, NumPy or MLX, of any rank k.

    Raises:
        InputError: layers are missing, unknown or of another shape; the message names all of them.
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
