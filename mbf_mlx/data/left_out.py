"""What rows hold and a model's chat template leaves out: tools, calls, names, messages of some role.

A template may ignore a part of a conversation without a word. A part counts as written if the text differs without it.
"""

from collections import Counter
from collections.abc import Iterator
from typing import Any

from mbf_mlx.data.answer_places import messages_of
from mbf_mlx.data.chat_template import ChatTemplate, Messages
from mbf_mlx.data.row import Row

MARK = "\ue000"
SURE = 100  # rows with a part left out, from which on others like them are only counted: rendering takes time


class LeftOut:
    """Counts the rows with parts that the template leaves out.

    Args:
        template: The model's chat template; None where prompts stand as they are.
    """

    def __init__(self, template: ChatTemplate | None) -> None:
        self._template = template
        self._written: set[str] = set()  # parts that the template writes: they are not looked at again
        self._rows = Counter[str]()  # part -> rows

    def note(self, row: Row) -> None:
        """Look at one row."""
        for part, messages, tools in _without(row, self._written):
            if self._rows[part] < SURE and self._is_written(row, messages, tools):
                self._written.add(part)
            else:
                self._rows[part] += 1

    def warnings(self) -> list[str]:
        """Return what was left out, in one sentence."""
        if not self._rows:
            return []
        parts = ", ".join(f"{part} ({count} {'row' if count == 1 else 'rows'})" for part, count in self._rows.items())
        return [f"{'the chat template leaves out' if self._template else 'not read without a chat template'}: {parts}"]

    def _is_written(self, row: Row, messages: Messages, tools: Any) -> bool:
        if self._template is None:
            return False
        with_it = self._template.text((row, messages_of(row), row.tools), ask=False)
        without = self._template.text((row, messages, tools), ask=False)
        # A row that the template refuses is told of elsewhere; a part that it asks for, it reads.
        return not isinstance(with_it, str) or with_it != without


def _without(row: Row, known: set[str]) -> Iterator[tuple[str, Messages, Any]]:
    """Yield each part of a row that is not known yet, with the row's messages and tools without it."""
    messages = messages_of(row)
    if row.tools and "tools" not in known:
        yield "tools", messages, ()
    if row.kind == "completion" and not row.system:
        return
    for role in dict.fromkeys(message["role"] for message in messages if message["role"] != "assistant"):
        part = f"messages of the role {role}"
        if part not in known:
            yield part, [{**m, "content": MARK + m["content"]} if m["role"] == role else m for m in messages], row.tools
    for key in dict.fromkeys(key for message in messages for key in message):
        part = f"{key} of messages"
        if key not in ("role", "content", "weight") and part not in known:
            yield part, [{k: v for k, v in m.items() if k != key} for m in messages], row.tools
