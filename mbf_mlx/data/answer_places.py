"""Where the assistant's answers are in the text that a chat template makes of a conversation.

An answer begins where the prompt ends that it is generated from. Some templates write a finished answer elsewhere: they
open a thought in the prompt, drop the thoughts of earlier answers, or move the system message. Then the conversation is
rendered again with a mark in place of the answer. The text before the mark and after it is also the text before the
answer and after it. Nothing is ever found by searching for an answer's words, which may occur anywhere.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

from mbf_mlx.data.chat_template import ChatTemplate, Messages
from mbf_mlx.data.row import BadRow, Row, is_learned
from mbf_mlx.data.tokenizer_pieces import PieceTokenizer

CHANGED = "the model's chat template changes the answer: expected to find it behind the prompt"
CHANGED_EARLIER = "the model's chat template changes an earlier answer: expected rows with one answer"
MARKS = [chr(code) for code in range(0xE000, 0xF900)]  # Unicode's private characters; one that no text has is used


class Rendered(NamedTuple):
    """A conversation as text."""

    prompt: str  # what the last answer is generated from
    answer: str  # the last answer, and what the template writes after it
    earlier: tuple[tuple[int, int], ...]  # begin and end of each earlier answer in the prompt, with its end token


def render(rows: Sequence[Row], template: ChatTemplate, pieces: PieceTokenizer) -> list[Rendered | BadRow]:
    """Return the text of each row, or why the template makes none of it.

    Args:
        rows: Rows of messages, or of prompts and completions.
        template: The model's chat template.
        pieces: The model's tokenizer, which knows the tokens that end a turn.
    """
    talks = [_Conversation(row, template, pieces) for row in rows]
    answers = [(talk, place) for talk in talks for place in talk.places]
    prompts = template.texts([(talk.row, talk.messages[:place], talk.tools) for talk, place in answers], ask=True)
    wholes = template.texts([(talk.row, talk.messages[: place + 1], talk.tools) for talk, place in answers], ask=False)
    texts = iter(zip(prompts, wholes, strict=True))
    return [talk.rendered([next(texts) for _ in talk.places]) for talk in talks]


class _Answer(NamedTuple):
    place: int  # the number of its message, from 0
    prompt: str  # the text that it is generated from
    whole: str  # the text of the conversation up to and with this answer


class _Conversation:
    """The messages of one row; it finds the assistant's in the template's text."""

    def __init__(self, row: Row, template: ChatTemplate, pieces: PieceTokenizer):
        self.row, self.messages, self.tools = row, messages_of(row), row.tools
        self.places = [place for place, message in enumerate(self.messages) if is_learned(message)]
        self._template, self._pieces = template, pieces

    def rendered(self, texts: Sequence[tuple[str | BadRow, str | BadRow]]) -> Rendered | BadRow:
        """Return the row's text; `texts` has, for each answer, its prompt and the conversation up to its end."""
        answers = []
        for place, (prompt, whole) in zip(self.places, texts, strict=True):
            if isinstance(prompt, BadRow):
                return prompt
            if isinstance(whole, BadRow):
                return whole
            answers.append(_Answer(place, prompt, whole))
        *earlier, last = answers
        try:
            return Rendered(last.prompt, self._last(last), tuple(self._earlier(each, last) for each in earlier))
        except BadRow as error:
            return error

    def _last(self, answer: _Answer) -> str:
        """Return the last answer and what follows it."""
        if answer.whole.startswith(answer.prompt):
            return answer.whole[len(answer.prompt) :]
        # The text before the last question may differ: compare both texts from the question on.
        asked = self._marked(answer.prompt, answer.place - 1, answer.place, ask=True)
        told = self._marked(answer.whole, answer.place - 1, answer.place + 1, ask=False)
        if asked and told and told.after.startswith(asked.after) and _unmarked(answer.whole, told):
            return told.after[len(asked.after) :]
        marked = self._marked(answer.whole, answer.place, answer.place + 1, ask=False)
        span = _unmarked(answer.whole, marked)
        if marked is None or span is None:
            raise BadRow(CHANGED)
        begin, end = span
        content = self._content(answer.place)
        # The prompt may open a thought. An answer that begins with this opening continues behind it.
        opened = answer.prompt[begin:] if answer.prompt.startswith(marked.before) else ""
        if opened.strip() and content.startswith(opened.strip()):
            rest = content.removeprefix(opened.strip())
            return rest.removeprefix(opened[len(opened.rstrip()) :]) + answer.whole[end:]
        # Any other answer takes the place of the thought.
        if not self._is_written(answer.place, answer.whole[begin:end].strip(), whole=True):
            raise BadRow(CHANGED)
        return answer.whole[begin:].lstrip()

    def _earlier(self, answer: _Answer, last: _Answer) -> tuple[int, int]:
        """Return where an earlier answer begins and ends in the prompt of the last one."""
        text, begin = last.prompt, len(answer.prompt)
        generated = text.startswith(answer.prompt)
        if generated and answer.whole.startswith(answer.prompt):
            said, _ = self._pieces.turn(answer.whole[begin:])
            if text.startswith(said, begin):
                return begin, begin + len(said)
        here = self._marked(text, answer.place, last.place, ask=True)
        in_last_place = self._marked(answer.whole, answer.place, answer.place + 1, ask=False)
        span = _unmarked(text, here)
        if span is None or in_last_place is None or not answer.whole.endswith(in_last_place.after):
            raise BadRow(CHANGED_EARLIER)
        if not self._is_written(answer.place, text[slice(*span)].strip(), whole=False):
            raise BadRow(CHANGED_EARLIER)
        # "a" takes the answer's place here: the end of a turn does not depend on the answer.
        tail = self._pieces.turn("a" + in_last_place.after)[0][1:]
        end = span[1] + self._pieces.end_of_turn(text[span[1] :], tail)
        return (begin if generated and begin <= span[0] else span[0]), end

    def _is_written(self, place: int, written: str, *, whole: bool) -> bool:
        """Return whether the template writes a message as it is, or, unless `whole`, its end: thoughts come first."""
        content = self._content(place)
        if self.messages[place].get("tool_calls"):
            return written.startswith(content) or not whole
        return written == content if whole else content.endswith(written)

    def _content(self, place: int) -> str:
        return str(self.messages[place]["content"]).strip()

    def _marked(self, text: str, place: int, count: int, *, ask: bool) -> "_Marked | None":
        """Render the first `count` messages with a mark, which `text` does not have, for what one of them says."""
        mark = next(mark for mark in MARKS if mark not in text)
        messages = list(self.messages[:count])
        messages[place] = _with_mark(messages[place], mark)
        marked = self._template.text((self.row, messages, self.tools), ask=ask)
        if isinstance(marked, BadRow) or mark not in marked:
            return None
        return _Marked(marked.partition(mark)[0], marked.rpartition(mark)[2])


class _Marked(NamedTuple):
    before: str  # the text before the first mark
    after: str  # the text after the last one


def _unmarked(text: str, marked: _Marked | None) -> tuple[int, int] | None:
    """Return begin and end of what `text` has in place of the marks; None where it differs elsewhere, too."""
    if marked is None or not text.startswith(marked.before) or not text.endswith(marked.after):
        return None
    begin, end = len(marked.before), len(text) - len(marked.after)
    return (begin, end) if begin <= end else None


def _with_mark(message: dict[str, Any], mark: str) -> dict[str, Any]:
    """Return a message with a mark for its text, and for the names of the tools that it calls."""
    marked = {**message, "content": mark}
    if calls := message.get("tool_calls"):
        marked["tool_calls"] = [_call_with_mark(call, mark) for call in calls]
    return marked


def _call_with_mark(call: dict[str, Any], mark: str) -> dict[str, Any]:
    function = call.get("function")
    return {**call, "function": {**function, "name": mark}} if isinstance(function, dict) else {**call, "name": mark}


def messages_of(row: Row) -> Messages:
    """Return a row's messages; a prompt and its completion are a user's and the assistant's.

    White space around a completion is left out: templates write their own between a role and its text.
    """
    if row.kind == "messages":
        return row.messages
    answer = {"role": "assistant", "content": row.completion.strip()}
    system = [{"role": "system", "content": row.system}] if row.system else []
    return [*system, {"role": "user", "content": row.prompt}, answer]
