"""Answers in OpenAI's form: from the tokens that mlx-lm's loop gives to documents, whole or in pieces."""

import json
import math
import time
import uuid
from collections.abc import Callable
from typing import Any

from mlx_lm.generate import TextStateMachine
from mlx_lm.server import GenerationContext, Response, ToolCallFormatter

from mbf_mlx.serving.request_checks import Asked

LEAST_LOGPROB = -9999.0  # OpenAI's number for a token that cannot come; JSON has no infinity


class StopText:
    """Ends a text before the first of some stop sequences, wherever the tokens' borders are."""

    def __init__(self, stops: tuple[str, ...]) -> None:
        self._stops, self._held = stops, ""
        self._hold = max(map(len, stops), default=1) - 1
        self.found = False

    def feed(self, text: str, *, last: bool = False) -> str:
        """Return what of the text may be shown; the letters that could begin a stop sequence are held back."""
        if self.found:
            return ""
        text = self._held + text
        places = [place for stop in self._stops if (place := text.find(stop)) >= 0]
        if places:
            self.found, self._held = True, ""
            return text[: min(places)]
        keep = 0 if last else self._could_begin(text)
        self._held = text[len(text) - keep :]
        return text[: len(text) - keep]

    def _could_begin(self, text: str) -> int:
        for length in range(min(self._hold, len(text)), 0, -1):
            if any(stop.startswith(text[-length:]) for stop in self._stops):
                return length
        return 0


class Answer:
    """One answer while it is written.

    Args:
        asked: The request.
        context: How mlx-lm reads this answer's text: thoughts, calls of tools.
        model: The model's name.
        words: From a token's id to its text.
    """

    def __init__(self, asked: Asked, context: GenerationContext, model: str, words: Callable[[int], str]) -> None:
        self._asked, self._context, self._words = asked, context, words
        self.chat = asked.prompt is None
        self._head = {
            "id": f"{'chatcmpl' if self.chat else 'cmpl'}-{uuid.uuid4()}",
            "object": self._kind(),
            "created": int(time.time()),
            "model": model,
        }
        self._calls = ToolCallFormatter(context.tool_parser, asked.tools, asked.stream)
        self._state = context.text_sm.make_state(context.initial_state)
        self._before = context.initial_state
        self._stop = StopText(asked.stop)
        self._tool_text, self._called = "", False
        self._first, self._offset = True, 0
        self.tokens = 0
        self.finish: str | None = None
        self.text, self.thought = "", ""  # what was not sent yet
        self.calls: list[dict[str, Any]] = []
        self.logprobs: list[dict[str, Any]] = []

    def feed(self, reply: Response) -> None:
        """Add one token."""
        self.tokens += 1
        ended = reply.finish_reason is not None
        self._state, segments = TextStateMachine.split(self._state, reply.text)
        if ended:
            self._state, rest, state = TextStateMachine.flush(self._state)
            segments.append((state, rest))
        for state, text in segments:
            self._add(state, text)
        if self._asked.logprobs and reply.finish_reason != "stop":
            self.logprobs.append(self._logprob(reply))
        if self._stop.found:
            self.finish = "stop"
        elif ended:
            self.end(reply.finish_reason or "stop")

    def end(self, reason: str) -> None:
        """End the answer; `reason` is "stop", or "length" where a limit ended it."""
        if self._tool_text:
            self._call()
        self.text += self._stop.feed("", last=True)
        self.finish = "tool_calls" if self._called and reason == "stop" else reason

    def _add(self, state: str, text: str) -> None:
        if self._before == "tool" and state != "tool" and self._tool_text:
            self._call()
        self._before = state
        if state == "reasoning":
            self.thought += text
        elif state == "tool":
            self._tool_text += text
        else:
            self.text += self._stop.feed(text)

    def _call(self) -> None:
        text, self._tool_text = self._tool_text, ""
        try:
            calls = self._calls([text])
        except Exception:  # the model wrote this text, and a tool parser of mlx-lm's may raise anything about it
            calls = []
        if calls:
            self.calls, self._called = self.calls + calls, True
        else:
            self.text += text

    def _logprob(self, reply: Response) -> dict[str, Any]:
        likeliest = sorted(reply.top_tokens, key=lambda each: -each["logprob"])
        tops = [self._token(each["id"], each["logprob"]) for each in likeliest[: self._asked.top_logprobs]]
        return self._token(reply.token, reply.logprob) | {"top_logprobs": tops}

    def _token(self, token: int, logprob: float) -> dict[str, Any]:
        text = self._words(token)
        spelled = None if "\ufffd" in text else list(text.encode())
        return {"token": text, "logprob": logprob if math.isfinite(logprob) else LEAST_LOGPROB, "bytes": spelled}

    # Documents

    def _kind(self) -> str:
        if not self.chat:
            return "text_completion"
        return "chat.completion.chunk" if self._asked.stream else "chat.completion"

    def piece(self) -> bytes | None:
        """Return what is new as an event of a stream, None if nothing is."""
        if not (self.text or self.thought or self.calls or self.logprobs or self.finish or self._first):
            return None
        choice: dict[str, Any] = {"index": 0, "finish_reason": self.finish, "logprobs": self._logprobs_document()}
        if self.chat:
            delta: dict[str, Any] = {"role": "assistant"} if self._first else {}
            delta |= {"content": self.text} if self.text or self._first else {}
            choice["delta"] = delta | self._more()
        else:
            choice["text"] = self.text
        self._first = False
        self.text, self.thought, self.calls, self.logprobs = "", "", [], []
        return event(self._head | {"choices": [choice]})

    def whole(self) -> dict[str, Any]:
        """Return the whole answer."""
        choice: dict[str, Any] = {"index": 0, "finish_reason": self.finish, "logprobs": self._logprobs_document()}
        if self.chat:
            content = self.text or (None if self.calls else "")
            choice["message"] = {"role": "assistant", "content": content} | self._more()
        else:
            choice["text"] = self.text
        return self._head | {"choices": [choice], "usage": self.usage()}

    def usage_piece(self) -> bytes:
        """Return the event that ends a stream whose client asked for its usage."""
        return event(self._head | {"choices": [], "usage": self.usage()})

    def usage(self) -> dict[str, Any]:
        """Return how many tokens were read and written."""
        read, known = len(self._context.prompt), max(self._context.prompt_cache_count, 0)
        usage = {"prompt_tokens": read, "completion_tokens": self.tokens, "total_tokens": read + self.tokens}
        return usage | {"prompt_tokens_details": {"cached_tokens": known}}

    def _more(self) -> dict[str, Any]:
        more: dict[str, Any] = {"reasoning": self.thought} if self.thought else {}
        return more | ({"tool_calls": self.calls} if self.calls else {})

    def _logprobs_document(self) -> dict[str, Any] | None:
        if not self._asked.logprobs:
            return None
        if self.chat:
            return {"content": self.logprobs, "refusal": None}
        offsets = []
        for each in self.logprobs:
            offsets.append(self._offset)
            self._offset += len(each["token"])
        tops = [{top["token"]: top["logprob"] for top in each["top_logprobs"]} for each in self.logprobs]
        return {
            "tokens": [each["token"] for each in self.logprobs],
            "token_logprobs": [each["logprob"] for each in self.logprobs],
            "top_logprobs": tops if self._asked.top_logprobs else None,
            "text_offset": offsets,
        }


def event(document: dict[str, Any]) -> bytes:
    """Return a document as an event of a stream."""
    return f"data: {json.dumps(document)}\n\n".encode()


def error_document(status: int, message: str) -> dict[str, Any]:
    """Return an error in OpenAI's form; its client shows no other message."""
    kinds = {401: "authentication_error", 403: "permission_error"}
    kind = kinds.get(status, "invalid_request_error" if status < 500 else "server_error")
    return {"error": {"message": message, "type": kind, "param": None, "code": None}}
