"""How much work learning a task is: its batches and tokens, what the method measures, its time and its disk space.

Time is work times a rate, and the rate comes from a short trial on this machine (timing.py). Bytes and seconds.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from mbf_mlx.config import SAMPLE_ROWS, LoRAConfig, TrainConfig
from mbf_mlx.data.batches import Batch, lengths_of, make_batch, plan_batches
from mbf_mlx.data.encode import Encoded
from mbf_mlx.memory.formula import Load, Run
from mbf_mlx.methods import Layers, Method, empty_state, first_factors, measured_rows

if TYPE_CHECKING:
    from mbf_mlx.planning.timing import Taken

TRIAL_BLOCKS = 4  # blocks of the small model that is timed; each takes as long as a block of the real model
TRIAL_VOCABULARY = 64  # vocabulary of the small model
HEAD_VOCABULARY = 4096  # largest vocabulary of the small model that shows what a wider head takes
IN_TRAINING = 0.1  # of a token's training, roughly: what it takes to measure it while it trains
PLANNED_BATCHES = 400  # most batches of an epoch whose shapes are looked at


def measured_values(method: Method, layers: Layers, rank: int) -> int:
    """Return how many numbers the directions have, of all layers, in which a method measures the layers' inputs."""
    if "inputs" not in method.needs:
        return 0
    state = empty_state(layers, rank)
    return sum(int(directions.size) for directions in method.measure(state, first_factors(state, "uniform")).values())


@dataclass(frozen=True, kw_only=True)
class Work:
    """The batches and tokens of one task."""

    steps: int  # optimizer steps
    loads: tuple[Load, ...]  # the different shapes of training batches
    typical: Batch  # a training batch of middle size
    train_tokens: float  # computed forward and back in all steps
    other_tokens: float  # computed forward only: validation, losses before and after, scoring
    generated_tokens: float  # written one by one to score long answers; each answer counts with its largest length
    measured_tokens: float  # computed once more, forward and back, because the method measures them after training


def work_of(
    rows: Sequence[Encoded],
    valid: Sequence[Encoded],
    test: Sequence[Encoded],
    config: TrainConfig,
    scored: int = 1,
    method: Method | None = None,
    by_hand: bool = False,
) -> Work:
    """Return the work of one task.

    Args:
        rows, valid, test: Its rows to train on, to validate with and to score.
        config: How it is trained.
        scored: How often its test rows are scored: once after it, and once after each later task.
        method: The stream's method; some methods measure rows in training or after it.
        by_hand: Whether engine/llama_pass.py will compute the pass, which can measure in training.
    """
    # These need mlx; a forecast without tasks does not.
    from mbf_mlx.learning.evaluate import ROUGE_L, longest_answer, metric_of
    from mbf_mlx.learning.step_rules import steps_an_epoch, steps_of

    lengths = lengths_of(rows)
    epoch = plan_batches(lengths, config.batch_size, config.seed, 0)
    steps, val_every = steps_of(config, len(rows)), config.val_every or steps_an_epoch(config, len(rows))
    chosen = [epoch[i] for i in np.linspace(0, len(epoch) - 1, min(PLANNED_BATCHES, len(epoch))).astype(int)]
    longest = max(epoch, key=lambda batch: max(lengths[i] for i in batch))
    batches = sorted((make_batch(rows, indices) for indices in [*chosen, longest]), key=lambda b: b.computed_tokens)
    each = float(np.mean([_real(batch) for batch in batches]))
    generates = metric_of(test) == ROUGE_L  # after reading the prompts once more
    return Work(
        steps=steps,
        loads=tuple(dict.fromkeys(Load.of(batch) for batch in batches)),
        typical=batches[len(batches) // 2],
        train_tokens=each * steps * config.grad_accumulation_steps,
        other_tokens=math.ceil(steps / val_every) * float(np.sum(lengths_of(valid)))
        + 2 * min(SAMPLE_ROWS, len(rows)) * float(np.mean(lengths))
        + scored * (2 if generates else 1) * float(np.sum(lengths_of(test))),
        generated_tokens=scored * float(sum(map(longest_answer, test)) if generates else 0),
        measured_tokens=_measured_rows(method, len(rows), by_hand and not len(valid)) * float(np.mean(lengths)),
    )


def _measured_rows(method: Method | None, count: int, in_training: bool) -> float:
    if method is None:
        return 0
    if "inputs" in method.needs:
        cheap = in_training and method.measures_in_training
        return len(measured_rows(count)) * (IN_TRAINING if cheap else 1)
    return count if "gradients" in method.needs else 0


def _real(batch: Batch) -> int:
    return len(batch.prefix) + int(batch.lengths.sum())


@dataclass(frozen=True, kw_only=True)
class Rate:
    """How long tokens take on this machine, as a trial showed."""

    step: float  # seconds a token, computed forward and back
    forward: float  # seconds a token, computed forward only
    token: float  # seconds a generated token

    def seconds(self, work: Work) -> float:
        """Return the seconds that a task's work takes."""
        both_ways = (work.train_tokens + work.measured_tokens) * self.step
        return both_ways + work.other_tokens * self.forward + work.generated_tokens * self.token


def measured_rate(config: dict[str, Any], lora: LoRAConfig, run: Run, batch: Batch) -> Rate:
    """Return the rate at which this machine trains a model.

    Small models with one block, with several blocks and with a wider head are timed. What a block and a head take is
    the difference; the real model has more of both.

    Args:
        config: The model's config.json.
        lora: Which layers get factors; every block is assumed to have some.
        run: How the model is trained.
        batch: A batch of middle size, `Work.typical`.
    """
    from mbf_mlx.planning import timing

    one, some = (timing.seconds(config, lora, run, batch, blocks, TRIAL_VOCABULARY) for blocks in (1, TRIAL_BLOCKS))
    more = (int(config["num_hidden_layers"]) - 1) / (TRIAL_BLOCKS - 1)
    width = min(HEAD_VOCABULARY, max(int(config["vocab_size"]), 2 * TRIAL_VOCABULARY))
    wide = timing.seconds(config, lora, run, batch, 1, width)
    wider = int(config["vocab_size"]) / (width - TRIAL_VOCABULARY)

    def whole(part: "Callable[[Taken], float]") -> float:
        return part(one) + more * max(0.0, part(some) - part(one)) + wider * max(0.0, part(wide) - part(one))

    tokens = _real(batch)
    return Rate(
        step=whole(lambda taken: taken.step) / tokens,
        forward=whole(lambda taken: taken.forward) / tokens,
        token=whole(lambda taken: taken.token),
    )


def disk_bytes(layers: dict[str, tuple[int, int]], rank: int) -> int:
    """Return the most bytes of a stream while it learns: two generations, the one being written, a save of the run.

    Args:
        layers: The (out, in) of each layer with factors.
        rank: The rank of the factors.
    """
    return 12 * sum(4 * rank * (out + inner) for out, inner in layers.values()) + (1 << 20)
