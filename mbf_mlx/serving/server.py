"""`mbf serve`: mlx-lm's loop of batched answers behind a server of our own, for one stream and nothing else.

The only model is the stream's base with its adapter, or a fused export of the stream. Before the first answer, the
adapter is proved to change the logits. A task that is learned or undone meanwhile counts from the next answer on:
mlx-lm sees a generation by its identity (its manifest's checksum), never by its number, which an undo uses again.
handler.py answers a request, generator.py keeps the loop alive.
"""

import argparse
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

from mlx_lm.generate import DEFAULT_QUANTIZED_KV_START
from mlx_lm.server import ModelProvider

from mbf_mlx.base import first_try
from mbf_mlx.base.apply_template import bound_template
from mbf_mlx.base.chat_templates import dated
from mbf_mlx.base.load import load_to_answer
from mbf_mlx.base.sources import BaseFolder, read_config, stated_config, translated_fields
from mbf_mlx.config import ServeConfig
from mbf_mlx.errors import InputError
from mbf_mlx.serving.callers import is_loopback
from mbf_mlx.serving.generator import Generator
from mbf_mlx.serving.handler import RECEIVE, Handler, Watcher
from mbf_mlx.serving.proof import adapter_of, check_export, logits_of, prove_adapter, prove_fused
from mbf_mlx.serving.speaker import settle_to_speak
from mbf_mlx.stream.folder import StreamFolder
from mbf_mlx.stream.generations import Generation

LONGEST_CONTEXT = 1 << 20  # tokens, for a base that does not say how many it can read
BUSY = (
    b"HTTP/1.0 503 Service Unavailable\r\nContent-Type: application/json\r\nRetry-After: 1\r\n\r\n"
    b'{"error": {"message": "too many connections (--max-connections)", "type": "server_error"}}'
)
Say = Callable[[str], None]


@contextmanager
def serving(
    folder: StreamFolder,
    base: BaseFolder,
    config: ServeConfig,
    *,
    fused: Path | None = None,
    say: Say,
) -> Iterator["Server"]:
    """Load the model, prove the adapter and listen; in the block, `server.serve_forever()` answers.

    Args:
        folder: The stream.
        base: Its base model.
        config: The address to listen on, and limits.
        fused: An mlx export of the stream, to serve instead of base and adapter.
        say: Takes one line for the person who runs the server.

    Raises:
        InputError: the adapter changes nothing, the export is not of this stream, or the port is taken.
    """
    server = Server(config, say)
    try:
        provider = StreamProvider(folder, base, config, fused, say)
        generator = Generator(provider, config.prompt_cache_size, say)
        try:
            provider.loaded.wait()
            if provider.failure is not None:
                raise provider.failure
            server.RequestHandlerClass = partial(Handler, generator)
            server.model = provider.name
            server.server_activate()
            yield server
        finally:
            generator.stop_and_join()
    finally:
        server.server_close()


class Server(Watcher):
    """A server that binds its port at once, before a model is loaded, and listens after `server_activate`.

    It has a bound on its connections, and cuts one off that takes longer than it may.
    """

    model = ""  # the model's name in requests
    request_queue_size = 128
    daemon_threads = True

    def __init__(self, config: ServeConfig, say: Say) -> None:
        self.say, self.started = say, int(time.time())
        self._most, self._deadlines, self._guard = (
            config.max_connections,
            dict[socket.socket, float](),
            threading.Lock(),
        )
        family, _, _, _, address = _addresses(config.host, config.port)[0]
        if not is_loopback(str(address[0])) and config.api_key is None and not config.no_key:
            raise InputError(
                f"--host {config.host}: other machines could use the model: expected --api-key KEY, or --no-key to"
                " let in everybody\nhint: the environment variable MBF_API_KEY keeps the key out of the process list"
            )
        self.address_family = family
        super().__init__(address[:2], Handler, bind_and_activate=False)
        try:
            self.server_bind()
        except OSError as error:
            self.server_close()
            raise InputError(
                f"--host {config.host} --port {config.port}: cannot listen there: {error.strerror}"
                "\nhint: --port 0 takes any free port"
            ) from error

    @property
    def loopback(self) -> bool:
        """Whether only this machine can reach the server."""
        return is_loopback(str(self.server_address[0]))

    @property
    def url(self) -> str:
        """The base URL for OpenAI clients."""
        host, port = str(self.server_address[0]), self.server_address[1]
        return f"http://{f'[{host}]' if ':' in host else host}:{port}/v1"

    def server_bind(self) -> None:
        """Bind, but do not ask a name server for our name, as HTTPServer would."""
        if self.allow_reuse_address:
            self.socket.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        self.socket.bind(self.server_address)
        self.server_address = self.socket.getsockname()
        self.server_name, self.server_port = str(self.server_address[0]), self.server_address[1]

    def get_request(self) -> tuple[socket.socket, Any]:
        """Accept a connection; where the process has no file left for it, wait a little instead of spinning."""
        try:
            return super().get_request()
        except OSError:
            time.sleep(0.1)
            raise

    def process_request(self, request: Any, client_address: Any) -> None:
        """Start a thread for a connection, or turn it away if there are too many."""
        with self._guard:
            full = len(self._deadlines) >= self._most
            if not full:
                self._deadlines[request] = time.monotonic() + RECEIVE
        if not full:
            super().process_request(request, client_address)
            return
        try:
            request.setblocking(False)
            request.send(BUSY)
        except OSError:
            pass  # it has gone
        self.shutdown_request(request)

    def shutdown_request(self, request: Any) -> None:
        """Close a connection and forget it."""
        with self._guard:
            self._deadlines.pop(request, None)
        super().shutdown_request(request)

    def watch(self, connection: socket.socket, seconds: float) -> None:
        """Cut a connection off if it still lives after so many seconds."""
        with self._guard:
            if connection in self._deadlines:
                self._deadlines[connection] = time.monotonic() + seconds

    def service_actions(self) -> None:
        """Cut off what is late; `serve_forever` calls this twice a second."""
        with self._guard:
            late = [connection for connection, end in self._deadlines.items() if time.monotonic() > end]
            for connection in late:
                try:
                    connection.shutdown(socket.SHUT_RDWR)  # wakes the thread that waits for it
                except OSError:
                    pass  # it has gone

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Report in one line that a client went away, or what else ended a connection."""
        error = sys.exception()
        if isinstance(error, (ConnectionError, TimeoutError)):
            self.say(f"{client_address[0]}: went away before its answer was complete")
        else:
            self.say(f"{client_address[0]}: its connection failed: {type(error).__name__}: {error}")


class StreamProvider(ModelProvider):
    """Gives mlx-lm's loop the stream's model and no other."""

    model_key: Any  # model, generation, draft: what mlx-lm compares to see whether it must load

    def __init__(
        self, folder: StreamFolder, base: BaseFolder, config: ServeConfig, fused: Path | None, say: Say
    ) -> None:
        super().__init__(arguments(config, str(fused or base.path)))
        self.folder, self.base, self.config, self.fused, self.say = folder, base, config, fused, say
        self.name = folder.path.resolve().name
        self.loaded = threading.Event()
        self.failure: BaseException | None = None
        self.is_loading = False
        self.words: Any = None  # the tokenizer, which stays while another adapter is loaded
        self.vocabulary = 0  # how many logits the model has
        if fused is not None:
            check_export(fused, base, folder)
        self.context = read_config(fused or base.path).get("max_position_embeddings") or LONGEST_CONTEXT
        self._guard = threading.Lock()
        self._newest = self._wanted = folder.current()
        folder.verify(self._newest)  # before mlx reads the adapter

    def load_default(self) -> None:
        """Load the model before the first request; an error is kept for the thread that started the server."""
        try:
            self.load(self.name)
        except BaseException as error:  # also a panic in a tokenizer's Rust code: the other thread waits
            self.failure = error
        finally:
            self.loaded.set()

    def load(self, model_path: str, adapter_path: str | None = None, draft_model_path: str | None = None) -> Any:
        """Return (model, tokenizer) of the newest generation; load and prove it first if it is new.

        `adapter_path` was the newest when the request came. It is not used, for it may be undone by now.

        Raises:
            InputError: the adapter changes no logits, or an export has another chat template.
        """
        self.is_loading = True
        try:
            while True:
                self._wanted = self.newest()
                pair = self._loaded()
                if self.fused is not None or self._is_there(self._wanted):
                    return pair
        finally:
            self.is_loading = False

    def _loaded(self) -> Any:
        before, adapter = self.model_key, self.key(self._wanted)
        if before is None and self.fused is not None:
            proof = prove_fused(self.folder, self.base, self.fused)
        pair = super().load(self.cli_args.model, adapter)
        self.cli_args.chat_template_args = dated(self.tokenizer, self.folder.date())
        if self.model_key == before:
            return pair
        try:
            settle_to_speak(self.model, Path(self.cli_args.model))
            if self.fused is None:
                proof = prove_adapter(self.model, self.tokenizer, self.folder, adapter_of(self._wanted))
            self.words, self.vocabulary = self.tokenizer, logits_of(self.model)
        except BaseException:
            self.reset()  # a model that was not proved answers nobody
            raise
        self.say(f"{self.folder.path}: {proof}")
        return pair

    def _load(self, model_path: str, adapter_path: str | None = None, draft_model_path: str | None = None) -> None:
        adapter, folder = None if adapter_path is None else adapter_of(self._wanted), Path(model_path)
        first_try.try_tokenizer(folder)
        super()._load(model_path, adapter)
        if translated_fields(folder, stated_config(folder)):  # mlx-lm's server reads config.json as it is
            self.model = load_to_answer(folder, adapter)[0]
        bound_template(self.tokenizer)
        self.model_key = (model_path, adapter_path, draft_model_path)  # also the key of remembered prompts

    def _is_there(self, generation: Generation) -> bool:
        """Return whether a generation's folder still holds it: an undo and a learn may have put another one there."""
        try:
            return self.folder.generations.open(generation.folder).manifest.checksum == generation.manifest.checksum
        except (InputError, OSError):
            return False

    def newest(self) -> Generation:
        """Return the generation for the next answer: the stream's current one, or the last one that was whole."""
        with self._guard:
            try:
                generation = self.folder.current()
                if generation.manifest.checksum == self._newest.manifest.checksum:
                    return self._newest
                self.folder.verify(generation)
            except (InputError, OSError) as error:
                self.say(f"{error}; the model that is loaded goes on answering")
                return self._newest
            self._newest = generation
            if self.fused is not None:
                self.say(
                    f"{self.folder.path} has changed since {self.fused} was exported:"
                    " export again and restart the server"
                )
            return generation

    def key(self, generation: Generation) -> str | None:
        """Return what tells a generation's adapter from all others; None if there is none to apply."""
        return None if self.fused is not None or adapter_of(generation) is None else generation.manifest.checksum

    def adapter(self) -> str | None:
        """Return the key of the adapter for the next answer; None if there is none to apply."""
        return self.key(self.newest())

    def word(self, token: int) -> str:
        """Return the text of one token."""
        return str(self.words.decode([token]))


def arguments(config: ServeConfig, model: str) -> argparse.Namespace:
    """Return our settings as `mlx_lm.server` has them after it reads its command line."""
    return argparse.Namespace(
        model=model,
        adapter_path=None,
        host=config.host,
        port=config.port,
        allowed_origins=list(config.allowed_origins),
        draft_model=None,
        num_draft_tokens=3,
        trust_remote_code=False,
        log_level="WARNING",
        chat_template="",
        use_default_chat_template=False,
        temp=config.temp,
        top_p=config.top_p,
        top_k=config.top_k,
        min_p=config.min_p,
        max_tokens=config.max_tokens,
        chat_template_args={},
        decode_concurrency=config.decode_concurrency,
        prompt_concurrency=config.prompt_concurrency,
        prefill_step_size=config.prefill_step_size,
        prompt_cache_size=config.prompt_cache_size,
        prompt_cache_bytes=config.prompt_cache_bytes,
        kv_bits=None,
        kv_group_size=64,
        quantized_kv_start=DEFAULT_QUANTIZED_KV_START,
        pipeline=False,
    )


def _addresses(host: str, port: int) -> list[Any]:
    try:
        return socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
    except OSError as error:
        raise InputError(f"--host: no such address: {host!r} ({error.strerror})") from error
