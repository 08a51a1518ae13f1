"""`mbf chat`: a conversation in the terminal."""

from mbf_mlx.commands import console
from mbf_mlx.commands.options import MaxTokens, MovedBase, StreamPath, System, Temperature, TopP
from mbf_mlx.errors import InputError


def chat(
    stream: StreamPath,
    model: MovedBase = None,
    system: System = None,
    max_tokens: MaxTokens = 512,
    temp: Temperature = 0.0,
    top_p: TopP = 0.0,
) -> None:
    """Talk with the model that a stream has taught; Ctrl-D ends, /new starts over.

    Example: mbf chat assistant
    """
    console.say_loading(stream)
    from mbf_mlx.api import Stream

    speaker = Stream.open(stream, base=model).speaker()
    start = [{"role": "system", "content": system}] if system else []
    messages = list(start)
    console.err.print(f"{stream}: {speaker.proof}. Ctrl-D ends, /new starts over.")
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
                console.print_piece(piece)
                answer += piece
        except InputError as error:
            console.err.print(f"error: {error}")
            messages.pop()
            continue
        print()
        messages.append({"role": "assistant", "content": answer})
