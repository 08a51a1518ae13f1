"""`mbf generate`: one answer."""

import math
import sys
from typing import Annotated

import typer

from mbf_mlx.commands import console
from mbf_mlx.commands.options import Json, MaxTokens, MovedBase, StreamPath, System, Temperature, TopP
from mbf_mlx.errors import InputError


def generate(
    stream: StreamPath,
    prompt: Annotated[str, typer.Argument(metavar="PROMPT", help="The prompt; - reads it from stdin.")],
    model: MovedBase = None,
    system: System = None,
    max_tokens: MaxTokens = 256,
    temp: Temperature = 0.0,
    top_p: TopP = 0.0,
    seed: Annotated[int, typer.Option("--seed", metavar="N", help="Seed of the sampling.")] = 0,
    json: Json = False,
) -> None:
    """Answer one prompt with what the stream has learned.

    Example: mbf generate assistant "Where does the invoice go?"
    """
    from mbf_mlx.api import Stream

    if prompt == "-":
        prompt = sys.stdin.buffer.read().decode(errors="surrogateescape")  # `prompt` says where that is no UTF-8
    if not prompt.strip():
        raise InputError("prompt: expected some text, got none\nhint: mbf generate STREAM - reads it from stdin")
    if max_tokens < 1 or not 0 <= temp < math.inf or not 0 <= top_p <= 1 or not 0 <= seed < 1 << 32:
        raise InputError(
            "expected --max-tokens of at least 1, --temp of at least 0, --top-p in [0, 1],"
            " --seed from 0 to 4,294,967,295"
        )
    opened = Stream.open(stream, base=model)
    turns = [{"role": "system", "content": system}] if system else []
    pieces = opened.generate(
        [*turns, {"role": "user", "content": prompt}], max_tokens=max_tokens, temp=temp, top_p=top_p, seed=seed
    )
    if json:
        console.print_json({"prompt": prompt, "answer": "".join(pieces)})
        return
    for piece in pieces:
        console.print_piece(piece)
    print()
