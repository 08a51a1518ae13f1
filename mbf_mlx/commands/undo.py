"""`mbf undo`: take back the last task."""

from mbf_mlx.commands import console
from mbf_mlx.commands.options import Json, StreamPath


def undo(stream: StreamPath, json: Json = False) -> None:
    """Take back the last task. Only one step back is kept.

    Example: mbf undo assistant
    """
    from mbf_mlx.api import Stream

    opened = Stream.open(stream)
    record = opened.undo()
    if json:
        console.print_json(opened.status())
    else:
        console.out.print(f"took back task {record.t}, {record.name}; {stream} has learned {record.t - 1}")
