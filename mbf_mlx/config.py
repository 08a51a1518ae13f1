"""Settings: frozen, checked when made, and the only place where defaults are written."""

import datetime
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import Literal

from mbf_mlx.errors import InputError

TEMPLATES = ("chat", "none")
PRECISIONS = ("auto", "float32", "bfloat16")
Precision = Literal["float32", "bfloat16"]  # of the products with frozen weights

SAMPLE_ROWS = 16  # training rows whose loss is compared before and after a task


def _check(config: object, name: str, fits: bool, expected: str) -> None:
    if not fits:
        raise InputError(f"{type(config).__name__}.{name}: expected {expected}, got {getattr(config, name)!r}")


def _is_number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def _is_date(value: object) -> bool:
    try:
        return isinstance(value, str) and datetime.date.fromisoformat(value).isoformat() == value
    except ValueError:
        return False


def _is_count(value: object, least: int) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= least


@dataclass(frozen=True, kw_only=True)
class LoRAConfig:
    """Which layers get factors and how large they are; fixed for the life of a stream."""

    rank: int = 8  # rows of A, columns of B
    scale: float = 2.0  # delta = scale * B @ A; PEFT's lora_alpha is scale * rank
    keys: tuple[str, ...] = ("q_proj", "v_proj")  # names of linear layers, or their paths inside a block
    num_layers: int = -1  # blocks counted from the last; -1 is all of them
    dropout: float = 0.0  # share of the LoRA inputs that training drops

    def __post_init__(self) -> None:
        _check(self, "rank", _is_count(self.rank, 1), "a whole number of at least 1")
        _check(self, "scale", _is_number(self.scale) and self.scale > 0, "a number above 0")
        object.__setattr__(self, "keys", tuple(self.keys))
        _check(self, "keys", bool(self.keys) and all(isinstance(k, str) and k for k in self.keys), "names of layers")
        _check(self, "num_layers", self.num_layers == -1 or _is_count(self.num_layers, 1), "-1 or at least 1")
        _check(self, "dropout", _is_number(self.dropout) and 0 <= self.dropout < 1, "a number in [0, 1)")

    def check_rank(self, layers: Mapping[str, tuple[int, int]]) -> None:
        """Raise InputError if a layer has fewer inputs than A has rows, which have to be orthonormal.

        Args:
            layers: The (out, in) of each layer by name.
        """
        smallest = min(layers, key=lambda name: layers[name][1])
        if self.rank > layers[smallest][1]:
            raise InputError(
                f"LoRAConfig.rank: expected at most {layers[smallest][1]}, the inputs of {smallest}, got {self.rank}"
            )


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """How rows become tokens. The template is fixed for the life of a stream, the rest may change with each task."""

    template: str = "chat"  # "chat": the model's own template, if it has one; "none": raw prompt and completion
    mask_prompt: bool = True  # supervise completions only, not prompts
    max_seq_length: int = 2048  # tokens of a row: prompt and completion together
    date: str = ""  # the day, as 2026-12-01, that a chat template writes into prompts; "" is today

    def __post_init__(self) -> None:
        _check(self, "template", self.template in TEMPLATES, " or ".join(TEMPLATES))
        _check(self, "mask_prompt", isinstance(self.mask_prompt, bool), "true or false")
        _check(self, "max_seq_length", _is_count(self.max_seq_length, 8), "a whole number of at least 8 tokens")
        _check(self, "date", not self.date or _is_date(self.date), "a day as in 2026-12-01")


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """How one task is trained; it may change with each task."""

    epochs: int = 3  # passes over the training rows; not used if iters is given
    iters: int | None = None  # optimizer steps
    batch_size: int = 8  # rows in one forward and backward pass
    grad_accumulation_steps: int = 1  # passes for one optimizer step
    learning_rate: float = 5e-4  # the peak
    warmup: float = 0.1  # share of the steps in which the rate rises to its peak
    weight_decay: float = 0.0
    max_grad_norm: float = 1.0  # gradients longer than this are shortened to it; 0 leaves them
    grad_checkpoint: bool = False  # recompute a block's activations in the backward pass instead of keeping them
    val_every: int = 0  # steps between two validations; 0 means once an epoch
    patience: int = 0  # stop after so many validations without a better loss; 0 never stops early
    seed: int = 0
    precision: str = "auto"  # of the products with frozen weights on a CPU; "auto" is what is faster here
    save_every: str = "60s"  # how often to save the run: "200" means steps, "60s" seconds, "0" never

    def __post_init__(self) -> None:
        for name in ("epochs", "batch_size", "grad_accumulation_steps"):
            _check(self, name, _is_count(getattr(self, name), 1), "a whole number of at least 1")
        _check(self, "seed", _is_count(self.seed, 0) and self.seed < 1 << 32, "a whole number from 0 to 4,294,967,295")
        for name in ("val_every", "patience"):
            _check(self, name, _is_count(getattr(self, name), 0), "a whole number of at least 0")
        _check(self, "iters", self.iters is None or _is_count(self.iters, 1), "a whole number of at least 1")
        _check(self, "learning_rate", _is_number(self.learning_rate) and self.learning_rate > 0, "a number above 0")
        _check(self, "warmup", _is_number(self.warmup) and 0 <= self.warmup < 1, "a share of the steps in [0, 1)")
        for name in ("weight_decay", "max_grad_norm"):
            value = getattr(self, name)
            _check(self, name, _is_number(value) and value >= 0, "a number of at least 0")
        _check(self, "grad_checkpoint", isinstance(self.grad_checkpoint, bool), "true or false")
        _check(self, "precision", self.precision in PRECISIONS, "auto, float32 or bfloat16")
        digits = self.save_every.removesuffix("s")
        _check(self, "save_every", digits.isascii() and digits.isdigit(), "steps as in 200 or seconds as in 60s")

    @property
    def save_steps(self) -> int | None:
        """Steps between two saves, or None if saves are counted in seconds or off."""
        return None if self.save_every.endswith("s") else int(self.save_every) or None

    @property
    def save_seconds(self) -> int | None:
        """Seconds between two saves, or None if saves are counted in steps or off."""
        return int(self.save_every[:-1]) or None if self.save_every.endswith("s") else None


@dataclass(frozen=True, kw_only=True)
class LearnConfig:
    """How tasks are learned into a stream, apart from what the stream fixes."""

    train: TrainConfig = field(default_factory=TrainConfig)
    data: DataConfig = field(default_factory=DataConfig)
    score_tasks: int = 0  # score so many of the newest tasks after each task; 0 is what `spans_to_score` says
    score_rows: int = 0  # score a task on so many of its first test rows, now and later; 0 means all
    again: bool = False  # learn a task again that the stream already has
    restart: bool = False  # drop the save of an interrupted run
    throttle: float = 0.0  # seconds of rest after each optimizer step, for a machine that gets hot
    guard: bool = True  # stop a run if its loss explodes
    memory_limit: int = 0  # bytes that the process may hold; 0 means four fifths of what is available

    def __post_init__(self) -> None:
        for name in ("score_tasks", "score_rows"):
            _check(self, name, _is_count(getattr(self, name), 0), "a whole number of at least 0 (all)")
        _check(self, "throttle", _is_number(self.throttle) and self.throttle >= 0, "seconds, at least 0")
        _check(self, "memory_limit", _is_count(self.memory_limit, 0), "bytes, or 0")


@dataclass(frozen=True, kw_only=True)
class ServeConfig:
    """Where a server listens and how much it accepts; names and defaults are mlx_lm.server's, if it has them."""

    host: str = "127.0.0.1"
    port: int = 8080  # 0 means any free port
    max_tokens: int = 512  # of an answer, if the request does not say
    temp: float = 0.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    max_request_bytes: int = 4_000_000  # mlx-lm itself has no limit
    decode_concurrency: int = 32  # answers written at the same time
    prompt_concurrency: int = 8  # prompts read at the same time
    prefill_step_size: int = 2048  # tokens of a prompt read at once
    prompt_cache_size: int = 10  # conversations remembered
    prompt_cache_bytes: int | None = None  # how much memory they may take
    allowed_origins: tuple[str, ...] = ()  # web pages that may send requests; mlx-lm's default is all
    allow_host: tuple[str, ...] = ()  # other names than its address that the server answers to
    api_key: str | None = field(default=None, repr=False)  # what a request must bring; None lets everybody in
    no_key: bool = False  # let everybody in, also where other machines reach the server
    max_seconds: int = 600  # of an answer, with the time that it waits
    max_connections: int = 128  # open at the same time

    def __post_init__(self) -> None:
        counts = ["max_tokens", "max_request_bytes", "decode_concurrency", "prompt_concurrency", "prefill_step_size"]
        for name in [*counts, "max_seconds", "max_connections", "prompt_cache_size", "prompt_cache_bytes"]:
            value = getattr(self, name)
            unset = value is None and name == "prompt_cache_bytes"
            _check(self, name, unset or _is_count(value, 1), "a whole number of at least 1")
        _check(self, "port", _is_count(self.port, 0) and self.port < 1 << 16, "0 to 65535")
        _check(self, "temp", _is_number(self.temp) and self.temp >= 0, "a number of at least 0")
        _check(self, "top_k", _is_count(self.top_k, 0), "a whole number of at least 0")
        for name in ("top_p", "min_p"):
            value = getattr(self, name)
            _check(self, name, _is_number(value) and 0 <= value <= 1, "a number in [0, 1]")
        for name in ("allowed_origins", "allow_host"):
            object.__setattr__(self, name, tuple(getattr(self, name)))
        for origin in self.allowed_origins:
            fits = re.fullmatch(r"\*|null|[a-z][a-z0-9+.-]*://[^/\s]+/?", origin.lower())
            _check(self, "allowed_origins", fits is not None, "origins such as https://app.example:8443, or *")
        for name in self.allow_host:
            fits = re.fullmatch(r"[A-Za-z0-9_.-]+|\[?[0-9A-Fa-f:.]+\]?", name)
            _check(self, "allow_host", fits is not None, "names or addresses, without a port")
        if self.api_key is not None and not (self.api_key and all("!" <= letter <= "~" for letter in self.api_key)):
            raise InputError("ServeConfig.api_key: expected letters, digits and signs of ASCII without a space")
        if self.api_key is not None and self.no_key:
            raise InputError("ServeConfig.no_key: expected a key or --no-key, got both")


def settings_of(config: LoRAConfig | DataConfig | TrainConfig) -> dict[str, object]:
    """Return settings by name, as values that JSON can hold."""
    values = {each.name: getattr(config, each.name) for each in fields(config)}
    if not values.get("date"):  # most templates write none
        values.pop("date", None)
    if values.get("precision") != "bfloat16":  # what settings of before said nothing of
        values.pop("precision", None)
    return {name: list(value) if isinstance(value, tuple) else value for name, value in values.items()}
