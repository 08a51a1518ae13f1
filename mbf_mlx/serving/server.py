"""`mbf serve`: mlx-lm's HTTP server, for one stream and nothing else.

mlx-lm loads the model, batches the requests and writes the answers. We add three things. The only model is the stream's
base with its adapter, or a fused export of the stream. Before the first answer, the adapter is proved to change the
logits. A task that is learned meanwhile is used from the next answer on, because mlx-lm sees the new adapter as another
model. request_checks.py checks the requests.
"""

import argparse
import ipaddress
import socket
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from http.server import ThreadingHTTPServer
from pathlib import Path
from typing import Any

from mlx_lm.generate import DEFAULT_QUANTIZED_KV_START
from mlx_lm.models.cache import LRUPromptCache
from mlx_lm.server import APIHandler, ModelProvider, ResponseGenerator

from mbf_mlx.base.folder import check_template
from mbf_mlx.base.sources import BaseFolder
from mbf_mlx.config import ServeConfig
from mbf_mlx.errors import InputError
from mbf_mlx.serving.proof import adapter_of, prove_adapter, prove_fused
from mbf_mlx.serving.request_checks import Handler
from mbf_mlx.serving.speaker import settle_to_speak
from mbf_mlx.stream.folder import StreamFolder

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
        generator = ResponseGenerator(provider, LRUPromptCache(config.prompt_cache_size))
        try:
            provider.loaded.wait()
            if provider.failure is not None:
                raise provider.failure
            limit = config.max_request_bytes
            server.RequestHandlerClass = partial(Handler, generator, limit)
            server.model = provider.name
            server.server_activate()
            yield server
        finally:
            generator.stop_and_join()
    finally:
        server.server_close()


class Server(ThreadingHTTPServer):
    """A server that binds its port at once, before a model is loaded, and listens after `server_activate`."""

    model = ""  # the model's name in requests

    def __init__(self, config: ServeConfig, say: Say) -> None:
        self.say = say
        family, _, _, _, address = _addresses(config.host, config.port)[0]
        self.address_family = family
        super().__init__(address[:2], APIHandler, bind_and_activate=False)
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
        return ipaddress.ip_address(str(self.server_address[0])).is_loopback

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

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Report in one line that a client went away; any other error is ours and keeps its traceback."""
        if isinstance(sys.exception(), (ConnectionError, TimeoutError)):
            self.say(f"{client_address[0]}: went away before its answer was complete")
            return
        super().handle_error(request, client_address)


class StreamProvider(ModelProvider):
    """Gives mlx-lm's server the stream's model and no other."""

    def __init__(
        self, folder: StreamFolder, base: BaseFolder, config: ServeConfig, fused: Path | None, say: Say
    ) -> None:
        super().__init__(arguments(config, str(fused or base.path)))
        self.folder, self.base, self.fused, self.say = folder, base, fused, say
        self.name = folder.path.resolve().name
        self.loaded = threading.Event()
        self.failure: Exception | None = None
        folder.verify()  # before mlx reads the adapter
        self._newest = folder.current().number

    def load_default(self) -> None:
        """Load the model before the first request; an error is kept for the thread that started the server."""
        try:
            self.load(self.name, self.adapter())
        except Exception as error:
            self.failure = error
        finally:
            self.loaded.set()

    def load(self, model_path: str, adapter_path: str | None = None, draft_model_path: str | None = None) -> Any:
        """Return (model, tokenizer) with the adapter at `adapter_path`; load and prove it first if it is new.

        Raises:
            InputError: the adapter changes no logits, or an export has another chat template.
        """
        before = self.model_key
        if before is None and self.fused is not None:
            proof = prove_fused(self.folder, self.base, self.fused)
            check_template(self.fused, self.folder.identity.template_sha256, self.folder.path)
        pair = super().load(self.cli_args.model, adapter_path)
        if self.model_key == before:
            return pair
        settle_to_speak(self.model, Path(self.cli_args.model))
        if self.fused is None:
            try:
                proof = prove_adapter(self.model, self.tokenizer, self.folder, adapter_path)
            except InputError:
                self.reset()
                raise
        self.say(f"{self.folder.path}: {proof}")
        return pair

    def adapter(self) -> str | None:
        """Return the path of the adapter for the next answer; None if there is none to apply."""
        try:
            generation = self.folder.current()
            if generation.number != self._newest:
                self.folder.verify(generation)
        except InputError as error:
            self.say(f"{error}; the model that is loaded goes on answering")
            return self.model_key[1] if self.model_key else None
        newer, self._newest = generation.number != self._newest, generation.number
        if self.fused is None:
            return adapter_of(generation)
        if newer:
            self.say(
                f"{self.folder.path} has changed since {self.fused} was exported: export again and restart the server"
            )
        return None


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
