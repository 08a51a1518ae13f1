"""A model's chat template: what a conversation looks like as text, and which of its letters are the assistant's.

Where an answer begins is found by asking the template for the prompt that it would be generated from. Templates are
the model's own code: transformers renders them in jinja's sandbox, and whatever they raise speaks of the row.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

from mbf_mlx.data.row import BadRow, Row

MOVED = "the model's chat template writes an earlier answer not where it is generated: expected rows with one answer"


class Answer(NamedTuple):
    """An earlier answer of a conversation."""

    begin: int  # where it begins in the prompt of the last answer, in letters
    written: str  # as the template writes it at the end of a conversation, and what it puts behind it
    content: str  # as the message has it


class Rendered(NamedTuple):
    """A conversation as text."""

    prompt: str  # what the last answer is generated from
    answer: str  # the last answer and what the template puts behind it
    earlier: tuple[Answer, ...]


class ChatTemplate:
    """The chat template of a tokenizer."""

    def __init__(self, tokenizer: Any):
        self._tokenizer = tokenizer

    def render(self, rows: Sequence[Row]) -> list[Rendered | BadRow]:
        """Return the text of each row, or why the template makes none of it."""
        jobs = [(row, place) for row in rows for place in _turns(conversation(row))]
        prompts = self._texts([(conversation(row)[:place], row.tools) for row, place in jobs], ask=True)
        wholes = self._texts([(conversation(row)[: place + 1], row.tools) for row, place in jobs], ask=False)
        rendered: list[Rendered | BadRow] = []
        turns = zip(jobs, prompts, wholes, strict=True)
        for row in rows:
            count = len(_turns(conversation(row)))
            texts = [next(turns) for _ in range(count)]
            try:
                rendered.append(_assemble(row, [(place, _good(a), _good(b)) for (_, place), a, b in texts]))
            except BadRow as error:
                rendered.append(error)
        return rendered

    def _texts(self, jobs: Sequence[tuple[Any, Any]], ask: bool) -> list[str | BadRow]:
        """Return the text of each list of messages, with the beginning of an answer where `ask` is true."""
        if not any(tools for _, tools in jobs):
            try:
                texts = self._apply([messages for messages, _ in jobs], (), ask)
                if isinstance(texts, list) and len(texts) == len(jobs):
                    return texts
            except Exception:  # of a row that is found below
                pass
        return [self._text(messages, tools, ask) for messages, tools in jobs]

    def _text(self, messages: Any, tools: Any, ask: bool) -> str | BadRow:
        try:
            return str(self._apply(messages, tools, ask))
        except Exception as error:
            reason = " ".join(str(error).split())[:200] or type(error).__name__
            return BadRow(f"the model's chat template refuses the row: {reason}")

    def _apply(self, messages: Any, tools: Any, ask: bool) -> Any:
        return self._tokenizer.apply_chat_template(
            messages, tools=list(tools) or None, tokenize=False, add_generation_prompt=ask
        )


def conversation(row: Row) -> list[dict[str, Any]]:
    """Return a row's messages; a prompt and its completion are a user's and the assistant's.

    White space around a completion is left out: templates put their own between a role and its text.
    """
    if row.kind == "messages":
        return list(row.messages)
    answer = {"role": "assistant", "content": row.completion.strip()}
    return [{"role": "user", "content": row.prompt}, answer]


def _turns(messages: list[dict[str, Any]]) -> list[int]:
    return [place for place, message in enumerate(messages) if message["role"] == "assistant"]


def _good(text: str | BadRow) -> str:
    if isinstance(text, BadRow):
        raise text
    return text


def _assemble(row: Row, turns: list[tuple[int, str, str]]) -> Rendered:
    """Return the row's text from each answer's place, prompt, and conversation up to its end."""
    place, prompt, whole = turns[-1]
    content = conversation(row)[place]["content"].strip()
    if whole.startswith(prompt):
        answer = whole[len(prompt) :]
    elif content and content in whole:
        # A template for thinking: its prompt opens a thought that finished answers do not show. What is generated
        # goes on behind that prompt, so that is where the answer is learned.
        answer = whole[whole.rindex(content) :]
    else:
        raise BadRow("the model's chat template changes the answer: expected to find it behind the prompt")
    earlier = [_earlier(prompt, conversation(row)[at]["content"].strip(), *texts) for at, *texts in turns[:-1]]
    return Rendered(prompt, answer, tuple(earlier))


def _earlier(prompt: str, content: str, before: str, after: str) -> Answer:
    """Return an earlier answer: `before` is the prompt that it was generated from, `after` ends with it."""
    if not prompt.startswith(before) or not after.startswith(before):
        raise BadRow(MOVED)
    return Answer(len(before), after[len(before) :], content)
