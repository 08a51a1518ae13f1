"""What a request to `mbf serve` may ask for: every field is checked before anything is computed.

Native code and the one thread that generates see only values that were checked here. A field that would change the
answer and that we do not have is refused, never dropped. `null` means the default, as it does for OpenAI.
"""

import json
from dataclasses import dataclass
from typing import Any

from mlx_lm.server import process_message_content

from mbf_mlx.config import ServeConfig
from mbf_mlx.data.row import SAME_ROLES

DEEPEST = 64  # lists and objects inside each other
MOST_STOPS = 16
LONGEST_STOP = 1000  # characters
COLDEST = 1e-3  # a lower temperature is 0: 1 / temperature must be a finite float32
SMALLEST_TOP_P = 1e-6  # a smaller one rounds to 0 in float32, and mlx then reads beyond the end of the logits
MOST_TOP_LOGPROBS = 20
MOST_SEED = (1 << 64) - 1

# Fields that change no answer of ours, whatever they hold.
_WITHOUT_EFFECT = {
    *("user", "metadata", "store", "service_tier", "safety_identifier", "prompt_cache_key", "prompt_cache_retention"),
    "parallel_tool_calls",
}
# Fields that we lack, with the values that ask for nothing.
_NOT_OURS: dict[str, tuple[Any, ...]] = {
    "n": (1,),
    "best_of": (1,),
    "echo": (False,),
    "suffix": ("",),
    "response_format": ({"type": "text"},),
    "functions": ([],),
    "function_call": ("none", "auto"),
    "modalities": (["text"],),
    "draft_model": ("default_model",),
    "adapters": (),
}
_SENTENCES = {
    "n": "n must be 1: this server gives one answer",
    "adapters": "adapters: this server answers only with its stream's own adapter",
    "draft_model": "draft_model: this server answers only with its stream's own adapter",
    "response_format": "response_format: this server gives plain text only, so it must be null or {'type': 'text'}",
}
_OURS = {
    *("model", "messages", "prompt", "stream", "stream_options", "max_tokens", "max_completion_tokens", "temperature"),
    *("top_p", "top_k", "min_p", "xtc_probability", "xtc_threshold", "repetition_penalty", "repetition_context_size"),
    *("presence_penalty", "presence_context_size", "frequency_penalty", "frequency_context_size", "logit_bias"),
    *("logprobs", "top_logprobs", "seed", "stop", "tools", "tool_choice", "chat_template_kwargs"),
}


class Refused(Exception):
    """A request that is refused with an HTTP status and a sentence."""

    def __init__(self, status: int, message: str) -> None:
        super().__init__(message)
        self.status = status


@dataclass(frozen=True)
class Asked:
    """A request whose fields were checked; `prompt` is None in a chat, `messages` is empty in a completion."""

    prompt: str | None
    messages: list[dict[str, Any]]
    tools: list[dict[str, Any]]
    template_values: dict[str, Any]
    model: str | None
    stream: bool
    include_usage: bool
    max_tokens: int
    temperature: float
    top_p: float
    top_k: int
    min_p: float
    xtc_probability: float
    xtc_threshold: float
    penalties: dict[str, float | int]  # repetition, presence and frequency, each with its context size
    logit_bias: dict[int, float] | None
    logprobs: bool
    top_logprobs: int
    seed: int | None
    stop: tuple[str, ...]


def read_body(raw: bytes) -> dict[str, Any]:
    """Return the JSON object of a request's body.

    Raises:
        Refused: it is none, is nested too deeply, or holds text that is no Unicode.
    """
    try:
        body = json.loads(raw.decode(), parse_constant=_no_constant)
    except UnicodeDecodeError:
        raise Refused(400, "expected a body in UTF-8") from None
    except RecursionError:
        raise Refused(400, "Invalid JSON in the body: lists and objects are nested too deeply") from None
    except ValueError as error:
        raise Refused(400, f"Invalid JSON in the body: {error}") from None
    if not isinstance(body, dict):
        raise Refused(400, f"the body must be a JSON dictionary, got {_short(body)}")
    level: list[Any] = [body]
    for _ in range(DEEPEST):
        inside = [value for each in level if isinstance(each, dict) for value in (*each.keys(), *each.values())]
        inside += [value for each in level if isinstance(each, list) for value in each]
        if any(isinstance(text, str) and not _is_unicode(text) for text in inside):
            raise Refused(400, "the body has half a surrogate pair (\\ud800 to \\udfff), which is no text")
        level = [each for each in inside if isinstance(each, (dict, list))]
        if not level:
            return body
    raise Refused(400, f"lists and objects may be nested {DEEPEST} deep at most")


def read_request(body: dict[str, Any], *, chat: bool, config: ServeConfig, vocabulary: int) -> Asked:
    """Return what a request asks for.

    Args:
        body: The request's JSON object.
        chat: Whether it came as a conversation, not as a text to go on from.
        config: The server's own defaults.
        vocabulary: How many logits the model has.

    Raises:
        Refused: a field has a value that does not fit, or that this server has no answer to.
    """
    _refuse_what_we_lack(body)
    fields = _Fields(body)
    penalties: dict[str, float | int] = {}
    for name, least, most in (("repetition", 0, 100), ("presence", -100, 100), ("frequency", -100, 100)):
        penalties[f"{name}_penalty"] = fields.number(f"{name}_penalty", 0, least, most)
        penalties[f"{name}_context_size"] = fields.whole(f"{name}_context_size", 20, 0, 1_000_000)
    if 0 < penalties["repetition_penalty"] < 0.01:
        raise Refused(400, "repetition_penalty must be 0 (off) or at least 0.01")
    logprobs, top_logprobs = _logprobs(fields, chat)
    temperature = fields.number("temperature", config.temp, 0, 100)
    top_p = fields.number("top_p", config.top_p, 0, 1)
    top_k = fields.whole("top_k", config.top_k, 0)
    options = fields.get("stream_options", {}, dict, "an object")
    return Asked(
        prompt=None if chat else _prompt(fields),
        messages=_messages(body.get("messages")) if chat else [],
        tools=_tools(fields) if chat else [],
        template_values=_template_values(fields),
        model=fields.get("model", None, str, "a string"),
        stream=fields.get("stream", False, bool, "true or false"),
        include_usage=_Fields(options).get("include_usage", False, bool, "true or false"),
        max_tokens=_max_tokens(fields, config.max_tokens),
        temperature=temperature if temperature >= COLDEST else 0.0,
        top_p=max(top_p, SMALLEST_TOP_P) if top_p else 0.0,
        top_k=top_k if top_k < vocabulary else 0,
        min_p=fields.number("min_p", config.min_p, 0, 1),
        xtc_probability=fields.number("xtc_probability", 0.0, 0, 1),
        xtc_threshold=fields.number("xtc_threshold", 0.1, 0, 0.5),
        penalties=penalties,
        logit_bias=_logit_bias(fields, vocabulary),
        logprobs=logprobs,
        top_logprobs=min(top_logprobs, vocabulary - 1),
        seed=fields.whole("seed", None, 0, MOST_SEED),
        stop=_stop(fields),
    )


class _Fields:
    """The fields of a JSON object, each read with a check of its own."""

    def __init__(self, body: dict[str, Any]) -> None:
        self._body = body

    def get(self, name: str, default: Any, kind: type, expected: str) -> Any:
        """Return a field of one type."""
        value = self._body.get(name)
        if value is None:
            return default
        if not isinstance(value, kind):
            raise Refused(400, f"{name} must be {expected}, got {_short(value)}")
        return value

    def number(self, name: str, default: Any, least: float, most: float | None = None, kind: Any = (int, float)) -> Any:
        """Return a finite number in a range."""
        value = self._body.get(name)
        if value is None:
            return default
        if isinstance(value, bool) or not isinstance(value, kind):
            raise Refused(400, f"{name} must be {'a whole' if kind is int else 'a'} number, got {_short(value)}")
        if value < least:
            raise Refused(400, f"{name} must be at least {least}, got {_short(value)}")
        if most is not None and value > most:
            raise Refused(400, f"{name} must be at most {most}, got {_short(value)}")
        return value

    def whole(self, name: str, default: int | None, least: int, most: int | None = None) -> Any:
        """Return a whole number in a range."""
        return self.number(name, default, least, most, int)


def _refuse_what_we_lack(body: dict[str, Any]) -> None:
    for name, value in body.items():
        if name in _OURS or name in _WITHOUT_EFFECT or value is None:
            continue
        if name not in _NOT_OURS:
            raise Refused(400, f"{_short(name)} is no field that this server knows")
        # True is no 1 here
        if not any(type(value) is type(neutral) and value == neutral for neutral in _NOT_OURS[name]):
            raise Refused(400, _SENTENCES.get(name, f"{name}: this server does not have it, got {_short(value)}"))


def _max_tokens(fields: _Fields, default: int) -> int:
    old = fields.whole("max_tokens", default, 1)
    return int(fields.whole("max_completion_tokens", old, 1))


def _prompt(fields: _Fields) -> str:
    prompt = fields.get("prompt", "", str, "a string that is not empty")
    if not prompt:
        raise Refused(400, "prompt must be a string that is not empty")
    return str(prompt)


def _messages(messages: Any) -> list[dict[str, Any]]:
    if not messages or not _is_list(messages, dict) or not all(isinstance(m.get("role"), str) for m in messages):
        raise Refused(400, "messages must be a list of at least one object with role and content")
    for message in messages:
        if message.get("content") is None and not message.get("tool_calls"):
            raise Refused(400, f"messages: content must be text, got none with role {_short(message['role'])}")
        calls = message.get("tool_calls")
        if not (calls is None or (_is_list(calls, dict) and all(_is_function(call) for call in calls))):
            raise Refused(400, "messages: tool_calls must be a list of objects with a function that has a name")
        if not all(_is_json(call["function"].get("arguments", "{}")) for call in calls or ()):
            raise Refused(400, "messages: the arguments of tool_calls must be an object, or its JSON in a string")
        parts = message.get("content")
        if isinstance(parts, list) and not all(_is_text_part(part) for part in parts):
            raise Refused(400, 'messages: content must be text, or a list of {"type": "text", "text": "…"}')
    try:
        process_message_content(messages)  # joins lists of texts
    except (ValueError, LookupError, TypeError, AttributeError, RecursionError) as error:
        raise Refused(400, f"messages: {error}") from None
    if not all(isinstance(message["content"], str) for message in messages):
        raise Refused(400, "messages: content must be text")
    # The names that rows of a task may use mean the same here.
    return [{**message, "role": SAME_ROLES.get(message["role"], message["role"])} for message in messages]


def _tools(fields: _Fields) -> list[dict[str, Any]]:
    tools, choice = fields.get("tools", [], list, "a list"), fields.get("tool_choice", "auto", object, "")
    if not all(isinstance(tool, dict) and _is_function(tool) for tool in tools):
        raise Refused(400, "tools must be a list of objects with a function that has a name")
    if choice not in ("auto", "none"):
        raise Refused(400, f"tool_choice must be 'auto' or 'none': no call can be forced here, got {_short(choice)}")
    return list(tools) if choice == "auto" else []


def _is_function(value: dict[str, Any]) -> bool:
    function = value.get("function")
    return isinstance(function, dict) and isinstance(function.get("name"), str) and bool(function["name"])


def _is_text_part(part: Any) -> bool:
    return isinstance(part, dict) and part.get("type") == "text" and isinstance(part.get("text"), str)


def _is_json(arguments: Any) -> bool:
    if isinstance(arguments, dict):
        return True
    try:
        return isinstance(json.loads(arguments), dict)
    except (ValueError, TypeError, RecursionError):
        return False


def _template_values(fields: _Fields) -> dict[str, Any]:
    values: dict[str, Any] = fields.get("chat_template_kwargs", {}, dict, "an object")
    for name, value in values.items():
        small = not isinstance(value, (int, float)) or abs(value) <= 1_000_000
        if isinstance(value, (dict, list)) or not small or len(str(value)) > LONGEST_STOP:
            raise Refused(400, f"chat_template_kwargs: {_short(name)} must be true, false, a number or a short text")
    return values


def _logprobs(fields: _Fields, chat: bool) -> tuple[bool, int]:
    """Return whether log-probabilities are wanted, and of how many likeliest tokens; a completion gives that number."""
    if chat:
        wanted = fields.get("logprobs", False, bool, "true or false")
        top = fields.whole("top_logprobs", 0, 0, MOST_TOP_LOGPROBS)
        if top and not wanted:
            raise Refused(400, "top_logprobs needs logprobs to be true")
        return wanted, top
    if isinstance(old := fields.get("logprobs", False, object, ""), bool):
        return old, int(fields.whole("top_logprobs", 0, 0, MOST_TOP_LOGPROBS)) if old else 0
    return True, int(fields.whole("logprobs", 0, 0, MOST_TOP_LOGPROBS))


def _logit_bias(fields: _Fields, vocabulary: int) -> dict[int, float] | None:
    biases: dict[int, float] = {}
    given = fields.get("logit_bias", {}, dict, "an object of token ids and numbers")
    for token in given:
        if not (token.isascii() and token.isdigit()) or str(int(token[:12])) != token or int(token) >= vocabulary:
            raise Refused(400, f"logit_bias: token ids go from 0 to {vocabulary - 1}, got {_short(token)}")
        try:
            biases[int(token)] = float(_Fields(given).number(token, 0.0, -100, 100))
        except Refused as refused:
            raise Refused(400, f"logit_bias: the bias of token {refused}") from None
    return biases or None


def _stop(fields: _Fields) -> tuple[str, ...]:
    stop = fields.get("stop", [], object, "")
    stops = [stop] if isinstance(stop, str) else stop
    if not _is_list(stops, str):
        raise Refused(400, f"stop must be a string or a list of strings, got {_short(stop)}")
    if len(stops) > MOST_STOPS or not all(0 < len(text) <= LONGEST_STOP for text in stops):
        raise Refused(400, f"stop: expected at most {MOST_STOPS} strings of 1 to {LONGEST_STOP} characters")
    return tuple(stops)


def _is_list(value: Any, kind: type) -> bool:
    return isinstance(value, list) and all(isinstance(item, kind) for item in value)


def _is_unicode(text: str) -> bool:
    return text.isascii() or not any("\ud800" <= letter <= "\udfff" for letter in text)


def _no_constant(name: str) -> None:
    raise ValueError(f"{name} is no JSON number")


def _short(value: Any) -> str:
    """Return a value for a message: as JSON, without control characters, and short."""
    text = "a list" if isinstance(value, list) else "an object" if isinstance(value, dict) else json.dumps(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
