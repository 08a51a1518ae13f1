import dataclasses

import numpy as np
import pytest

from mbf_mlx.config import DataConfig, LoRAConfig, TrainConfig

pytest.importorskip("mlx.core", reason="mlx is not installed: pip install 'mbf-mlx[cpu]'")

from mlx_lm import stream_generate

from mbf_mlx.data.encode import Encoder
from mbf_mlx.data.task import read_task
from mbf_mlx.engine.choose import prepare
from mbf_mlx.learning.evaluate import (
    EXACT_MATCH,
    LOSS,
    ROUGE_L,
    generated,
    longest_answer,
    metric_of,
    right_answers,
    score,
)
from mbf_mlx.learning.learner import load_learner
from mbf_mlx.learning.rouge import RougeL
from tests.support.bench import QUICK, Bench
from tests.support.encoded import encode, row
from tests.support.rows import rows_of
from tests.support.tiny_tokenizers import make_tokenizer


@pytest.fixture
def bench(tiny_llama, write_jsonl):
    """A tiny Llama that has learned some of its rows by heart and some not."""
    write_jsonl("words/test.jsonl", rows_of(30, seed=1))
    bench = Bench(tiny_llama, read_task(write_jsonl("words/train.jsonl", rows_of(16)).parent))
    bench.run(dataclasses.replace(QUICK, epochs=25, learning_rate=2e-2))
    bench.base.model.eval()
    return bench


def encoded(bench, write_jsonl, rows, name="more", **data):
    task = read_task(write_jsonl(f"{name}.jsonl", rows))
    return Encoder(bench.base.tokenizer, DataConfig(**data)).all([*task.train, *task.test], task.path)


def greedy(bench, row):
    """The tokens that greedy generation gives after a row's prompt, up to and with the end token."""
    prompt = row.tokens[: row.prompt_length].tolist()
    answer = len(row.tokens) - row.prompt_length
    parts = stream_generate(bench.base.model, bench.base.tokenizer, prompt, max_tokens=answer)
    return [int(part.token) for part in parts]


def test_one_teacher_forced_pass_gives_the_verdict_of_greedy_generation_row_by_row(bench, write_jsonl):
    rows = [*bench.rows, *encoded(bench, write_jsonl, rows_of(30, seed=1))]
    result = score(bench.engine, rows, EXACT_MATCH)
    generated = [greedy(bench, row) == row.tokens[row.prompt_length :].tolist() for row in rows]
    assert list(result.verdicts) == generated
    assert 0 < sum(generated) < len(rows)
    assert result.value == sum(generated) / len(rows)


def test_the_order_and_the_company_of_rows_do_not_change_a_verdict(bench):
    rows = bench.rows
    one_by_one = [score(bench.engine, [row], EXACT_MATCH).verdicts[0] for row in rows]
    backwards = score(bench.engine, rows[::-1], EXACT_MATCH).verdicts[::-1]
    assert one_by_one == list(backwards) == list(score(bench.engine, rows, EXACT_MATCH).verdicts)


def test_a_row_that_rounding_may_decide_is_named(bench, monkeypatch):
    rows = bench.rows
    assert score(bench.engine, rows, EXACT_MATCH).close_calls == ()
    monkeypatch.setattr("mbf_mlx.learning.evaluate.CLOSE_CALL", 1e9)
    assert score(bench.engine, rows, EXACT_MATCH).close_calls == tuple(range(len(rows)))


def test_the_loss_is_the_mean_over_supervised_tokens(bench):
    losses, counts = zip(*[(score(bench.engine, [r], LOSS).loss, r.supervised.sum()) for r in bench.rows], strict=True)
    together = score(bench.engine, bench.rows, LOSS)
    assert together.value is None
    np.testing.assert_allclose(together.loss, np.average(losses, weights=counts), rtol=1e-5)


def test_long_answers_are_generated_and_scored_by_rouge_l(bench, write_jsonl):
    answer = "the old red train was late so we read the paper and talked about the cold weather by the warm sea"
    rows = encoded(bench, write_jsonl, [{"prompt": f"tell me story {i}", "completion": answer} for i in range(4)])
    assert metric_of(rows) == ROUGE_L
    bench.rows = rows
    bench.run(TrainConfig(epochs=100, batch_size=4, learning_rate=2e-2), start=False)
    bench.base.model.eval()
    result = score(bench.engine, rows, ROUGE_L, tokenizer=bench.base.tokenizer)
    assert result.value == pytest.approx(1.0)


def test_what_was_learned_is_a_right_answer_as_generation_writes_it():
    thinking = make_tokenizer(template="thinks when it ends")
    long = row(prompt="Is it late?", completion=" The red train is late.<|im_end|>\n")
    learned, own = right_answers(thinking, encode(long, thinking))
    assert learned == "<think>\n\n</think>\n\nThe red train is late." and own == long.completion
    assert RougeL()(learned, (learned, own)) == 1.0 == RougeL()("The red train is late.", (own[:-11],))
    plain = make_tokenizer()
    assert right_answers(plain, encode(long, plain))[0] == "The red train is late."


def test_the_metric_follows_the_longest_answer(bench, write_jsonl):
    short = [{"prompt": "a", "completion": "yes"}, {"prompt": "b", "completion": "no"}]
    long = [*short, {"prompt": "c", "completion": " ".join(["word"] * 30)}]
    assert metric_of(encoded(bench, write_jsonl, short, "short")) == EXACT_MATCH
    assert metric_of(encoded(bench, write_jsonl, long, "long")) == ROUGE_L
    assert metric_of(encoded(bench, write_jsonl, [{"text": "some words"}, {"text": "more words"}], "text")) == LOSS


def test_answers_in_batches_give_the_texts_of_mlx_lm_row_by_row(bench, write_jsonl):
    answers = ["A long one, and then some words more of it.", "So it goes on and on, until it ends at last."]
    long = [{"prompt": row["prompt"], "completion": answers[i % 2]} for i, row in enumerate(rows_of(40, seed=2))]
    rows = encoded(bench, write_jsonl, long)
    bench.run(dataclasses.replace(QUICK, epochs=20, learning_rate=1e-2), rows=rows)
    bench.base.model.eval()
    tokenizer, texts = bench.base.tokenizer, []
    for each in rows:
        prompt = each.tokens[: each.prompt_length].tolist()
        parts = stream_generate(bench.base.model, tokenizer, prompt, max_tokens=longest_answer(each))
        texts.append("".join(part.text for part in parts))
    assert len(set(texts)) > 1
    assert generated(bench.engine, tokenizer, rows) == texts
    assert generated(prepare(bench.base.model, by_hand=False), tokenizer, rows) == texts
    measure = RougeL()
    expected = [measure(text, right_answers(tokenizer, row)) for text, row in zip(texts, rows, strict=True)]
    assert score(bench.engine, rows, ROUGE_L, tokenizer=tokenizer).value == np.mean(expected)


@pytest.mark.slow
def test_smollm2_gives_the_same_texts_in_batches_on_64_rows(smollm2, task_data):
    learner = load_learner(smollm2, LoRAConfig())
    task = read_task(task_data / "superni" / "task748_glucose_reverse_cause_event_detection")
    rows = Encoder(learner.tokenizer, DataConfig(mask_prompt=True)).all(task.test[:64], task.path)
    learner.base.model.eval()
    together = generated(learner.engine, learner.tokenizer, rows)
    for each, text in zip(rows, together, strict=True):
        prompt = each.tokens[: each.prompt_length].tolist()
        parts = stream_generate(learner.base.model, learner.tokenizer, prompt, max_tokens=longest_answer(each))
        assert text == "".join(part.text for part in parts), each.row.line
