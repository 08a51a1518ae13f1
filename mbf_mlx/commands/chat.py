"""`mbf chat`: a conversation in the terminal."""

from pathlib import Path
from typing import Annotated

import typer

from mbf_mlx.commands import console
from mbf_mlx.commands.options import Base
from mbf_mlx.errors import InputError


def chat(
    stream: Annotated[Path, typer.Argument(help="The stream's folder.")],
    model: Base = None,
    system: Annotated[str | None, typer.Option("--system-prompt", help="System text before the conversation.")] = None,
    max_tokens: Annotated[int, typer.Option("--max-tokens", "-m", help="Longest answer, in tokens.")] = 512,
    temp: Annotated[float, typer.Option("--temp", help="Sampling temperature; 0: greedy.")] = 0.0,
    top_p: Annotated[float, typer.Option("--top-p", help="Sample from this share of the probability; 0: all.")] = 0.0,
) -> None:
    """Talk with the model that a stream has taught; Ctrl-D ends, /new starts over.

    Example: mbf chat assistant
    """
    from mbf_mlx.api import Stream

    speaker = Stream.open(stream, base=model).speaker()
    start = [{"role": "system", "content": system}] if system else []
    messages = list(start)
    console.err.print(f"{stream}: {speaker.describe()}. Ctrl-D ends, /new starts over.")
    while True:
        try:
            line = input("> ").strip()
        except EOFError:
            return
        if line == "/new":
            messages = list(start)
        if not line or line == "/new":
            continue
        messages.append({"role": "user", "content": line})
        answer = ""
        try:
            for piece in speaker.answer(messages, max_tokens=max_tokens, temp=temp, top_p=top_p):
                print(piece, end="", flush=True)
                answer += piece
        except InputError as error:
            console.err.print(f"error: {error}")
            messages.pop()
            continue
        print()
        messages.append({"role": "assistant", "content": answer})
