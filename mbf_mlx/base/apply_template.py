"""`apply_chat_template` of a loaded tokenizer, rendered under bounds.

transformers prepares a conversation for its template: it leaves out what is None, makes plain data of objects, knows
several names of one field. It does so here, too, but with a template of ours, which writes what it is given as JSON.
From this the other process renders the model's own template (renderer.py). A conversation of roles and texts alone
needs no such preparation.
"""

import inspect
from collections.abc import Sequence
from typing import Any

from mbf_mlx.base.light_tokenizer import LightTokenizer, as_json
from mbf_mlx.base.renderer import renderer

GIVEN = ("messages", "tools", "documents", "add_generation_prompt")  # what every template is given
_RECORD = "{{ {" + ", ".join(f"'{name}': {name}" for name in GIVEN) + "} | tojson }}"


def bound_template(tokenizer: Any) -> None:
    """Make a tokenizer render its chat template under bounds from now on.

    Its `apply_chat_template` then raises `TemplateLimitError` where a template takes too much, and `Refused` where one
    refuses a conversation.

    Args:
        tokenizer: mlx-lm's TokenizerWrapper.
    """
    inner = tokenizer._tokenizer  # the wrapper calls it, and so does all of mlx-lm
    if isinstance(inner, LightTokenizer):  # renders under bounds itself
        if tokenizer.has_chat_template:
            renderer.start()
        return
    from transformers import PreTrainedTokenizerBase

    if type(inner).apply_chat_template is not PreTrainedTokenizerBase.apply_chat_template:
        return  # code of transformers' own, without a template
    if "apply_chat_template" not in vars(inner):
        inner.apply_chat_template = _Bounded(inner)
    if tokenizer.has_chat_template:
        renderer.start()


class _Bounded:
    """Takes the place of a tokenizer's `apply_chat_template`."""

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        self._others = inspect.signature(type(tokenizer).apply_chat_template).parameters.keys() - {"self", "kwargs"}

    def __call__(
        self,
        conversation: Any,
        tools: Sequence[Any] | None = None,
        documents: Sequence[Any] | None = None,
        chat_template: str | None = None,
        add_generation_prompt: bool = False,
        tokenize: bool = True,
        return_dict: bool = True,
        **values: Any,
    ) -> Any:
        """Return what transformers does: texts, or tokens; for one conversation, or a list of them."""
        if unknown := sorted(self._others & values.keys()):
            raise TypeError(f"apply_chat_template: not rendered under bounds: {', '.join(unknown)}")
        own = self._tokenizer
        template = own.get_chat_template(chat_template, tools)
        several = type(conversation) is list and bool(conversation) and type(conversation[0]) is list
        talks = conversation if several else [conversation]
        recorded: Any = as_json(talks, add_generation_prompt) if tools is None and documents is None else None
        if recorded is None:
            recorded = type(own).apply_chat_template(
                own, conversation, tools, documents, _RECORD, add_generation_prompt=add_generation_prompt,
                tokenize=False,
            )  # fmt: skip
            several = isinstance(recorded, list)
            recorded = recorded if several else [recorded]
        given = {**own.special_tokens_map, **values}  # a value of the caller's takes the place of a special token
        texts = renderer.render(template, given, recorded)
        if not tokenize:
            return texts if several else texts[0]
        tokens = own(texts if several else texts[0], add_special_tokens=False)
        return tokens if return_dict else tokens["input_ids"]
