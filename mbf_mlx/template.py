"""A model's chat template: what a conversation looks like as text, and which of its letters are the assistant's.

Where an answer begins is found by asking the template for the prompt that it would be generated from. Templates are
the model's own code: transformers renders them in jinja's sandbox, and whatever they raise speaks of the row.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

from mbf_mlx.rows import BadRow, Row


class Rendered(NamedTuple):
    """A conversation as text."""

    prompt: str  # what the last answer is generated from
    answer: str  # the last answer and what the template puts behind it
    earlier: tuple[tuple[int, int], ...]  # where earlier answers begin and end in the prompt, as letters


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
            return self._apply(messages, tools, ask)
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
    earlier = [_span(prompt, conversation(row)[at], before, after) for at, before, after in turns[:-1]]
    return Rendered(prompt, answer, tuple(earlier))


def _span(prompt: str, message: dict[str, Any], before: str, after: str) -> tuple[int, int]:
    """Return where an earlier answer stands in the prompt of the last one."""
    if prompt.startswith(before) and prompt.startswith(after):
        return len(before), len(after)
    content = message["content"].strip()
    if prompt.startswith(before) and content and content in after:
        # A template that leaves the thoughts out of earlier answers: what stays of this one must begin here.
        written = after[after.rindex(content) :]
        begin = len(prompt) - len(prompt[len(before) :].lstrip())
        if prompt.startswith(written, begin):
            return begin, begin + len(written)
    raise BadRow(
        "the model's chat template writes an earlier answer differently from how it would be generated: "
        "expected rows with one answer"
    )
