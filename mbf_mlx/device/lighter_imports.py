"""Imports mlx-lm without transformers, for the command line: that is two of the six seconds to a first token.

mlx-lm takes four names from transformers when it is imported, and uses them only where it loads a tokenizer itself.
Here it is imported with stand-ins for them. The real names take their place when mlx-lm first loads a tokenizer, or
when `complete` is called. transformers in turn imports torch wherever it is installed, which takes longer than all else
and computes nothing of ours: it is imported as if there were none.

A program that uses this package as a library sees no change: only the command line calls `allow`.
"""

import importlib
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from types import ModuleType
from typing import Any

_CLASSES = ("PreTrainedTokenizer", "PreTrainedTokenizerBase", "PreTrainedTokenizerFast")
_PLACES = ("transformers", "transformers.tokenization_utils_base")  # modules that mlx-lm names
_PACKAGES = ("mlx_lm", "mlx_lm.tuner")  # importing these imports all modules that take names from transformers

_allowed = False
_later: "_Later | None" = None  # in the place of AutoTokenizer, until the real one is there


class _Later:
    """In the place of AutoTokenizer: it keeps what is registered, and becomes the real one when it is used."""

    def __init__(self) -> None:
        self.registered: list[tuple[tuple[Any, ...], dict[str, Any]]] = []

    def register(self, *args: Any, **named: Any) -> None:
        self.registered.append((args, named))

    def from_pretrained(self, *args: Any, **named: Any) -> Any:
        complete()
        return importlib.import_module("transformers").AutoTokenizer.from_pretrained(*args, **named)


def allow() -> None:
    """Let `import_mlx_lm` leave out transformers and torch in this process."""
    global _allowed
    _allowed = True


def import_mlx_lm() -> None:
    """Import mlx-lm: without transformers if that is allowed and nobody has imported either before."""
    global _later
    if not _allowed or "mlx_lm" in sys.modules or "transformers" in sys.modules:
        return
    later = _Later()
    names: dict[str, Any] = {name: type(name, (), {"apply_chat_template": None}) for name in _CLASSES}
    try:
        with _standing_in(names | {"AutoTokenizer": later}):
            for package in _PACKAGES:
                importlib.import_module(package)
    except ImportError:  # another mlx-lm, which takes other names: it is imported as it comes
        for name in [each for each in sys.modules if each.partition(".")[0] == "mlx_lm"]:
            del sys.modules[name]
        return
    _later = later


def complete() -> None:
    """Give mlx-lm the real names, if it has stand-ins."""
    global _later
    if (later := _later) is None:
        return
    _later = None
    with _no_torch():
        real = importlib.import_module("transformers")
        found = {name: getattr(real, name) for name in (*_CLASSES, "AutoTokenizer")}
    for name, module in list(sys.modules.items()):
        if name.partition(".")[0] == "mlx_lm":
            vars(module).update({key: found[key] for key in found.keys() & vars(module).keys()})
    for (kind, *others), named in later.registered:  # mlx-lm's own kinds of tokenizers
        kind.__bases__ = (found["PreTrainedTokenizerFast"],)
        found["AutoTokenizer"].register(kind, *others, **named)


def _snapshot_download(*args: Any, **named: Any) -> Any:
    """In the place of the hub's function, which mlx-lm calls for a model that is not on this machine."""
    return importlib.import_module("huggingface_hub").snapshot_download(*args, **named)


@contextmanager
def _standing_in(names: dict[str, Any]) -> Iterator[None]:
    import huggingface_hub as hub  # by itself it imports what is used of it, so this is quick

    vars(hub).setdefault("snapshot_download", _snapshot_download)
    for place in _PLACES:
        sys.modules[place] = module = ModuleType(place)
        module.__path__ = []  # it has modules in it
        vars(module).update(names)
    try:
        yield
    finally:
        for place in _PLACES:
            del sys.modules[place]
        if vars(hub).get("snapshot_download") is _snapshot_download:
            del vars(hub)["snapshot_download"]


@contextmanager
def _no_torch() -> Iterator[None]:
    """While this lasts torch cannot be imported, nor found, unless it is there already."""
    if "torch" in sys.modules or "transformers" in sys.modules:
        yield
        return
    sys.modules["torch"] = None  # type: ignore[assignment]  # importlib's own way to say that there is none
    try:
        yield
    finally:
        with suppress(KeyError):
            del sys.modules["torch"]
