"""A stream's state as the files of a generation, and back: the deployed adapter, and what only the next task needs.

In `state.safetensors` a tensor is called `<layer>.<name>`. generations.py writes the files and checks their bytes.
"""

from dataclasses import replace
from pathlib import Path
from typing import Any

from mbf_mlx.adapters import mlx_lm as adapter
from mbf_mlx.files.safetensors_file import safetensors_bytes
from mbf_mlx.files.storage import Data
from mbf_mlx.methods import State, empty_state
from mbf_mlx.stream.records import STATE, Identity


def empty(identity: Identity, seed: int) -> State:
    """Return the state of a stream that has learned nothing."""
    return empty_state(dict(identity.layers), identity.rank, seed)


def contents(state: State, identity: Identity) -> dict[str, Data]:
    """Return the files that hold a state, by their path in a generation. The same state always gives the same bytes."""
    kept = {f"{layer}.{name}": tensor for name, tensors in state.kept.items() for layer, tensor in tensors.items()}
    files: dict[str, Data] = {STATE: safetensors_bytes(kept)}
    if state.t:
        named = adapter.adapter_files(
            state.deployed,
            scale=identity.scale,
            num_layers=identity.num_layers,
            base=identity.base.name,
            extra={"base_fingerprint": identity.base.fingerprint, "method": identity.method, "tasks": state.t},
        )
        files |= {f"adapter/{name}": data for name, data in named.items()}
    return files


def read(
    identity: Identity, t: int, seed: int, weights: tuple[memoryview, Path], kept: tuple[memoryview, Path]
) -> State:
    """Return the state that the files of a generation hold.

    Args:
        identity: The stream's identity.
        t: How many tasks it has learned.
        seed: The stream's seed.
        weights: The bytes of adapters.safetensors, and the file's path for messages.
        kept: The bytes of state.safetensors, and its path.

    Raises:
        InputError: these are not such files.
    """
    factors = adapter.pair_up(adapter.decode_tensors(*weights), weights[1])
    tensors: dict[str, dict[str, Any]] = {}
    for key, tensor in adapter.decode_tensors(*kept, integers=True).items():
        layer, _, name = key.rpartition(".")
        tensors.setdefault(name, {})[layer] = tensor
    deployed = {name: factors[name] for name in identity.layers}
    return replace(empty(identity, seed), t=t, deployed=deployed, kept=tensors)
