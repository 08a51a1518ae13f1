"""One HTTP request to `mbf serve`: who asks, what for, and the answer, whole or in pieces.

A request is read here and its prompt made into tokens, in the request's own thread. The thread that generates
(generator.py) is shared by all and sees nothing that was not checked.
"""

import json
import logging
import select
import socket
import time
from abc import ABC, abstractmethod
from collections.abc import Callable
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import unquote, urlsplit

from mlx_lm.server import (
    GenerationArguments,
    GenerationContext,
    LogitsProcessorArguments,
    ModelDescription,
    Response,
    SamplingArguments,
)

from mbf_mlx.serving.answers import Answer, error_document, event
from mbf_mlx.serving.callers import check_host, check_key, check_origin
from mbf_mlx.serving.generator import Generator, Unanswered
from mbf_mlx.serving.prompts import prepare
from mbf_mlx.serving.request_checks import Asked, Refused, read_body, read_request

RECEIVE = 30.0  # seconds that a client has to send its request, and to take what we write
CHATS = ("/v1/chat/completions", "/chat/completions")
COMPLETIONS = ("/v1/completions", "/completions")
KEEP_ALIVE = b": the prompt is being read\n\n"


class Watcher(ThreadingHTTPServer, ABC):
    """A server that its handlers can report to, and that cuts off a connection which takes too long."""

    say: Callable[[str], None]  # takes one line for whoever runs the server
    started: int  # seconds since 1970

    @abstractmethod
    def watch(self, connection: socket.socket, seconds: float) -> None:
        """Cut a connection off after so many seconds from now."""


class Handler(BaseHTTPRequestHandler):
    """Answers one request."""

    server: Watcher
    server_version, sys_version = "mbf", ""
    timeout = RECEIVE

    def __init__(self, generator: Generator, *args: Any) -> None:
        self._generator, self._provider = generator, generator.model_provider
        self._config = self._provider.config
        self._origin: str | None = None
        self._started = self._unread = False
        super().__init__(*args)

    # Paths

    def do_POST(self) -> None:
        """Answer a conversation or a text."""
        self._guarded(self._post)

    def do_GET(self) -> None:
        """Answer what models there are, and whether the server can answer."""
        self._guarded(self._get)

    def do_HEAD(self) -> None:
        """Answer as to GET, without the document."""
        self._guarded(self._get)

    def do_OPTIONS(self) -> None:
        """Tell a browser that a page which may call us may do so."""
        self._guarded(lambda: self._answer(HTTPStatus.NO_CONTENT, None))

    def _guarded(self, action: Callable[[], None]) -> None:
        """Do it, and turn whatever goes wrong into an answer in OpenAI's form."""
        self._unread = self.command == "POST"
        try:
            hosts = self.headers.get_all("Host", [])
            check_host(hosts, str(self.connection.getsockname()[0]), self._config)
            self._origin = check_origin(self.headers.get_all("Origin", []), hosts, self._config)
            action()
        except Refused as refused:
            self._refuse(refused.status, str(refused))
        except Unanswered as error:
            self._refuse(500, f"the answer failed: {error}")
        except (ConnectionError, TimeoutError):
            raise  # the server says that the client went away
        except BaseException as error:  # a panic in a tokenizer's Rust code is no Exception
            self.server.say(f"{self.client_address[0]}: a request failed: {type(error).__name__}: {error}")
            self._refuse(500, f"the server failed: {type(error).__name__}")

    def _path(self) -> str:
        try:
            return unquote(urlsplit(self.path).path)
        except ValueError:
            raise Refused(400, "the path cannot be read") from None

    def _get(self) -> None:
        path = self._path()
        if path == "/health":
            healthy = self._generator.is_healthy
            self._answer(200 if healthy else 503, {"status": "ok" if healthy else "unavailable"})
            return
        check_key(self.headers.get_all("Authorization", []), self._config.api_key)
        own = {"id": self._provider.name, "object": "model", "created": self.server.started, "owned_by": "mbf"}
        asked = path.removeprefix("/v1/models").strip("/")
        if path.rstrip("/") == "/v1/models":
            self._answer(200, {"object": "list", "data": [own]})
        elif not path.startswith("/v1/models/"):
            self._no_such(path)
        elif asked == self._provider.name:
            self._answer(200, own)
        else:
            raise Refused(404, f"model: this server has only {self._provider.name!r}, got {asked[:100]!r}")

    def _no_such(self, path: str) -> None:
        known = {**dict.fromkeys(CHATS + COMPLETIONS, "POST"), "/health": "GET", "/v1/models": "GET"}
        if path in known:
            raise Refused(405, f"{path} takes {known[path]}, got {self.command}")
        raise Refused(404, f"there is nothing here; expected one of {', '.join(known)}")

    def _post(self) -> None:
        check_key(self.headers.get_all("Authorization", []), self._config.api_key)
        path = self._path()
        if path not in CHATS + COMPLETIONS:
            self._no_such(path)
        body = read_body(self._read())
        asked = read_request(body, chat=path in CHATS, config=self._config, vocabulary=self._provider.vocabulary)
        if asked.model not in (None, "default_model", self._provider.name):
            raise Refused(404, f"model: this server has only {self._provider.name!r}, got {asked.model[:100]!r}")
        self._respond(asked)

    def _read(self) -> bytes:
        lengths = self.headers.get_all("Content-Length", [])
        if "Transfer-Encoding" in self.headers:
            raise Refused(411, "Transfer-Encoding: expected a body with a Content-Length")
        if not lengths:
            raise Refused(411, "Content-Length is missing")
        digits, most = lengths[0].strip(), self._config.max_request_bytes
        if len(lengths) > 1 or not (digits.isascii() and digits.isdigit()):
            raise Refused(400, f"Content-Length: expected one number, got {', '.join(lengths)[:40]!r}")
        if len(digits.lstrip("0")) > 18 or int(digits[-18:]) > most:
            raise Refused(413, f"expected at most {most} bytes (--max-request-bytes), got {digits[:40]}")
        length = int(digits)
        if self.headers.get("Expect", "").lower() == "100-continue":
            self.send_response_only(100)
            self.end_headers()
        self._unread = False
        raw = self.rfile.read(length)
        if len(raw) < length:
            raise Refused(400, f"Content-Length: expected {length} bytes of a body, got {len(raw)}")
        return raw

    # Answers

    def _respond(self, asked: Asked) -> None:
        deadline = time.monotonic() + self._config.max_seconds
        # Writing has a time limit of its own, and so has what comes to an end by `look`.
        self.server.watch(self.connection, self._config.max_seconds + 2 * RECEIVE)
        adapter = self._provider.adapter()
        prompt, longest = prepare(self._generator, asked, _arguments(asked, self._provider.name, adapter))
        args = _arguments(asked, self._provider.name, adapter, longest)

        def look() -> None:
            if self._client_left():
                raise ConnectionAbortedError
            if time.monotonic() > deadline:
                raise _TooLate

        answer: Answer | None = None
        try:
            for item in self._generator.replies(prompt, args, look):
                if isinstance(item, GenerationContext):
                    answer = Answer(asked, item, self._provider.name, self._provider.word)
                    self._begin_stream(asked)
                elif isinstance(item, Response) and answer is not None:
                    answer.feed(item)
                    if asked.stream and (piece := answer.piece()):
                        self._write(piece)
                    if answer.finish:
                        break
                elif asked.stream:
                    self._write(KEEP_ALIVE)
        except _TooLate:
            if answer is None:
                raise Refused(
                    503, f"no answer began within {self._config.max_seconds} s (--max-seconds): the server is busy"
                ) from None
        if answer is None:
            raise Unanswered("nothing was generated")
        if answer.finish is None:
            answer.end("length")
            if asked.stream and (piece := answer.piece()):
                self._write(piece)
        if not asked.stream:
            self._answer(200, answer.whole())
            return
        if asked.include_usage:
            self._write(answer.usage_piece())
        self._write(b"data: [DONE]\n\n")

    def _begin_stream(self, asked: Asked) -> None:
        if asked.stream:
            self._started = True
            self.send_response(200)
            self.send_header("Content-Type", "text/event-stream")
            self.send_header("Cache-Control", "no-cache")
            self._send_origin()
            self.end_headers()
            self.wfile.flush()

    def _write(self, piece: bytes) -> None:
        self.wfile.write(piece)
        self.wfile.flush()

    def _client_left(self) -> bool:
        if not select.select([self.connection], [], [], 0)[0]:
            return False
        try:
            return not self.connection.recv(1, socket.MSG_PEEK)
        except OSError:
            return True

    def _answer(self, status: int, document: dict[str, Any] | None) -> None:
        raw = b"" if document is None else json.dumps(document).encode()
        self._started = True
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(raw)))
        if status == HTTPStatus.UNAUTHORIZED:
            self.send_header("WWW-Authenticate", "Bearer")
        self._send_origin()
        self.end_headers()
        if self.command != "HEAD":
            self._write(raw)

    def _send_origin(self) -> None:
        if self._origin is not None:
            self.send_header("Access-Control-Allow-Origin", self._origin)
            self.send_header("Vary", "Origin")
            self.send_header("Access-Control-Allow-Methods", "GET, POST, OPTIONS")
            self.send_header("Access-Control-Allow-Headers", "*, Authorization")

    def _refuse(self, status: int, message: str) -> None:
        document = error_document(status, message)
        if self._started:
            self._write(event(document))  # in the middle of a stream; there is no [DONE]
            return
        self._answer(status, document)
        if self._unread:
            self._take_leave()

    def _take_leave(self) -> None:
        """Read a little of a body that we refused: closing at once could make the client lose our answer."""
        self.connection.shutdown(socket.SHUT_WR)
        self.connection.settimeout(1)
        try:
            for _ in range(64):
                if not self.connection.recv(1 << 16):
                    return
        except OSError:
            return

    def send_error(self, code: int, message: str | None = None, explain: str | None = None) -> None:
        """Answer a request that is no HTTP, or has a method that we lack."""
        self.close_connection = True
        self.command = self.command or ""
        known = {501: f"method: expected GET or POST, got {self.command[:20]!r}", 414: "the path is too long"}
        self._refuse(405 if code == 501 else code, known.get(code) or str(message or HTTPStatus(code).phrase))

    def log_message(self, format: str, *args: Any) -> None:
        """Log a request to Python's log, not to stderr."""
        logging.getLogger(__name__).info(format, *args)


class _TooLate(Exception):
    """The time of an answer is over."""


def _arguments(asked: Asked, model: str, adapter: str | None, longest: int = 1) -> GenerationArguments:
    """Return a request as mlx-lm's loop takes it. Stop sequences are ours: mlx-lm finds them only as whole tokens."""
    return GenerationArguments(
        model=ModelDescription(model=model, draft="default_model", adapter=adapter),
        sampling=SamplingArguments(
            temperature=asked.temperature,
            top_p=asked.top_p,
            top_k=asked.top_k,
            min_p=asked.min_p,
            xtc_probability=asked.xtc_probability,
            xtc_threshold=asked.xtc_threshold,
        ),
        logits=LogitsProcessorArguments(logit_bias=asked.logit_bias, **asked.penalties),
        stop_words=[],
        max_tokens=longest,
        num_draft_tokens=0,
        logprobs=asked.logprobs,
        top_logprobs=asked.top_logprobs,
        seed=asked.seed,
        chat_template_kwargs=asked.template_values,
    )
