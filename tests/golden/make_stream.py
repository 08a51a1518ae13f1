"""Makes a stream like tests/golden/stream-v1: `python -m tests.golden.make_stream FOLDER`.

Version 0.1.0 made that one. It is never made again: every later version has to read it as it is.
"""

import sys
from pathlib import Path

from tests.support.streams import learn, new_stream

LAYERS = {f"model.layers.{block}.self_attn.{key}": (6, 4) for block in range(2) for key in ("q_proj", "v_proj")}


def make_stream(path):
    """Make a stream with two learned tasks and a third one in training."""
    stream = learn(new_stream(path, name="golden", rank=2, layers=LAYERS), 2)
    run = {"task": "task3", "sha256": f"{3:064d}", "generation": 2, "epochs": 1}
    tensors = {f"factor.{layer}.lora_a": pair.a.T.copy() for layer, pair in stream.state().deployed.items()}
    stream.saves.save(2, run, {"device": "cpu"}, {"step": 2}, tensors)
    return stream


if __name__ == "__main__":
    make_stream(Path(sys.argv[1]))
