"""`mbf serve`: an OpenAI-compatible server on this machine."""

import os
import sys
from dataclasses import replace
from pathlib import Path
from typing import Annotated

import typer

from mbf_mlx.commands import console, stopped_by
from mbf_mlx.commands.flags import Given, takes
from mbf_mlx.commands.options import MovedBase, StreamPath
from mbf_mlx.config import ServeConfig
from mbf_mlx.errors import InputError

_FLAGS = (
    *("host", "port", "allow_host", "allowed_origins", "api_key", "no_key"),
    *("max_tokens", "temp", "top_p", "top_k", "min_p", "max_seconds", "max_request_bytes", "max_connections"),
    *("decode_concurrency", "prompt_concurrency", "prefill_step_size", "prompt_cache_size", "prompt_cache_bytes"),
)


@takes(*_FLAGS)
def serve(
    stream: StreamPath,
    *,
    model: MovedBase = None,
    fused: Annotated[
        Path | None,
        typer.Option("--fused", metavar="FOLDER", help="Serve this mlx export of the stream instead of its adapter."),
    ] = None,
    given: Given,
) -> None:
    """Serve the model that a stream has taught to OpenAI clients; a newly learned task is in the next answer.

    Example: mbf serve assistant --port 8080
    """
    console.say_loading(stream, fused)
    from mbf_mlx.api import Stream

    opened = Stream.open(stream, base=model)
    from_environment = None if given["no_key"] else os.environ.get("MBF_API_KEY") or None
    key = from_environment if given["api_key"] is None else given["api_key"]
    config = replace(given.make(ServeConfig), api_key=key)
    try:
        with opened.serving(config, fused=fused, say=console.err.print) as server:
            if not server.loopback and config.api_key is None:
                console.warn(f"--host {config.host}: whoever reaches this machine can use the model; there is no key")
            console.err.print(f"listening on {server.url}, model {server.model!r}; Ctrl-C ends")
            server.serve_forever()
    except (KeyboardInterrupt, InputError) as error:
        # mlx has started threads for the generator. If one ends after Python has, it aborts the process.
        if isinstance(error, InputError):
            code = 1
            console.err.print(f"error: {error}")
        else:
            name, code = stopped_by(error)
            console.err.print(f"stopped by {name}")
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
