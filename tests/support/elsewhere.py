"""Adapters as another tool leaves them after it has trained a stream's next task."""

from mbf_mlx import exchange
from mbf_mlx.adapters import mlx_lm as adapter
from mbf_mlx.adapters import peft
from tests.support.streams import tune


def write(files, folder):
    folder.mkdir()
    for name, data in files.items():
        (folder / name).write_bytes(data)
    return folder


def trained(stream, folder, kind, change=lambda files: files):
    """The start of the next task as another tool leaves it after training, in that tool's layout."""
    start = write(exchange.next_start(stream, kind), folder.with_name(folder.name + "-start"))
    read = peft.read_peft(start) if kind == "peft" else adapter.read_adapter(start)
    tuned = tune(stream.state(), read.factors)
    if kind == "peft":
        files = peft.peft_files(tuned, stream.identity.scale, base="tiny", num_blocks=2)
    else:
        files = adapter.adapter_files(tuned, scale=stream.identity.scale, num_layers=2, base="tiny")
    return write(change(files), folder), tuned
