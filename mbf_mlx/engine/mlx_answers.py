"""Greedy answers through mlx-lm: in batches where every block keeps plain keys and values, else one by one."""

from collections.abc import Collection, Iterator, Sequence

import mlx.core as mx
from mlx import nn
from mlx_lm.generate import BatchGenerator, generate_step
from mlx_lm.models.cache import KVCache, make_prompt_cache

from mbf_mlx.engine.answers import Question

PROMPTS = 8  # that go through the model together


def bytes_a_token(model: nn.Module) -> int | None:
    """Return the bytes that all blocks keep of one token; None where some block keeps another kind of memory.

    Such a memory (a window, a recurrent state) is padded in a batch, and not every architecture then computes the same.
    """
    caches = make_prompt_cache(model)
    if not all(type(cache) is KVCache for cache in caches):
        return None
    model(mx.array([[0]]), cache=caches)
    return sum(int(kept.nbytes) // int(kept.shape[2]) for cache in caches for kept in (cache.keys, cache.values))


def in_batches(
    model: nn.Module, questions: Sequence[Question], ends: Collection[int], together: int, prompts: int
) -> Iterator[tuple[int, list[int]]]:
    """Yield each question's place and its greedy answer without the end token, in the order in which they end.

    Args:
        model: One whose blocks keep plain keys and values.
        questions: At least one.
        ends: The tokens at which an answer ends.
        together: How many rows are answered together.
        prompts: How many prompts go through the model together.
    """
    stops = [[token] for token in sorted(ends)]
    generator = BatchGenerator(model, stop_tokens=stops, completion_batch_size=together, prefill_batch_size=prompts)
    try:
        prompts_of = [each.prompt.tolist() for each in questions]
        place_of = {uid: i for i, uid in enumerate(generator.insert(prompts_of, [each.most for each in questions]))}
        answers: list[list[int]] = [[] for _ in questions]
        while responses := generator.next_generated():
            for each in responses:
                place = place_of[each.uid]
                if each.finish_reason != "stop":
                    answers[place].append(int(each.token))
                if each.finish_reason is not None:
                    yield place, answers[place]
    finally:
        generator.close()


def one_by_one(
    model: nn.Module, questions: Sequence[Question], ends: Collection[int]
) -> Iterator[tuple[int, list[int]]]:
    """Yield the same, after computing one answer after another."""
    for place, question in enumerate(questions):
        answer: list[int] = []
        for token, _ in generate_step(mx.array(question.prompt), model, max_tokens=question.most):
            if token in ends:
                break
            answer.append(int(token))
        yield place, answer
