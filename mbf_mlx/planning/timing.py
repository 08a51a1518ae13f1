"""Times a small model with random weights, to see how fast this machine trains blocks like those of the real one."""

import importlib
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from mbf_mlx.base import unpack
from mbf_mlx.config import LoRAConfig
from mbf_mlx.data.batches import Batch
from mbf_mlx.device.machine import freed_memory_kept
from mbf_mlx.engine.answers import Question
from mbf_mlx.engine.choose import prepare
from mbf_mlx.engine.lora_layers import attach
from mbf_mlx.learning.tuning import Tuning
from mbf_mlx.memory.formula import Run

REPEATS = 4
ANSWERS, TOKENS = 32, 8  # that are generated together, and tokens of each


@dataclass(frozen=True, kw_only=True)
class Taken:
    """Seconds that one batch took."""

    step: float  # forward and back
    forward: float  # forward only
    token: float  # one more token of an answer, generated after the batch's first row, in a batch of answers


@freed_memory_kept()
def seconds(config: dict[str, Any], lora: LoRAConfig, run: Run, batch: Batch, blocks: int, vocabulary: int) -> Taken:
    """Return how long a batch takes in a small model that is like the real one.

    Args:
        config: The real model's config.json.
        lora: Which layers get factors.
        run: How the model is trained.
        batch: The batch to compute; which tokens it holds does not matter.
        blocks, vocabulary: Sizes of the small model.
    """
    small = {**config, "num_hidden_layers": blocks, "vocab_size": vocabulary, "quantization": None}
    module = importlib.import_module(f"mlx_lm.models.{config['model_type']}")
    model = module.Model(module.ModelArgs.from_dict(small))
    if run.packed or not run.by_hand:
        quantization = config.get("quantization") or {}
        if "bits" in quantization:
            nn.quantize(model, group_size=quantization["group_size"], bits=quantization["bits"])
    if run.by_hand and run.packed:
        for _, each in model.named_modules():
            if type(each) in (nn.QuantizedLinear, nn.QuantizedEmbedding):
                unpack.keep_packed(each)
    unpack.evaluate(model)
    attach(model, replace(lora, num_layers=-1))
    engine = prepare(model, checkpoint=run.checkpoint, by_hand=None if run.by_hand else False)
    engine.multiply_in("bfloat16" if run.bfloat16 else "float32")
    known = replace(batch, tokens=batch.tokens % vocabulary, prefix=batch.prefix % vocabulary,
                    targets=batch.targets % vocabulary)  # fmt: skip
    tuning = Tuning(model)
    loss_and_grad = engine.loss_and_grad(tuning.apply)
    step = _fastest(lambda: mx.eval(loss_and_grad(tuning.trained, known)))
    forward = _fastest(lambda: engine.score(known))
    prompt = np.concatenate([known.prefix, known.tokens[0]])
    first, more = (
        _fastest(partial(engine.answers, [Question(prompt, 1 + tokens)] * ANSWERS, ())) for tokens in (0, TOKENS)
    )
    return Taken(step=step, forward=forward, token=max(0.0, more - first) / (TOKENS * ANSWERS))


def _fastest(work: Callable[[], Any]) -> float:
    work()  # the first call is slower: threads start, memory is allocated
    taken = []
    for _ in range(REPEATS):
        started = time.perf_counter()
        work()
        taken.append(time.perf_counter() - started)
    return min(taken)  # other work on the machine can only add time
