"""Makes tests/golden/stream-v1, as it was made once by version 0.1.0: `python -m tests.golden.make_stream FOLDER`."""

import sys
from pathlib import Path

from mbf_mlx.working import Working
from tests.streams import learn, new_stream

LAYERS = {f"model.layers.{block}.self_attn.{key}": (6, 4) for block in range(2) for key in ("q_proj", "v_proj")}


def main():
    stream = learn(new_stream(Path(sys.argv[1]), name="golden", rank=2, layers=LAYERS), 2)
    run = {"task": "task3", "sha256": f"{3:064d}", "generation": 2, "epochs": 1}
    tensors = {f"factor.{layer}.lora_a": pair.a.T.copy() for layer, pair in stream.state().deployed.items()}
    Working(stream.working, stream.files).save(2, run, {"device": "cpu"}, {"step": 2}, tensors)


if __name__ == "__main__":
    main()
