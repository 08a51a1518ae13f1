"""`mbf serve`: an OpenAI-compatible server on this machine."""

import os
import sys
from pathlib import Path
from typing import Annotated

import typer

from mbf_mlx.commands import console
from mbf_mlx.commands.options import Base
from mbf_mlx.config import ServeConfig

_SERVE = ServeConfig()


def serve(
    stream: Annotated[Path, typer.Argument(help="The stream's folder.")],
    model: Base = None,
    fused: Annotated[Path | None, typer.Option("--fused", help="Serve this mlx export of the stream.")] = None,
    host: Annotated[str, typer.Option("--host", help="Address to listen on; others than loopback are open to all.")] = (
        _SERVE.host
    ),
    port: Annotated[int, typer.Option("--port", help="Port to listen on; 0: any free one.")] = _SERVE.port,
    max_tokens: Annotated[
        int, typer.Option("--max-tokens", "-m", help="Longest answer, in tokens, where a request does not say.")
    ] = _SERVE.max_tokens,
    temp: Annotated[
        float, typer.Option("--temp", help="Sampling temperature where a request does not say.")
    ] = _SERVE.temp,
    top_p: Annotated[
        float, typer.Option("--top-p", help="Likewise: sample from this share of the probability.")
    ] = _SERVE.top_p,
    top_k: Annotated[int, typer.Option("--top-k", help="Likewise: sample from so many tokens; 0: all.")] = _SERVE.top_k,
    min_p: Annotated[
        float, typer.Option("--min-p", help="Likewise: leave out what is less likely than this.")
    ] = _SERVE.min_p,
    max_request_bytes: Annotated[
        int, typer.Option("--max-request-bytes", help="Largest request that is read.")
    ] = _SERVE.max_request_bytes,
    decode_concurrency: Annotated[
        int, typer.Option("--decode-concurrency", help="Answers that are written at the same time.")
    ] = _SERVE.decode_concurrency,
    prompt_concurrency: Annotated[
        int, typer.Option("--prompt-concurrency", help="Prompts that are read at the same time.")
    ] = _SERVE.prompt_concurrency,
    prefill_step_size: Annotated[
        int, typer.Option("--prefill-step-size", help="Tokens of a prompt that are read at once.")
    ] = _SERVE.prefill_step_size,
    prompt_cache_size: Annotated[
        int, typer.Option("--prompt-cache-size", help="Conversations whose prompts are remembered.")
    ] = _SERVE.prompt_cache_size,
    prompt_cache_bytes: Annotated[
        int | None, typer.Option("--prompt-cache-bytes", help="Most bytes for them; without: no limit.")
    ] = _SERVE.prompt_cache_bytes,
    allowed_origins: Annotated[
        str, typer.Option("--allowed-origins", help="Web pages that may ask, comma-separated; *: all.")
    ] = "",
) -> None:
    """Serve the model that a stream has taught to OpenAI clients; a newly learned task is in the next answer.

    Example: mbf serve assistant --port 8080
    """
    from mbf_mlx.api import Stream

    opened = Stream.open(stream, base=model)
    config = ServeConfig(
        host=host,
        port=port,
        max_tokens=max_tokens,
        temp=temp,
        top_p=top_p,
        top_k=top_k,
        min_p=min_p,
        max_request_bytes=max_request_bytes,
        decode_concurrency=decode_concurrency,
        prompt_concurrency=prompt_concurrency,
        prefill_step_size=prefill_step_size,
        prompt_cache_size=prompt_cache_size,
        prompt_cache_bytes=prompt_cache_bytes,
        allowed_origins=tuple(origin.strip() for origin in allowed_origins.split(",") if origin.strip()),
    )
    try:
        with opened.serving(config, fused=fused, say=console.err.print) as server:
            if not server.loopback:
                console.warn(f"--host {host}: whoever reaches this machine can use the model; there is no password")
            console.err.print(f"listening on {server.url}, model {server.model!r}; Ctrl-C ends")
            server.serve_forever()
    except KeyboardInterrupt as error:
        # The threads that mlx has started for the generator may end after Python has: that would abort the process.
        console.err.print(f"stopped by {str(error) or 'Ctrl-C'}")
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(130)
