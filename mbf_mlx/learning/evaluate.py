"""Scores a model on one task; scores.py puts the tasks together.

A completion is an exact match if greedy generation would produce its tokens and then the end token. This is the case
if and only if each of these tokens is the argmax at its position in one teacher-forced pass, so nothing is generated.
Long answers are generated, many rows at a time, and scored by ROUGE-L. Losses are per supervised token, in nats; scores
are in [0, 1].
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from mbf_mlx.data.batches import lengths_of, make_batch, plan_batches
from mbf_mlx.data.encode import Encoded
from mbf_mlx.data.row import reference_text
from mbf_mlx.device.machine import freed_memory_kept
from mbf_mlx.engine.answers import Question, text_of
from mbf_mlx.engine.engine import Engine
from mbf_mlx.errors import InputError

SHORT_ANSWER = 16  # tokens; a task whose longest test completion has more is scored by ROUGE-L
CLOSE_CALL = 1e-4  # a top-two difference of logits under which rounding may decide
EXACT_MATCH, ROUGE_L, LOSS = "exact_match", "rouge_l", "loss"
BATCH_ROWS = 32


@dataclass(frozen=True, kw_only=True)
class Score:
    """The score of a model on the test rows of one task."""

    metric: str
    value: float | None  # in [0, 1]; None where the metric is the loss
    loss: float
    rows: int
    close_calls: tuple[int, ...] = ()  # indices of rows that rounding may have decided
    verdicts: tuple[bool, ...] = ()  # for each row, whether it is an exact match


def metric_of(rows: Sequence[Encoded]) -> str:
    """Return the metric that fits a task's test rows; without rows, the metric of plain text."""
    if not len(rows) or rows[0].row.kind == "text":  # all rows of a task are of one kind
        return LOSS
    longest = max(int(row.supervised.sum()) - 1 for row in rows)
    return EXACT_MATCH if longest <= SHORT_ANSWER else ROUGE_L


@freed_memory_kept()
def score(
    engine: Engine,
    rows: Sequence[Encoded],
    metric: str,
    *,
    tokenizer: Any = None,
    advance: Callable[[int], None] = lambda rows: None,
) -> Score:
    """Score the model that `engine` runs on `rows`.

    Args:
        engine: The engine of the model, which applies the factors that are to be scored.
        rows: The test rows of one task, at least one.
        metric: "exact_match", "rouge_l" or "loss".
        tokenizer: The model's; needed for ROUGE-L.
        advance: Called with the number of rows done since the last call.

    Raises:
        InputError: the model's answer to a row is not finite; the row is named.
    """
    loss, verdicts, close = _teacher_forced(engine, rows, advance if metric != ROUGE_L else lambda rows: None)
    if metric == LOSS:
        return Score(metric=metric, value=None, loss=loss, rows=len(rows))
    if metric == EXACT_MATCH:
        value = sum(verdicts) / len(rows)
        return Score(metric=metric, value=value, loss=loss, rows=len(rows), close_calls=close, verdicts=tuple(verdicts))
    from mbf_mlx.learning.rouge import RougeL  # it loads the package's stemmer

    measure = RougeL()
    answers = generated(engine, tokenizer, rows, advance)
    values = [measure(answer, right_answers(tokenizer, row)) for answer, row in zip(answers, rows, strict=True)]
    return Score(metric=metric, value=float(np.mean(values)), loss=loss, rows=len(rows))


def _teacher_forced(
    engine: Engine, rows: Sequence[Encoded], advance: Callable[[int], None]
) -> tuple[float, list[bool], tuple[int, ...]]:
    """Return the loss, whether each row is an exact match, and the rows that were close calls."""
    right, close = np.ones(len(rows), dtype=bool), np.zeros(len(rows), dtype=bool)
    total, count = 0.0, 0
    for indices in plan_batches(lengths_of(rows), BATCH_ROWS, 0, 0):
        batch = make_batch(rows, indices)
        losses, argmax, margin = (np.array(array) for array in engine.score(batch))
        places = np.array(batch.indices)[batch.row_of]
        wrong = ~np.isfinite(losses) | np.isnan(margin)
        if wrong.any():
            row = rows[int(places[wrong][0])].row
            raise InputError(f"{row.file}:{row.line}: the model's answer to this row is not finite, so it has no score")
        np.logical_and.at(right, places, argmax == batch.targets)
        np.logical_or.at(close, places, margin < CLOSE_CALL)
        total += float(losses.sum(dtype=np.float64))
        count += len(losses)
        advance(len(indices))
    return total / count, [bool(r) for r in right], tuple(int(i) for i in np.flatnonzero(close))


def generated(
    engine: Engine, tokenizer: Any, rows: Sequence[Encoded], advance: Callable[[int], None] = lambda rows: None
) -> list[str]:
    """Return the greedy answers to the rows' prompts, as mlx-lm generates them one by one."""
    questions = [Question(row.tokens[: row.prompt_length], longest_answer(row)) for row in rows]
    return [text_of(tokenizer, each) for each in engine.answers(questions, tokenizer.eos_token_ids, advance)]


def right_answers(tokenizer: Any, row: Encoded) -> tuple[str, ...]:
    """Return the answers that count as right: the one that was learned, as generation writes it, and the row's own.

    They differ where the template adds an empty thought, or where the row's answer is written with its end token.
    """
    learned = str(tokenizer.decode(row.tokens[row.prompt_length : -1].tolist()))
    return (learned, *(row.row.answers or (reference_text(row.row),)))


def longest_answer(row: Encoded) -> int:
    """Return how many tokens may be generated as a row's answer."""
    return 2 * int(row.supervised.sum()) + 16
