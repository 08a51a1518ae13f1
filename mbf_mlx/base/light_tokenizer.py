"""A tokenizer on the package tokenizers alone, where a model folder's files need nothing else: it is there at once.

transformers reads the same file with the same package. What it adds for other models are rules about their settings,
and importing it takes a second or two. So `read` looks at what a folder's settings hold. It takes byte-level BPE of a
Llama whose special tokens are all in tokenizer.json, and leaves all others to transformers. Even here, what is asked
more rarely (tools, documents, padding) is asked of transformers' own tokenizer, which is loaded then.
"""

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from mbf_mlx.base.renderer import renderer
from mbf_mlx.files.documents import read_object

_NAMED = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")
_CLASSES = ("PreTrainedTokenizerFast", "TokenizersBackend")  # those that take tokenizer.json as it is
# What tokenizer_config.json may say. The last four change nothing here: BPE is never cleaned up, nothing is cut.
_KNOWN = {*_NAMED, "chat_template", "tokenizer_class", "added_tokens_decoder"} | {
    *("clean_up_tokenization_spaces", "model_max_length", "model_input_names", "backend")
}
# Files by which transformers would change what tokenizer.json says, or that hold further templates.
_OTHER_FILES = ("added_tokens.json", "special_tokens_map.json", "additional_chat_templates", "chat_template.json")


def read(folder: Path, full: Callable[[], Any]) -> "LightTokenizer | None":
    """Return a folder's tokenizer; None where transformers has to read it.

    Args:
        folder: A local model folder.
        full: Loads transformers' tokenizer of the folder.
    """
    from tokenizers import Tokenizer

    try:
        if read_object(folder / "config.json").get("model_type") != "llama":
            return None
        settings = read_object(folder / "tokenizer_config.json")
        if any((folder / name).exists() for name in _OTHER_FILES) or not _plain(settings):
            return None
        if (template := folder / "chat_template.jinja").exists():
            settings["chat_template"] = template.read_text(encoding="utf-8")
        backend = Tokenizer.from_file(str(folder / "tokenizer.json"))
    except Exception:  # the tokenizers library raises plain Exception; transformers says it better
        return None
    return LightTokenizer(backend, settings, full) if _all_in(backend, settings) else None


def _plain(settings: Mapping[str, Any]) -> bool:
    """Return whether tokenizer_config.json says nothing that we do not know."""
    texts = all(isinstance(settings.get(name) or "", str) for name in (*_NAMED, "chat_template"))
    return texts and settings.get("tokenizer_class") in _CLASSES and settings.keys() <= _KNOWN


def _all_in(backend: Any, settings: Mapping[str, Any]) -> bool:
    """Return whether tokenizer.json alone decides what a text's tokens are."""
    if type(backend.model).__name__ != "BPE" or type(backend.decoder).__name__ != "ByteLevel":
        return False
    if backend.truncation is not None or backend.padding is not None:
        return False
    added = {token.content: (number, token) for number, token in backend.get_added_tokens_decoder().items()}
    for name in filter(settings.get, _NAMED):
        _, token = added.get(settings[name], (0, None))
        if token is None or not token.special or token.normalized or token.lstrip or token.rstrip or token.single_word:
            return False
    return all(
        each.get("content") in added
        and str(added[each["content"]][0]) == number
        and all(getattr(added[each["content"]][1], key, None) == value for key, value in each.items())
        for number, each in (settings.get("added_tokens_decoder") or {}).items()
    )


class LightTokenizer:
    """Answers what transformers' tokenizer of the same files would answer; what it cannot, it asks that one.

    Args:
        backend: `tokenizers.Tokenizer`.
        settings: tokenizer_config.json.
        full: Loads transformers' tokenizer.
    """

    def __init__(self, backend: Any, settings: dict[str, Any], full: Callable[[], Any]) -> None:
        self._backend, self._load, self._loaded = backend, full, None
        self._vocabulary: dict[str, int] | None = None
        self.init_kwargs = settings
        self.chat_template = settings.get("chat_template")
        self.special_tokens_map = {name: settings[name] for name in _NAMED if settings.get(name) is not None}
        for name in _NAMED:
            text = settings.get(name)
            setattr(self, name, text)
            setattr(self, f"{name}_id", None if text is None else backend.token_to_id(text))

    def __call__(
        self,
        text: str | Sequence[str],
        *,
        add_special_tokens: bool = True,
        return_attention_mask: bool = True,
        return_offsets_mapping: bool = False,
        verbose: bool = True,
        **more: Any,
    ) -> Any:
        """Return the tokens of one text or of several, as "input_ids", with their places as "offset_mapping"."""
        texts = [text] if isinstance(text, str) else text
        if more or not all(isinstance(each, str) for each in texts) or not texts:
            more |= {"add_special_tokens": add_special_tokens, "return_offsets_mapping": return_offsets_mapping}
            return self._full()(text, return_attention_mask=return_attention_mask, verbose=verbose, **more)
        found = self._backend.encode_batch(texts, add_special_tokens=add_special_tokens)
        answer = {"input_ids": [each.ids for each in found]}
        if return_attention_mask:
            answer["attention_mask"] = [each.attention_mask for each in found]
        if return_offsets_mapping:
            answer["offset_mapping"] = [each.offsets for each in found]
        return {key: value[0] for key, value in answer.items()} if isinstance(text, str) else answer

    def __len__(self) -> int:
        return int(self._backend.get_vocab_size(with_added_tokens=True))

    def encode(self, text: str, text_pair: Any = None, add_special_tokens: bool = True, **more: Any) -> list[int]:
        """Return the tokens of a text."""
        if more or text_pair is not None or not isinstance(text, str):
            return list(self._full().encode(text, text_pair, add_special_tokens=add_special_tokens, **more))
        return list(self._backend.encode(text, add_special_tokens=add_special_tokens).ids)

    def decode(self, token_ids: Any, skip_special_tokens: bool = False, **more: Any) -> Any:
        """Return the text of tokens. BPE is never cleaned up."""
        more.pop("clean_up_tokenization_spaces", None)
        numbers = [token_ids] if isinstance(token_ids, int) else token_ids
        if more or not isinstance(numbers, list) or not all(isinstance(each, int) for each in numbers):
            return self._full().decode(token_ids, skip_special_tokens=skip_special_tokens, **more)
        return self._backend.decode(numbers, skip_special_tokens=skip_special_tokens)

    def get_vocab(self) -> dict[str, int]:
        """Return the number of every token."""
        if self._vocabulary is None:
            self._vocabulary = self._backend.get_vocab(with_added_tokens=True)
        return dict(self._vocabulary)

    @property
    def added_tokens_decoder(self) -> dict[int, Any]:
        """The added tokens by their numbers."""
        return dict(self._backend.get_added_tokens_decoder())

    def convert_ids_to_tokens(self, ids: Any, skip_special_tokens: bool = False) -> Any:
        """Return the token of a number, or those of several."""
        if skip_special_tokens:
            return self._full().convert_ids_to_tokens(ids, skip_special_tokens=True)
        if isinstance(ids, int):
            return self._backend.id_to_token(ids)
        return [self._backend.id_to_token(int(each)) for each in ids]

    def apply_chat_template(
        self,
        conversation: Any,
        tools: Any = None,
        *,
        chat_template: str | None = None,
        add_generation_prompt: bool = False,
        tokenize: bool = True,
        return_dict: bool = True,
        **values: Any,
    ) -> Any:
        """Return a conversation, or each of several, as text or as tokens; it is rendered under bounds."""
        template = self.chat_template if chat_template is None else chat_template
        several = isinstance(conversation, list) and bool(conversation) and isinstance(conversation[0], list)
        talks = conversation if several else [conversation]
        plain = isinstance(template, str) and tools is None and not (tokenize and return_dict)
        written = as_json(talks, add_generation_prompt) if plain and _usual(values) else None
        if written is None:
            values |= {"tools": tools, "chat_template": chat_template, "add_generation_prompt": add_generation_prompt}
            return self._full().apply_chat_template(conversation, tokenize=tokenize, return_dict=return_dict, **values)
        texts = renderer.render(str(template), {**self.special_tokens_map, **values}, written)
        if not tokenize:
            return texts if several else texts[0]
        return self(texts if several else texts[0], add_special_tokens=False)["input_ids"]

    def _full(self) -> Any:
        if self._loaded is None:
            self._loaded = self._load()
        return self._loaded

    def __getattr__(self, name: str) -> Any:
        if name.startswith("_"):
            raise AttributeError(name)
        return getattr(self._full(), name)


def _usual(values: Mapping[str, Any]) -> bool:
    return values.keys() <= {"enable_thinking"} and all(type(value) is bool for value in values.values())


def as_json(talks: Sequence[Any], ask: bool) -> list[str] | None:
    """Return what a template is given for each conversation; None unless they hold roles and texts alone."""
    simple = all(
        type(talk) is list
        and bool(talk)
        and all(type(each) is dict and each.keys() == {"role", "content"} for each in talk)
        and all(type(value) is str for each in talk for value in each.values())
        for talk in talks
    )
    common = {"tools": None, "documents": None, "add_generation_prompt": ask}
    return [json.dumps({"messages": talk, **common}, ensure_ascii=False) for talk in talks] if simple else None
