"""What learning would take on a machine, before anything is trained: memory by formula, time by a short trial, disk.

The shape of a model comes from its folder's config and headers, or from a recipe where it is not here yet. Bytes and
seconds. The formula itself is memory/formula.py's.
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

TRIAL_BLOCKS = 4  # of the model that is timed; what each of them takes is what the real one's take
TRIAL_VOCABULARY = 64  # of the model that is timed
HEAD_VOCABULARY = 4096  # of the one that says what a wider head takes, at most
PLANNED_BATCHES = 400  # of an epoch whose shapes are looked at


def measured_values(method: Method, layers: Layers, rank: int) -> int:
    """Return the numbers of the directions in which a method has the inputs of its layers measured, all together."""
    if "inputs" not in method.needs:
        return 0
    state = empty_state(layers, rank)
    return sum(int(directions.size) for directions in method.measure(state, first_factors(state, "uniform")).values())


@dataclass(frozen=True, kw_only=True)
class Work:
    """The batches that tasks will make."""

    steps: int  # optimizer steps of all tasks
    loads: tuple[Load, ...]  # the different shapes of training batches
    typical: Batch  # one of middle size
    train_tokens: float  # computed in all steps
    other_tokens: float  # computed without a way back: validation, losses before and after, scoring
    generated_tokens: float  # of long answers, one after another, each as long as it may become
    measured_tokens: float  # that the method looks at once more, on the way back, too


def work_of(
    rows: Sequence[Encoded],
    valid: Sequence[Encoded],
    test: Sequence[Encoded],
    config: TrainConfig,
    scored: int = 1,
    method: Method | None = None,
) -> Work:
    """Return the work of one task.

    Args:
        rows, valid, test: Its rows.
        config: Epochs or steps, batch sizes.
        scored: How often its test rows are scored: after it, and after each task that is learned after it.
        method: The stream's: some measure rows after training.
    """
    from mbf_mlx.learning.evaluate import (  # it needs mlx, which other plans do without
        ROUGE_L,
        longest_answer,
        metric_of,
    )

    lengths = lengths_of(rows)
    plan = plan_batches(lengths, config.batch_size, config.seed, 0)
    groups = math.ceil(len(plan) / config.grad_accumulation_steps)
    steps = config.iters or config.epochs * groups
    chosen = [plan[i] for i in np.linspace(0, len(plan) - 1, min(PLANNED_BATCHES, len(plan))).astype(int)]
    longest = max(plan, key=lambda batch: max(lengths[i] for i in batch))
    batches = sorted((make_batch(rows, indices) for indices in [*chosen, longest]), key=lambda b: b.computed_tokens)
    each = float(np.mean([_real(batch) for batch in batches]))
    return Work(
        steps=steps,
        loads=tuple(dict.fromkeys(Load.of(batch) for batch in batches)),
        typical=batches[len(batches) // 2],
        train_tokens=each * steps * config.grad_accumulation_steps,
        other_tokens=math.ceil(steps / (config.val_every or groups)) * float(np.sum(lengths_of(valid)))
        + 2 * min(SAMPLE_ROWS, len(rows)) * float(np.mean(lengths))
        + scored * float(np.sum(lengths_of(test))),
        generated_tokens=scored * float(sum(map(longest_answer, test)) if metric_of(test) == ROUGE_L else 0),
        measured_tokens=_measured_rows(method, len(rows)) * float(np.mean(lengths)),
    )


def _measured_rows(method: Method | None, count: int) -> int:
    if method is None:
        return 0
    if "inputs" in method.needs:
        return len(measured_rows(count))
    return count if "gradients" in method.needs else 0


def _real(batch: Batch) -> int:
    return len(batch.prefix) + int(batch.lengths.sum())


@dataclass(frozen=True, kw_only=True)
class Rate:
    """How long a batch takes, by a trial on this machine."""

    step: float  # seconds a token, forward and back
    forward: float  # seconds a token, forward alone
    token: float  # seconds a generated token

    def seconds(self, work: Work) -> float:
        """Return how long a task's work takes."""
        both_ways = (work.train_tokens + work.measured_tokens) * self.step
        return both_ways + work.other_tokens * self.forward + work.generated_tokens * self.token


def measure(config: dict[str, Any], lora: LoRAConfig, run: Run, batch: Batch) -> Rate:
    """Return the rate at which this machine trains a model, from one of its first blocks and from several.

    Args:
        config: Its config.json.
        lora: Which layers get factors; all blocks are taken to have some.
        run: How it is trained.
        batch: Of middle size, as `Work.typical`.
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
    """Return what a stream takes at most while it learns: two generations, the one being written, a save of training.

    Args:
        layers: The (out, in) of each layer with factors.
        rank: Theirs.
    """
    return 12 * sum(4 * rank * (out + inner) for out, inner in layers.values()) + (1 << 20)
