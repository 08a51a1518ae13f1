"""Turns rows into tokens: which tokens are supervised, and what is cut from a row that is too long.

A row's tokens are a prompt, exactly the one from which an answer is generated, and the answer that continues it. The
answer ends with the token that ends a turn; nothing follows it. It is tokenized apart from the prompt: if a token
reached over the seam, training would see a prompt that generation never sees.

The text of a conversation, and where its answers are, come from answer_places.py, tokens of pieces of text from
tokenizer_pieces.py. token_rows.py keeps the tokens, batches.py puts rows together.
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from mbf_mlx.config import DataConfig
from mbf_mlx.data.answer_places import Rendered, render
from mbf_mlx.data.chat_template import ChatTemplate
from mbf_mlx.data.left_out import LeftOut
from mbf_mlx.data.problems import Problems
from mbf_mlx.data.row import NAMES, BadRow, Row
from mbf_mlx.data.task import Task
from mbf_mlx.data.token_rows import Encoded as Encoded
from mbf_mlx.data.token_rows import EncodedRows
from mbf_mlx.data.tokenizer_pieces import PieceTokenizer

CHUNK = 512  # rows that are rendered and tokenized together; fewer if they have more than
CHUNK_LETTERS = 1_000_000  # characters
NOTHING = "no supervised token: the model's template or tokenizer leaves none of the answer"
NO_PLACE = '"system" needs a chat template: without one, expected it at the start of the prompt'
STOPS = (
    "the answer holds {mark}, at which this model's generation stops: what comes after it would never be generated"
    " (take it out, or end the answer there)"
)


class Encoder:
    """Turns rows into tokens, with one tokenizer and the same settings for all.

    Args:
        tokenizer: mlx-lm's TokenizerWrapper.
        data: Template, mask and length. For a model without a chat template, "chat" means "none".
        spill: The folder for tokens that do not fit in memory; None is the system's own.
    """

    def __init__(self, tokenizer: Any, data: DataConfig, spill: Path | None = None):
        self.data = data
        self._spill = spill
        self._pieces = PieceTokenizer(tokenizer)
        chat = data.template == "chat" and tokenizer.has_chat_template
        self._template = ChatTemplate(tokenizer, data.date) if chat else None
        self._left_out = LeftOut(self._template)

    def all(self, rows: Sequence[Row], path: Path) -> EncodedRows:
        """Return all rows' tokens; `path` is what an error calls the task.

        Raises:
            InputError: with every row that does not fit, as `file:line: reason`.
        """
        problems, encoded = Problems(), EncodedRows(rows, self._spill)
        for row, found in self.stream(rows):
            if isinstance(found, BadRow):
                problems.add_row(row.file, row.line, str(found))
            else:
                encoded.append(found)
        problems.raise_any(path)
        return encoded

    def stream(self, rows: Iterable[Row]) -> Iterator[tuple[Row, Encoded | BadRow]]:
        """Yield each row with its tokens, or with the reason why it has none; only a chunk of rows is in memory."""
        for chunk in _chunks(rows):
            whole = self._parts(chunk)
            for row in chunk:
                self._left_out.note(row)
            for row, parts, cut in zip(chunk, *self._fitted(chunk, whole), strict=True):
                yield row, parts if isinstance(parts, BadRow) else self._encoded(row, parts, cut)

    def marked(self, encoded: Encoded) -> list[tuple[str, bool]]:
        """Return the text of a row in pieces, each with whether it is supervised."""
        edges = (np.flatnonzero(np.diff(encoded.supervised)) + 1).tolist()
        spans = zip([0, *edges], [*edges, len(encoded.tokens)], strict=True)
        return [(self._pieces.text(encoded.tokens[i:j].tolist()), bool(encoded.supervised[i])) for i, j in spans]

    def special_in(self, row: Row) -> str:
        """Return the first text in the row that the tokenizer reads as a special token; "" if there is none."""
        return next(filter(None, map(self._pieces.mark_in, row.texts)), "")

    def fills_template(self, task: Task) -> bool:
        """Return whether the rows of a task are put into the model's chat template."""
        return self._template is not None and task.format != NAMES["text"]

    def warnings(self, task: Task) -> list[str]:
        """Return warnings about the model's template and what it left out of the rows encoded until now."""
        return self._template_warnings(task) + self._left_out.warnings()

    def _template_warnings(self, task: Task) -> list[str]:
        if self._template is None or not self.fills_template(task):
            raw = self.data.template == "chat" and task.format != NAMES["text"]
            return ["the model has no chat template: prompt and completion stand as they are"] if raw else []
        (probe,) = render([Row("completion", Path(), 0, "a", "b", ("b",))], self._template, self._pieces)
        said, ends = ("", False) if isinstance(probe, BadRow) else self._pieces.turn(probe.answer)
        if not ends or (last := self._pieces.plain([said])[0][-1]) in self._pieces.ends:
            return []
        mark, end = (self._pieces.text([token]) for token in (last, self._pieces.ended([last])[-1]))
        return [
            f"the chat template ends a turn with {mark}, at which this model's generation does not stop: {end} is"
            " learned behind it"
        ]

    def _encoded(self, row: Row, parts: "_Parts", cut: int) -> Encoded | BadRow:
        if not parts.answer or (row.kind != "text" and (fault := self._fault(parts.answer))):
            return BadRow(fault if parts.answer else NOTHING)
        tokens = np.array(parts.prompt + parts.answer, np.int32)
        supervised = np.array(parts.supervised + [True] * len(parts.answer), bool)
        if not self.data.mask_prompt:
            if any(message.get("weight") == 0 for message in row.messages):
                return BadRow(
                    "an answer has the weight 0, and --no-mask-prompt learns every token: expected one of them"
                )
            supervised[:] = True
        supervised[0] = False
        return Encoded(tokens, supervised, len(parts.prompt), cut, row)

    def _fault(self, answer: Sequence[int]) -> str:
        """Return why generation cannot give the tokens of an answer; "" if it can."""
        if not self._pieces.says_something(answer):
            return NOTHING
        stop = next((token for token in answer[:-1] if token in self._pieces.ends), None)
        return "" if stop is None else STOPS.format(mark=self._pieces.text([stop]))

    def _parts(self, rows: Sequence[Row]) -> "list[_Parts | BadRow]":
        """Return the tokens of rows of one kind, not cut yet."""
        if not rows:
            return []
        if rows[0].kind == "text":
            texts = map(self._pieces.ended, self._pieces.begun([self._pieces.until_end(row.text) for row in rows]))
            return [_Parts(tokens[:1], [False], tokens[1:]) for tokens in texts]
        if self._template is not None:
            return self._chat_parts(render(rows, self._template, self._pieces))
        if rows[0].kind == "messages":
            why = "--template none" if self.data.template == "none" else "the model has none"
            reason = f"messages need a chat template ({why}): expected prompt/completion or text rows"
            return [BadRow(reason) for _ in rows]
        prompts = self._pieces.begun([row.prompt for row in rows])
        answers = self._pieces.continued([self._pieces.until_end(row.completion) for row in rows])
        return [
            BadRow(NO_PLACE) if row.system else _Parts(prompt, [False] * len(prompt), self._pieces.ended(answer))
            for row, prompt, answer in zip(rows, prompts, answers, strict=True)
        ]

    def _chat_parts(self, rendered: "list[Rendered | BadRow]") -> "list[_Parts | BadRow]":
        good = [text for text in rendered if isinstance(text, Rendered)]
        answers = self._pieces.continued([self._pieces.turn(text.answer)[0] for text in good])
        found = zip(self._prompts(good), answers, strict=True)
        parts: list[_Parts | BadRow] = []
        for text in rendered:
            if isinstance(text, BadRow):
                parts.append(text)
                continue
            prompt, answer = next(found)
            parts.append(prompt if isinstance(prompt, BadRow) else _Parts(*prompt, self._pieces.ended(answer)))
        return parts

    def _prompts(self, rendered: Sequence[Rendered]) -> list[tuple[list[int], list[bool]] | BadRow]:
        """Return each prompt's tokens, and which of them belong to earlier answers."""
        texts = [text.prompt for text in rendered]
        if not any(text.earlier for text in rendered):
            return [(tokens, [False] * len(tokens)) for tokens in self._pieces.plain(texts)]
        prompts: list[tuple[list[int], list[bool]] | BadRow] = []
        for text, tokens, places in zip(rendered, *self._pieces.placed(texts), strict=True):
            inside = [_tokens_of(text.prompt, places, span) for span in text.earlier]
            faults = (self._fault([tokens[i] for i in np.flatnonzero(each)]) for each in inside)
            if fault := next(filter(None, faults), ""):
                prompts.append(BadRow(fault))
            else:
                supervised = np.any([np.zeros(len(tokens), bool), *inside], axis=0)
                prompts.append((tokens, supervised.tolist()))
        return prompts

    def _fitted(self, rows: Sequence[Row], parts: "list[_Parts | BadRow]") -> "tuple[list[_Parts | BadRow], list[int]]":
        """Cut the rows that are too long; return the tokens, and how many tokens each row has lost.

        The text of the last user message is cut on its left until the row fits. Text rows lose their end instead.
        """
        limit, fitted = self.data.max_seq_length, list(parts)
        longs = {i: part for i, part in enumerate(parts) if isinstance(part, _Parts) and part.length > limit}
        if rows[0].kind == "text":
            for i, part in longs.items():
                fitted[i] = part._replace(answer=part.answer[: limit - 1])
        else:
            self._cut(rows, fitted, longs)
        return fitted, [_length(old) - _length(new) for old, new in zip(parts, fitted, strict=True)]

    def _cut(self, rows: Sequence[Row], fitted: "list[_Parts | BadRow]", longs: "dict[int, _Parts]") -> None:
        """Replace the rows that are too long in `fitted` by shorter ones, or by the reason why there are none."""
        limit = self.data.max_seq_length
        texts = {i: _question(rows[i]) for i in longs}
        places = dict(zip(longs, self._pieces.placed(list(texts.values()))[1], strict=True))
        drops, least = dict.fromkeys(longs, 0), {i: part.length - len(places[i]) for i, part in longs.items()}
        while longs:
            for i, part in longs.items():
                drops[i] += part.length - limit
                if drops[i] >= len(places[i]):
                    fitted[i] = BadRow(self._too_long(rows[i], part, least[i]))
            left = [i for i in longs if drops[i] < len(places[i])]
            # Cut the text and make the row again, so that the template is whole around a shorter text.
            shorter = self._parts([_asking(rows[i], texts[i][places[i][drops[i]][0] :]) for i in left])
            longs = {}
            for i, new in zip(left, shorter, strict=True):
                fitted[i] = new
                if isinstance(new, _Parts) and new.length > limit:
                    longs[i] = new

    def _too_long(self, row: Row, parts: "_Parts", least: int) -> str:
        needed = f"{len(parts.answer)} tokens of the answer and {least - len(parts.answer)} around the prompt's text"
        if row.kind == "messages":
            needed = f"{least} tokens without the text of the last user message"
        return f"{needed} do not fit into --max-seq-length {self.data.max_seq_length}"


class _Parts(NamedTuple):
    prompt: list[int]
    supervised: list[bool]  # of the prompt's tokens
    answer: list[int]

    @property
    def length(self) -> int:
        return len(self.prompt) + len(self.answer)


def _length(parts: _Parts | BadRow) -> int:
    return parts.length if isinstance(parts, _Parts) else 0


def _tokens_of(text: str, places: Sequence[tuple[int, int]], span: tuple[int, int]) -> np.ndarray:
    """Return which tokens of a text belong to a part of it, bool (tokens,).

    A token that reaches over an edge of the part belongs to it if it holds some of its words, not white space alone.

    Args:
        text: The whole text.
        places: Where each token begins and ends in it.
        span: Where the part begins and ends.
    """
    begin, end = span
    starts, stops = np.array(places).reshape(-1, 2).T
    # Some tokenizers leave white space out of a token's place: a token begins where the one before it ended.
    starts = np.minimum(starts, np.concatenate([[0], np.maximum.accumulate(stops)[:-1]]))
    inside: np.ndarray = (starts >= begin) & (stops <= end) & (starts < stops)
    for i in np.flatnonzero(~inside & (starts < end) & (stops > begin)):
        inside[i] = bool(text[max(starts[i], begin) : min(stops[i], end)].strip())
    return inside


def _chunks(rows: Iterable[Row]) -> Iterator[list[Row]]:
    chunk, letters = list[Row](), 0
    for row in rows:
        chunk.append(row)
        letters += row.letters
        if len(chunk) == CHUNK or letters > CHUNK_LETTERS:
            yield chunk
            chunk, letters = [], 0
    if chunk:
        yield chunk


def _question(row: Row) -> str:
    """Return the text of the last user message, the one that may be cut."""
    if row.kind == "completion":
        return row.prompt
    texts = [message["content"] for message in row.messages if message["role"] == "user"]
    return str(texts[-1]) if texts else ""


def _asking(row: Row, text: str) -> Row:
    """Return the row with `text` in its last user message."""
    if row.kind == "completion":
        return replace(row, prompt=text)
    place = max(i for i, message in enumerate(row.messages) if message["role"] == "user")
    messages = list(row.messages)
    messages[place] = {**messages[place], "content": text}
    return replace(row, messages=tuple(messages))
