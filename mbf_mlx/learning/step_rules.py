"""How many optimizer steps there are, and what each goes by beside its gradients: its dropout's seed, its rate, the
longest gradient.

Clipping and the rate are computed here, not by mlx.optimizers, whose numbers differ in their last bits:
`clip_grad_norm` divides by the norm + 1e-6, and its schedules compute in float32, which gives another rate at about
half of the steps. Streams and experiments of before must go on to the same bits. A test holds both to mlx's own, within
1e-6.
"""

import math

import mlx.core as mx

from mbf_mlx.config import TrainConfig
from mbf_mlx.engine.engine import Arrays

FLOOR = 0.1  # share of the peak rate at which the decay ends


def steps_an_epoch(config: TrainConfig, rows: int) -> int:
    """Return how many optimizer steps one pass over so many training rows takes."""
    return math.ceil(math.ceil(rows / config.batch_size) / config.grad_accumulation_steps)


def steps_of(config: TrainConfig, rows: int) -> int:
    """Return how many optimizer steps a training on so many rows takes."""
    return config.iters or config.epochs * steps_an_epoch(config, rows)


def seed_dropout(seed: int, step: int, rank: int = 0) -> None:
    """Make a step's dropout depend on these numbers alone; processes that share a step drop different inputs."""
    mx.random.seed((seed << 32) + (rank << 24) + step)


def rate_at(config: TrainConfig, steps: int, step: int) -> float:
    """Return the learning rate of a step: linear warmup, then cosine decay to a tenth of the peak.

    Args:
        config: The peak rate, and the share of the steps that warm up.
        steps: All steps of the run.
        step: The step, from 1.
    """
    warmup = max(1, round(config.warmup * steps))
    if step <= warmup:
        return config.learning_rate * step / warmup
    done = (step - warmup) / max(1, steps - warmup)
    return config.learning_rate * (FLOOR + (1 - FLOOR) * 0.5 * (1 + math.cos(math.pi * done)))


def clipped(gradients: Arrays, most: float) -> tuple[Arrays, mx.array]:
    """Return gradients whose common norm is at most `most` (0: any), and the norm that they had."""
    norm = mx.sqrt(sum((mx.square(g).sum() for g in gradients.values()), mx.array(0.0)))
    if not most:
        return gradients, norm
    share = mx.minimum(1.0, most / norm)
    return {name: g * share for name, g in gradients.items()}, norm
