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
        added = self._tokenizer.added_tokens_decoder.items()
        marks: dict[int, str] = {token: x.content for token, x in added if x.special or token in self.ends}
        self._special = self.ends | marks.keys()
        self._end_marks = {text for token, text in marks.items() if token in self.ends}
        # Longest first: where one begins like another, the longer one is read.
        self._marks = sorted(filter(str.strip, marks.values()), key=len, reverse=True)
        self._mark = re.compile("|".join(map(re.escape, self._marks)) or "(?!)")
        self._begin = self._find_begin()
        self._anchors = self._find_anchors()

    @property
    def begin(self) -> str:
        """The text of the tokens that the tokenizer puts before every text; "" if there are none."""
        return self.text(self._begin) if self._begin else ""

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

    def until_end(self, text: str) -> str:
        """Return a text without the white space behind its end token, if it has one: that is never generated."""
        bare = text.rstrip()
        return bare if bare.endswith(tuple(self._end_marks)) else text

    def turn(self, text: str) -> tuple[str, bool]:
        """Return an answer up to the token that ends its turn, and whether there is such a token.

        What templates write after that token, most of all a line end, is never generated.
        """
        stops: list[tuple[str, int]] = []  # special tokens behind the answer and where each ends, the last one first
        end = len(text.rstrip())
        while mark := next((mark for mark in self._marks if text.endswith(mark, 0, end)), None):
            stops.append((mark, end))
            end = len(text[: end - len(mark)].rstrip())
        if not stops:
            return text[:end], False
        firsts = [place for mark, place in stops if mark in self._end_marks][-1:]
        return text[: firsts[0] if firsts else stops[0][1]], True

    def end_of_turn(self, text: str, tail: str) -> int:
        """Return how many characters of `text`, which follows an answer, end the answer's turn.

        Args:
            text: What follows the answer in the middle of a conversation.
            tail: What ends its turn where the conversation ends, too.
        """
        if text.startswith(tail):
            return len(tail)
        for mark in reversed(list(self._mark.finditer(tail))):
            if text.startswith(tail[: mark.end()]):
                return mark.end()
        first = self._mark.match(text, len(text) - len(text.lstrip()))
        return first.end() if first and first[0] in self._end_marks else 0

    def mark_in(self, text: str) -> str:
        """Return the first piece of a text that is read as a special token; "" if there is none."""
        found = self._mark.search(text)
        return found[0] if found else ""

    def says_something(self, tokens: Sequence[int]) -> bool:
        """Return whether there are other than special tokens among these."""
        return any(token not in self._special for token in tokens)

    def text(self, tokens: Sequence[int]) -> str:
        """Return the text of tokens, special ones included."""
        return str(self._tokenizer.decode(list(tokens), clean_up_tokenization_spaces=False))

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
