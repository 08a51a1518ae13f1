"""What a folder's config.json says, in the words that mlx-lm reads: it must compute the model that was saved.

transformers decides what config.json means; mlx-lm reads some fields elsewhere, has other defaults, or leaves a field
out. For the families below, what differs is translated, and refused where mlx-lm cannot compute it. Of other families
only a `rope_parameters` without layers is translated; for the rest mlx-lm's reading is taken as it is.

Source: transformers 5 (modeling_rope_utils.py, configuration_llama.py and those of the others) and mlx-lm's models.
`tests/base/test_config_translation.py` compares both.
"""

from pathlib import Path
from typing import Any

from mbf_mlx.errors import InputError

FAMILIES = ("llama", "mistral", "qwen2", "qwen3")  # their fields are known one by one
THETA = 10000.0  # transformers' default; mlx-lm's Qwen 2 has another
WINDOW = 4096  # transformers' default sliding window for Mistral
# Those that both compute alike; of longrope only one kind. transformers has no mrope for text alone: it is the default.
_ROPES = ("default", "linear", "dynamic", "llama3", "yarn", "longrope", "proportional", "mrope")
_ORIGINAL = "original_max_position_embeddings"


def translation(config: dict[str, Any], where: Path, has_head: bool) -> dict[str, Any]:
    """Return the fields of config.json that have to be other ones for mlx-lm; None takes a field away.

    Args:
        config: Its contents.
        where: The file, for messages.
        has_head: Whether the weights hold an output layer of their own.

    Raises:
        InputError: the folder describes a model that mlx-lm would compute as another one.
    """
    known = config.get("model_type") in FAMILIES
    wanted = _rope(config, where, known)
    if known:
        activation = config.get("hidden_act") or "silu"
        if activation not in ("silu", "swish"):
            raise InputError(f"{where}: hidden_act: mlx-lm computes this model with silu alone, got {activation!r}")
        if config.get("tie_word_embeddings") is None:
            wanted["tie_word_embeddings"] = not has_head
        if (window := _window(config)) is not None and window < (config.get("max_position_embeddings") or window + 1):
            # mlx-lm attends to everything. Up to the window's length that is the same, so no text may be longer.
            wanted["max_position_embeddings"] = window
    return {name: value for name, value in wanted.items() if config.get(name) != value}


def _window(config: dict[str, Any]) -> int | None:
    """Return the sliding window that transformers attends in and mlx-lm does not."""
    if config["model_type"] == "mistral" and not config.get("layer_types"):
        stated = config.get("sliding_window", WINDOW)
    elif config["model_type"] in ("qwen2", "qwen3") and config.get("use_sliding_window"):
        stated = config.get("sliding_window", WINDOW)
    else:
        return None
    return stated if isinstance(stated, int) and stated > 0 else None


def _rope(config: dict[str, Any], where: Path, known: bool) -> dict[str, Any]:
    """Return rope_theta, rope_scaling and rope_parameters as mlx-lm has to read them."""
    given, named = config.get("rope_parameters"), config.get("rope_scaling")
    if not known and not given:
        return {}
    rope = {name: value for name, value in (named or given or {}).items() if value is not None}
    if any(isinstance(value, dict) for value in rope.values()):
        if known:
            raise InputError(
                f"{where}: rope_parameters: mlx-lm has one rotary embedding for all layers of this model, got one for"
                " each kind of layer"
            )
        return {}  # mlx-lm's models that have several read it themselves
    if named and given and _meaning(named, config) != _meaning(given, config):
        raise InputError(
            f"{where}: rope_scaling and rope_parameters contradict each other\nhint: remove the one that is wrong"
        )
    kind, theta = (
        rope.get("rope_type") or rope.get("type") or "default",
        rope.get("rope_theta", config.get("rope_theta")),
    )
    if known:
        _check_rope(rope, kind, config, where)
        theta = THETA if theta is None else theta
    scaling = {name: value for name, value in rope.items() if name not in ("rope_theta", "type")} | {"rope_type": kind}
    if kind in ("llama3", "yarn", "longrope"):
        original = config.get(_ORIGINAL) or rope.get(_ORIGINAL) or config.get("max_position_embeddings")
        scaling |= {} if original is None else {_ORIGINAL: original}
    wanted: dict[str, Any] = {} if theta is None else {"rope_theta": theta}
    plain = kind == "default"
    if given:
        wanted["rope_parameters"] = {**given, **wanted} if plain else {**scaling, **wanted}
    if (factor := rope.get("partial_rotary_factor")) is not None and not known:
        wanted["partial_rotary_factor"] = factor
    if plain and not named:
        return wanted
    if not plain and {**(named or {}), "type": None} == {**scaling, "type": None}:
        return wanted  # as mlx-lm reads it
    return wanted | {"rope_scaling": None if plain else scaling}


def _meaning(rope: dict[str, Any], config: dict[str, Any]) -> dict[str, Any]:
    """Return a rotary embedding's settings without what only repeats config.json."""
    own = {name: value for name, value in rope.items() if value is not None and name != "type"}
    defaults = {"rope_theta": config.get("rope_theta"), "rope_type": rope.get("type") or "default"}
    return {**defaults, **own}


def _check_rope(rope: dict[str, Any], kind: str, config: dict[str, Any], where: Path) -> None:
    """Refuse what mlx-lm computes in another way."""
    if kind not in _ROPES:
        raise InputError(f"{where}: rope_type: expected one of {', '.join(_ROPES)}, got {kind!r}")
    if kind != "proportional" and rope.get("partial_rotary_factor", config.get("partial_rotary_factor") or 1) != 1:
        raise InputError(f"{where}: partial_rotary_factor: mlx-lm turns whole heads of this model, expected 1")
    if kind == "yarn" and rope.get("truncate", True) is not True:
        raise InputError(f"{where}: rope_parameters: truncate: mlx-lm always truncates, got false")
    if kind == "longrope" and rope.get("short_factor") != rope.get("long_factor"):
        raise InputError(
            f"{where}: rope_parameters: mlx-lm takes long_factor for every text; expected short_factor to be the same"
        )
    factor, original, longest = rope.get("factor"), rope.get(_ORIGINAL), config.get("max_position_embeddings")
    if kind == "longrope" and factor and original and longest and factor * original != longest:
        raise InputError(
            f"{where}: rope_parameters: factor: mlx-lm divides max_position_embeddings by {_ORIGINAL}; expected"
            f" {longest / original:g}, got {factor!r}"
        )
    if kind in ("yarn", "longrope") and rope.get("attention_factor") is not None:
        raise InputError(f"{where}: rope_parameters: attention_factor: mlx-lm does not read it; it has its own formula")
    theta = rope.get("rope_theta")
    if theta is not None and (isinstance(theta, bool) or not isinstance(theta, (int, float)) or not theta > 0):
        raise InputError(f"{where}: rope_parameters: rope_theta: expected a number above 0, got {theta!r}")
    needs = {"linear": ("factor",), "dynamic": ("factor",), "yarn": ("factor",), "llama3": ("factor",)}.get(kind, ())
    for name in needs:
        value = rope.get(name)
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not value > 0:
            raise InputError(f"{where}: rope scaling: {name}: expected a number above 0, got {value!r}")
