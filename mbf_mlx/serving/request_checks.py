"""Checks of requests to `mbf serve`: mlx-lm's handler, with the checks that it lacks.

These requests are refused with one sentence: a body that is too large, another model than the stream's, an image
(mlx-lm would fetch it from any address in the request), and values that would fail in the middle of an answer. A stream
that was taught without a chat template answers without one.
"""

import json
import logging
from typing import Any

from mlx_lm.server import APIHandler, CompletionRequest, ResponseGenerator, process_message_content

from mbf_mlx.serving.speaker import plain_text

TIMEOUT = 120.0  # seconds that we wait for a client to send or to receive


class _Refused(Exception):
    """A request that is refused with an HTTP status and a sentence."""

    def __init__(self, status: int, message: str) -> None:
        super().__init__(message)
        self.status = status


class Handler(APIHandler):
    """mlx-lm's handler for one stream; `generator.model_provider` is our `server.StreamProvider`."""

    timeout = TIMEOUT
    requested_model: str
    adapter: str | None
    stream_options: Any

    def __init__(self, generator: ResponseGenerator, max_bytes: int, *args: Any, **options: Any) -> None:
        self._provider = generator.model_provider
        self._max_bytes = max_bytes
        super().__init__(generator, *args, **options)

    def do_POST(self) -> None:
        """Answer a request, or refuse it with a sentence."""
        try:
            self._check_length()
            super().do_POST()
        except _Refused as refused:
            self._refuse(refused.status, str(refused))
        except UnicodeDecodeError:
            self._refuse(400, "expected a body in UTF-8")

    def _check_length(self) -> None:
        length = self.headers.get("Content-Length", "")
        if length and not length.isdecimal():
            raise _Refused(400, f"Content-Length: expected a number, got {length!r}")
        if length and int(length) > self._max_bytes:
            raise _Refused(413, f"expected at most {self._max_bytes} bytes (--max-request-bytes), got {length}")

    def validate_model_parameters(self) -> None:
        """Check the request and choose the adapter that answers; mlx-lm calls this before it starts an answer."""
        try:
            super().validate_model_parameters()
        except ValueError as error:
            raise _Refused(400, str(error)) from error
        own, asked = self._provider.name, self.requested_model
        if asked not in (own, "default_model"):
            raise _Refused(404, f"model: this server has only {own!r}, got {asked!r}")
        if self.adapter is not None or self.requested_draft_model != "default_model":
            raise _Refused(400, "adapters, draft_model: this server answers only with its stream's own adapter")
        stop = self.body.get("stop")
        if not (stop is None or isinstance(stop, str) or _is_list(stop, str)):
            raise _Refused(400, "stop must be a string or a list of strings")
        if self.body.get("n") not in (None, 1):
            raise _Refused(400, "n must be 1: this server gives one answer")
        if self.path.endswith("/chat/completions"):
            self._check_messages()
        elif not isinstance(self.body.get("prompt"), str) or not self.body["prompt"]:
            raise _Refused(400, "prompt must be a string that is not empty")
        options = self.stream_options or {}
        self.stream_options = options if isinstance(options, dict) and options.get("include_usage") else None
        # mlx-lm loads another model when a request names another one; a newly learned adapter counts as one.
        self.requested_model, self.adapter = own, self._provider.adapter()

    def _check_messages(self) -> None:
        messages = self.body.get("messages")
        if not messages or not _is_list(messages, dict) or not all(isinstance(m.get("role"), str) for m in messages):
            raise _Refused(400, "messages must be a list of at least one object with role and content")
        try:
            process_message_content(messages)  # joins lists of texts
        except (ValueError, LookupError, TypeError) as error:
            raise _Refused(400, f"messages: {error}") from error
        if not all(isinstance(message["content"], str) for message in messages):
            raise _Refused(400, "messages: content must be text")

    def handle_chat_completions(self) -> CompletionRequest:
        """Return the conversation to answer, as plain text if the stream was taught without a template."""
        request = super().handle_chat_completions()
        if self._provider.folder.identity.template == "none":
            return CompletionRequest("text", plain_text(request.messages), [], None, None)
        return request

    def handle_models_request(self) -> None:
        """Answer with the only model."""
        own = {"id": self._provider.name, "object": "model", "created": self.created, "owned_by": "mbf"}
        asked = self.path.removeprefix("/v1/models").strip("/")
        if not asked:
            self._answer(200, {"object": "list", "data": [own]})
        elif asked == self._provider.name:
            self._answer(200, own)
        else:
            self._refuse(404, f"model: this server has only {self._provider.name!r}, got {asked!r}")

    def log_message(self, format: str, *args: Any) -> None:
        """Log a request to mlx-lm's log, not to stderr."""
        logging.info(format, *args)

    def _refuse(self, status: int, message: str) -> None:
        # in OpenAI's form; its client shows no other message
        self._answer(status, {"error": {"message": message, "type": "invalid_request_error"}})

    def _answer(self, status: int, document: dict[str, Any]) -> None:
        raw = json.dumps(document).encode()
        self._set_completion_headers(status)
        self.send_header("Content-Length", str(len(raw)))
        self.end_headers()
        self.wfile.write(raw)


def _is_list(value: Any, kind: type) -> bool:
    return isinstance(value, list) and all(isinstance(item, kind) for item in value)
