"""Tokens of pieces of text: of a text's beginning, of what continues it, and of an answer up to its end.

The tokenizer is mlx-lm's TokenizerWrapper, handed in by the caller.
"""

import re
from collections.abc import Sequence
from typing import Any

from mbf_mlx.errors import InputError


class PieceTokenizer:
    """Tokenizes pieces of a text so that together they are the tokens that generation meets.

    Args:
        tokenizer: mlx-lm's TokenizerWrapper.

    Raises:
        InputError: no token of the tokenizer ends an answer.
    """

    def __init__(self, tokenizer: Any):
        self._tokenizer = tokenizer._tokenizer  # the wrapper passes attributes on, but cannot be called
        end = self._tokenizer.eos_token_id
        self.ends: set[int] = ({end} - {None}) | set(tokenizer.eos_token_ids)  # where generation stops
        if not self.ends:
            raise InputError("the model's tokenizer: expected a token that ends an answer (eos_token), got none")
        self._end: int = min(self.ends) if end is None else end
        added = {token: x.content for token, x in self._tokenizer.added_tokens_decoder.items() if x.special}
        self._special = self.ends | added.keys()
        self._marks = re.compile("|".join(map(re.escape, added.values())) or "(?!)")
        self._blank: dict[int, bool] = {}
        self._begin = self._find_begin()
        self._anchors = self._find_anchors()

    def plain(self, texts: Sequence[str]) -> list[list[int]]:
        """Return the tokens of texts that already hold every special token they need."""
        tokens: list[list[int]] = self._call(texts)["input_ids"] if texts else []
        return tokens

    def placed(self, texts: Sequence[str]) -> tuple[list[list[int]], list[list[tuple[int, int]]]]:
        """Return the tokens as `plain` does, and where each begins and ends in its text, in characters."""
        if not texts:
            return [], []
        found = self._call(texts, return_offsets_mapping=True)
        return found["input_ids"], found["offset_mapping"]

    def begun(self, texts: Sequence[str]) -> list[list[int]]:
        """Return the tokens of raw texts, with the token that the tokenizer puts first exactly once."""
        count = len(self._begin)
        return [tokens if tokens[:count] == self._begin else self._begin + tokens for tokens in self.plain(texts)]

    def continued(self, texts: Sequence[str]) -> list[list[int]]:
        """Return the tokens of texts that continue others: without what a tokenizer puts before a first word."""
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
        """Return tokens that end with a token at which generation stops; it is added if it is missing."""
        return tokens if tokens and tokens[-1] in self.ends else [*tokens, self._end]

    def turn(self, tokens: list[int]) -> tuple[list[int], bool]:
        """Return an answer up to the token that ends its turn, and whether there is such a token.

        What templates write after that token, most of all a line end, is never generated.
        """
        begin = len(tokens)
        while begin and (tokens[begin - 1] in self._special or self._is_blank(tokens[begin - 1])):
            begin -= 1
        tail = range(begin, len(tokens))
        stops = [i for i in tail if tokens[i] in self.ends][:1] or [i for i in tail if tokens[i] in self._special][-1:]
        return (tokens[: stops[0] + 1], True) if stops else (tokens[:begin], False)

    def turns(self, texts: Sequence[str]) -> list[str]:
        """Return answers as texts, each up to the end of the token that ends its turn."""
        tokens, places = self.placed(texts)
        counts = [len(self.turn(each)[0]) for each in tokens]
        return [
            text[: place[count - 1][1]] if count else ""
            for text, place, count in zip(texts, places, counts, strict=True)
        ]

    def mark_in(self, text: str) -> str:
        """Return the first piece of a text that is read as a special token; "" if there is none."""
        found = self._marks.search(text)
        return found[0] if found else ""

    def says_something(self, tokens: Sequence[int]) -> bool:
        """Return whether there are other than special tokens among these."""
        return any(token not in self._special for token in tokens)

    def text(self, tokens: Sequence[int]) -> str:
        """Return the text of tokens, special ones included."""
        return str(self._tokenizer.decode(list(tokens), clean_up_tokenization_spaces=False))

    def _is_blank(self, token: int) -> bool:
        if token not in self._blank:
            self._blank[token] = not self.text([token]).strip()
        return self._blank[token]

    def _find_begin(self) -> list[int]:
        """Return the tokens that the tokenizer puts before every text."""
        bare: list[int] = self.plain(["a"])[0]
        whole: list[int] = self._tokenizer("a")["input_ids"]
        starts = [i for i in range(len(whole)) if whole[i : i + len(bare)] == bare]
        return whole[: starts[0]] if starts else []

    def _find_anchors(self) -> dict[str, list[int]]:
        """Return texts, with their tokens, behind which a text is tokenized as a continuation; {} if any text would do.

        A sentencepiece tokenizer puts a space before a text's first word, but not before what follows an anchor.
        """
        anchors = {anchor: self.plain([anchor])[0] for anchor in ("\n", ":", "a")}
        for anchor, lead in anchors.items():
            if all(self.plain([anchor + text])[0] == lead + self.plain([text])[0] for text in ("b", " b")):
                return {}
        return anchors

    def _call(self, texts: Sequence[str], **more: bool) -> Any:
        return self._tokenizer(
            list(texts), add_special_tokens=False, return_attention_mask=False, verbose=False, **more
        )
