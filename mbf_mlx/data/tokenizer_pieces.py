"""Tokens of pieces of text: what begins a text, what goes on behind another, and where an answer ends.

The tokenizer is handed in: mlx-lm's TokenizerWrapper, or the transformers tokenizer inside it.
"""

import re
from collections.abc import Sequence
from typing import Any

from mbf_mlx.errors import InputError


class Pieces:
    """A tokenizer that is asked about pieces of a text instead of whole ones."""

    def __init__(self, tokenizer: Any):
        # mlx-lm's wrapper passes attributes on, but cannot be called.
        wrapped = not callable(tokenizer)
        self._tokenizer = tokenizer._tokenizer if wrapped else tokenizer
        end = self._tokenizer.eos_token_id
        self.ends = ({end} - {None}) | set(tokenizer.eos_token_ids if wrapped else ())  # where generation stops
        if not self.ends:
            raise InputError("the model's tokenizer: expected a token that ends an answer (eos_token), got none")
        self._end = min(self.ends) if end is None else end
        added = {token: x.content for token, x in self._tokenizer.added_tokens_decoder.items() if x.special}
        self._special = self.ends | added.keys()
        self._marks = re.compile("|".join(map(re.escape, added.values())) or "(?!)")
        self._blank: dict[int, bool] = {}
        self._begin = self._find_begin()
        self._anchors = self._find_anchors()

    def plain(self, texts: Sequence[str]) -> list[list[int]]:
        """Return the tokens of texts in which the template has already put every special token."""
        return self._call(texts)["input_ids"] if texts else []

    def placed(self, texts: Sequence[str]) -> tuple[list[list[int]], list[list[tuple[int, int]]]]:
        """Return the tokens as `plain`, and where each of them begins and ends in its text, in letters."""
        if not texts:
            return [], []
        found = self._call(texts, return_offsets_mapping=True)
        return found["input_ids"], found["offset_mapping"]

    def begun(self, texts: Sequence[str]) -> list[list[int]]:
        """Return the tokens of raw texts behind the tokenizer's first one, which stands there once."""
        count = len(self._begin)
        return [tokens if tokens[:count] == self._begin else self._begin + tokens for tokens in self.plain(texts)]

    def continued(self, texts: Sequence[str]) -> list[list[int]]:
        """Return the tokens of texts that go on behind others: without what a tokenizer puts before a first word."""
        if not self._anchors:
            return self.plain(texts)
        tokens: list[list[int] | None] = [None] * len(texts)
        for anchor, lead in self._anchors.items():
            missing = [i for i, found in enumerate(tokens) if found is None]
            for i, whole in zip(missing, self.plain([anchor + texts[i] for i in missing]), strict=True):
                if whole[: len(lead)] == lead:
                    tokens[i] = whole[len(lead) :]
        return [self.plain([text])[0] if found is None else found for text, found in zip(texts, tokens, strict=True)]

    def ended(self, tokens: list[int]) -> list[int]:
        """Return tokens with the one behind them at which generation stops."""
        return tokens if tokens and tokens[-1] in self.ends else [*tokens, self._end]

    def turn(self, tokens: list[int]) -> tuple[list[int], bool]:
        """Return an answer up to the token that ends its turn, and whether there is one.

        What templates put behind that token, a line end most of all, is never generated.
        """
        begin = len(tokens)
        while begin and (tokens[begin - 1] in self._special or self._is_blank(tokens[begin - 1])):
            begin -= 1
        tail = range(begin, len(tokens))
        stops = [i for i in tail if tokens[i] in self.ends][:1] or [i for i in tail if tokens[i] in self._special][-1:]
        return (tokens[: stops[0] + 1], True) if stops else (tokens[:begin], False)

    def turns(self, texts: Sequence[str]) -> list[str]:
        """Return answers as texts up to the end of the token that ends their turn."""
        tokens, places = self.placed(texts)
        counts = [len(self.turn(each)[0]) for each in tokens]
        return [
            text[: place[count - 1][1]] if count else ""
            for text, place, count in zip(texts, places, counts, strict=True)
        ]

    def mark_in(self, text: str) -> str:
        """Return the first piece of a text that is read as a special token, or nothing."""
        found = self._marks.search(text)
        return found[0] if found else ""

    def says_something(self, tokens: Sequence[int]) -> bool:
        """Return whether tokens are more than special ones."""
        return any(token not in self._special for token in tokens)

    def text(self, tokens: Sequence[int]) -> str:
        """Return what tokens say, special ones included."""
        return self._tokenizer.decode(list(tokens), clean_up_tokenization_spaces=False)

    def _is_blank(self, token: int) -> bool:
        if token not in self._blank:
            self._blank[token] = not self.text([token]).strip()
        return self._blank[token]

    def _find_begin(self) -> list[int]:
        """Return the tokens that the tokenizer puts before a text of its own accord."""
        bare, whole = self.plain(["a"])[0], self._tokenizer("a")["input_ids"]
        starts = [i for i in range(len(whole)) if whole[i : i + len(bare)] == bare]
        return whole[: starts[0]] if starts else []

    def _find_anchors(self) -> dict[str, list[int]]:
        """Return texts with their tokens behind which another is tokenized as it goes on; none where any text is."""
        anchors = {anchor: self.plain([anchor])[0] for anchor in ("\n", ":", "a")}
        for anchor, lead in anchors.items():
            if all(self.plain([anchor + text])[0] == lead + self.plain([text])[0] for text in ("b", " b")):
                return {}
        return anchors

    def _call(self, texts: Sequence[str], **more: bool) -> Any:
        return self._tokenizer(
            list(texts), add_special_tokens=False, return_attention_mask=False, verbose=False, **more
        )
