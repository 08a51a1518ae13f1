"""One row of a task file, whatever its format: what it holds, and the rules that it must meet.

A row is one of three kinds, as in mlx-lm's data sets: "completion" (a prompt and its answer), "messages" (a
conversation, perhaps with tools) and "text". Reading files is left to formats.py, tokens to encode.py.
"""

import hashlib
import json
from collections.abc import Mapping, Set
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from mbf_mlx.data import row_hints as hints

ROLES = ("system", "user", "assistant", "tool")
SAME_ROLES = {"developer": "system", "function": "tool"}  # OpenAI's newest name, and an older one
READ = {  # the keys that are read of a row of each kind
    "completion": {"prompt", "completion", "system", "tools", "functions"},
    "messages": {"messages", "system", "tools", "functions"},
    "text": {"text"},
}
NAMES = {"completion": "prompt/completion", "messages": "messages", "text": "text"}
EXAMPLES = {
    "completion": '{"prompt": "Is this mail spam?\\nYou won!\\nAnswer:", "completion": " yes"}',
    "messages": '{"messages": [{"role": "user", "content": "Hello"}, {"role": "assistant", "content": "Hi there"}]}',
    "text": '{"text": "Ferns are plants without flowers."}',
}

_OWN_KEYS = ("role", "content", "weight")  # of a message; its others are for the chat template
_ENCODER = json.JSONEncoder(sort_keys=True)  # made once: a large file has ten million rows


class BadRow(ValueError):
    """A row that cannot be learned: the reason in one line and, where the fix is clear, the row put right."""

    def __init__(self, reason: str, fixed: str = ""):
        super().__init__(reason)
        self.fixed = fixed
        self.example = ""  # a good row of the kind that this one was meant to be


class Skipped(BadRow):
    """A row without anything to learn, known in a published benchmark: it gets a warning, not an error."""


@dataclass(frozen=True, slots=True)
class Row:
    """One row and the place it came from."""

    kind: str  # "completion", "messages" or "text"
    file: Path
    line: int  # from 1
    prompt: str = ""
    completion: str = ""
    answers: tuple[str, ...] = ()  # every answer that counts as right; the first is the completion
    messages: tuple[dict[str, Any], ...] = ()
    tools: tuple[dict[str, Any], ...] = ()
    text: str = ""
    system: str = ""  # of a completion: what stands before its prompt; a conversation has it among its messages
    unread: tuple[str, ...] = field(default=(), compare=False)  # keys that hold something and are not read
    digest: bytes = field(default=b"", compare=False)  # 16 bytes over what the row says; its place does not count

    def __post_init__(self) -> None:
        said = [self.kind, self.prompt, self.completion, self.answers, self.messages, self.tools, self.text]
        said += [self.system] if self.system else []
        digest = hashlib.blake2b(_ENCODER.encode(said).encode(), digest_size=16).digest()
        object.__setattr__(self, "digest", digest)

    @property
    def where(self) -> str:
        """The row's place as errors name it: `file:line`."""
        return f"{self.file}:{self.line}"

    @property
    def short_digest(self) -> int:
        """The first 8 bytes of the digest as a number: enough to find rows that say the same."""
        return int.from_bytes(self.digest[:8])

    @property
    def texts(self) -> list[str]:
        """All texts of the row, without the names of the speakers."""
        return [
            self.system,
            self.prompt,
            self.completion,
            self.text,
            *(message["content"] for message in self.messages),
        ]

    @property
    def letters(self) -> int:
        """The length of all texts together, in characters."""
        return sum(map(len, self.texts))


def row_from(document: object, file: Path, line: int) -> Row:
    """Return the row that a JSON value describes.

    A row with the keys of several kinds is read as mlx-lm reads it: prompt and completion before messages before text.
    The row says which other keys hold something.

    Raises:
        BadRow: the value is no object, or its keys, types or texts do not fit.
    """
    if not isinstance(document, dict):
        raise BadRow(f'expected an object {{"prompt": …, "completion": …}}, got {_type(document)}')
    kind = _kind(document)
    if kind is None:
        raise _wrong_keys(document)
    try:
        return replace(_row(kind, document, file, line), unread=held_keys(document, READ[kind]))
    except BadRow as error:
        error.fixed, error.example = error.fixed or _shown(hints.put_right(document)), EXAMPLES[kind]
        raise


def held_keys(document: Mapping[str, Any], read: Set[str]) -> tuple[str, ...]:
    """Return the keys of an object that hold something and are not among those that are `read`."""
    return tuple(key for key in document if key not in read and document[key] not in (None, "", [], {}))


def _kind(document: dict[str, Any]) -> str | None:
    if "prompt" in document and "completion" in document:
        return "completion"
    return next((key for key in ("messages", "text") if key in document), None)


def _row(kind: str, document: dict[str, Any], file: Path, line: int) -> Row:
    if kind == "completion":
        prompt, completion = _text(document, "prompt"), _text(document, "completion")
        answers, tools, system = (completion,), _tools(document), _system(document)
        return Row("completion", file, line, prompt, completion, answers, tools=tools, system=system)
    if kind == "messages":
        messages = _messages(document["messages"])
        if system := _system(document):
            if messages[0]["role"] == "system" and messages[0]["content"].strip() != system.strip():
                raise BadRow('"system" and messages[0] are two system messages: expected one')
            messages = ({"role": "system", "content": system}, *messages[messages[0]["role"] == "system" :])
        return Row("messages", file, line, messages=messages, tools=_tools(document))
    if "tools" in document:
        raise BadRow('"tools" go with "messages", not with "text"')
    return Row("text", file, line, text=_text(document, "text"))


def reference_text(row: Row) -> str:
    """Return the answer that a row expects, without white space around it; "" for text rows."""
    if row.kind == "messages":
        return str(row.messages[-1]["content"]).strip()
    return row.completion.strip()


def check_text(text: object, name: str, *, may_be_empty: bool = False) -> str:
    """Return `text` if it says something and a tokenizer can take it; `name` is what errors call it.

    Raises:
        BadRow: another type, only white space, half a surrogate pair, or a NUL byte.
    """
    if not isinstance(text, str):
        raise BadRow(f"{name}: expected text, got {_type(text)}")
    if not may_be_empty and not text.strip():
        raise BadRow(f"{name}: expected text, got {'nothing but white space' if text else 'nothing'}")
    if "\0" in text:
        raise BadRow(f"{name}: holds a NUL byte (is the file UTF-16, or binary?)")
    if not text.isascii() and any("\ud800" <= letter <= "\udfff" for letter in text):
        raise BadRow(f"{name}: holds half a surrogate pair (\\ud800 to \\udfff), which is no character")
    return text


def _text(document: Mapping[str, Any], key: str) -> str:
    return check_text(document[key], f'"{key}"')


def _type(value: object) -> str:
    if value is None or isinstance(value, bool):
        return json.dumps(value)
    names = {int: "a number", float: "a number", str: "text", list: "a list"}
    return names.get(type(value), "an object")


def _tools(document: Mapping[str, Any]) -> tuple[dict[str, Any], ...]:
    """Return the tools of a row; "functions" is OpenAI's older key for them."""
    key = "tools" if document.get("tools") is not None else "functions"
    tools = document.get(key)
    if tools is None:
        return ()
    if not isinstance(tools, list) or not all(isinstance(tool, dict) for tool in tools):
        raise BadRow(f'"{key}": expected a list of objects')
    check_text(json.dumps(tools, ensure_ascii=False), f'"{key}"')
    return tuple(tools) if key == "tools" else tuple({"type": "function", "function": tool} for tool in tools)


def _system(document: Mapping[str, Any]) -> str:
    return "" if document.get("system") in (None, "") else _text(document, "system")


def _messages(messages: object) -> tuple[dict[str, Any], ...]:
    """Return the messages up to the last answer that is learned, if they fit, each content as one text."""
    if not isinstance(messages, list):
        raise BadRow(f'"messages": expected a list, got {_type(messages)}')
    if not messages:
        raise BadRow("\"messages\": expected at least a user's and an assistant's message, got an empty list")
    checked = tuple(_message(message, f"messages[{place}]") for place, message in enumerate(messages))
    roles = [message["role"] for message in checked]
    if "assistant" not in roles:
        raise BadRow("no message of the assistant: expected an answer to learn")
    if roles[0] == "assistant":
        raise BadRow("messages[0] is the assistant's: expected a message before it that it answers")
    if roles[-1] != "assistant":
        raise BadRow(
            f"the last message is of role {roles[-1]}: expected the assistant's answer (add it, or end before)"
        )
    learned = [i for i, message in enumerate(checked) if is_learned(message)]
    if not learned:
        raise BadRow("every answer has the weight 0: expected one to learn")
    return checked[: learned[-1] + 1]


def is_learned(message: Mapping[str, Any]) -> bool:
    """Return whether a message of a row is an answer to learn: OpenAI's weight 0 marks one that is only read."""
    return message["role"] == "assistant" and message.get("weight") != 0


def _message(message: object, name: str) -> dict[str, Any]:
    if not isinstance(message, dict):
        raise BadRow(f'{name}: expected an object {{"role": …, "content": …}}, got {_type(message)}')
    if "role" not in message:
        keys = hints.list_keys(message) + hints.suggest_names(message, "role", "content")
        raise BadRow(f'{name}: expected "role" and "content", got {keys}')
    if isinstance(call := message.get("function_call"), dict) and not message.get("tool_calls"):  # OpenAI's older key
        message = {**message, "function_call": None, "tool_calls": [{"type": "function", "function": call}]}
    role = message["role"]
    role = SAME_ROLES.get(role, role) if isinstance(role, str) else role
    if role not in ROLES:
        got = json.dumps(role)[:40] if isinstance(role, str) else _type(role)
        meant = hints.ROLES.get(role) if isinstance(role, str) else None
        hint = f' (write "{meant}")' if meant else ""
        raise BadRow(f"{name}.role: expected {', '.join(ROLES[:-1])} or {ROLES[-1]}, got {got}{hint}")
    calls = message.get("tool_calls")
    if calls is not None and (not isinstance(calls, list) or not all(isinstance(call, dict) for call in calls)):
        raise BadRow(f"{name}.tool_calls: expected a list of objects")
    weight = message.get("weight")
    if weight not in (None, 0, 1):
        raise BadRow(f"{name}.weight: expected 0 (only read) or 1 (learned), got {json.dumps(weight)[:40]}")
    if weight and role != "assistant":
        raise BadRow(f"{name}.weight: only an assistant's message is learned, got 1 with the role {role}")
    content = _content(message, name)
    others = {key: value for key, value in message.items() if key not in _OWN_KEYS and value is not None}
    check_text(json.dumps(others, ensure_ascii=False), name)
    if calls:
        others["tool_calls"] = [_plain_call(call) for call in calls]
    if weight == 0 and role == "assistant":
        others["weight"] = 0
    return {"role": role, "content": content, **others}


def _content(message: dict[str, Any], name: str) -> str:
    """Return the text of a message; only a message with tool calls may have none."""
    calls = message.get("tool_calls")
    if "content" not in message and not calls:
        raise BadRow(
            f'{name}: expected "content", got {hints.list_keys(message)}{hints.suggest_names(message, "content")}'
        )
    content = message.get("content")
    if isinstance(content, list):
        content = "".join(_part(part, f"{name}.content[{place}]") for place, part in enumerate(content))
    if content is None and calls:
        content = ""
    must_speak = message["role"] == "user" or (message["role"] == "assistant" and not calls)
    return check_text(content, f"{name}.content", may_be_empty=not must_speak)


def _part(part: object, name: str) -> str:
    """Return the text of one part, where a content is a list of parts as chat interfaces write it."""
    if isinstance(part, dict) and part.get("type") == "text" and isinstance(text := part.get("text"), str):
        return text
    raise BadRow(f'{name}: expected {{"type": "text", "text": …}}; pictures and sound cannot be learned')


def _plain_call(call: dict[str, Any]) -> dict[str, Any]:
    """Return a tool call with its arguments as an object: chat templates turn them into JSON themselves."""
    function = call.get("function")
    if not isinstance(function, dict) or not isinstance(function.get("arguments"), str):
        return call
    try:
        arguments = json.loads(function["arguments"])
    except (ValueError, RecursionError):
        return call
    return {**call, "function": {**function, "arguments": arguments}} if isinstance(arguments, dict) else call


def _wrong_keys(document: dict[str, Any]) -> BadRow:
    """Return the error for a row of no known kind, with the keys to rename where the meaning can be guessed."""
    wrong = f'expected "prompt" and "completion", or "messages", or "text", got {hints.list_keys(document)}'
    if {"instruction", "input", "output"} <= document.keys():
        prompt = "\n".join(str(document[key]) for key in ("instruction", "input") if document[key])
        hint = ' (write "instruction" and "input" together as "prompt", and "output" as "completion")'
        return BadRow(wrong + hint, _shown({"prompt": prompt, "completion": document["output"]}))
    for keys in (("prompt", "completion"), ("messages",), ("text",)):
        renamed = {old: key for key in keys if (old := hints.find_meant(document, key))}
        if len(renamed) == len(keys):
            right = hints.put_right({renamed.get(key, key): value for key, value in document.items()})
            return BadRow(wrong + hints.suggest_names(document, *keys), _shown(right))
    return BadRow(wrong)


def _shown(document: dict[str, Any]) -> str:
    """Return a row as a line to print, with shortened texts; "" if it still does not fit or is too long."""
    kind = _kind(document)
    if kind is None:
        return ""
    try:
        _row(kind, document, Path(), 0)
    except BadRow:
        return ""
    short = {k: v if len(v) <= 60 else v[:59] + "…" for k, v in document.items() if isinstance(v, str)}
    line = json.dumps({key: short.get(key, value) for key, value in document.items()}, ensure_ascii=False)
    return line if len(line) <= 300 else ""
