"""Greedy answers in batches are mlx-lm's own, computed one by one: on both engines, whatever rows go together."""

import numpy as np
import pytest

pytest.importorskip("mlx.core", reason="mlx is not installed: pip install 'mbf-mlx[cpu]'")

import mlx.core as mx
from mlx import nn
from mlx_lm import load, stream_generate
from mlx_lm.generate import generate_step

from mbf_mlx.base.unpack import keep_packed
from mbf_mlx.engine import llama_answers
from mbf_mlx.engine.answers import MOST_ROWS, Question, groups_of_like_length, text_of
from mbf_mlx.engine.choose import prepare
from mbf_mlx.engine.llama_pass import fits
from mbf_mlx.errors import MemoryLimitError
from tests.support.llamas import LLAMA, VOCABULARY, build

ENDS = {3, 17, 40}
SCALING = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
           "original_max_position_embeddings": 32}  # fmt: skip
MODELS = {
    "grouped heads": {},
    "ungrouped heads, biases, a head of its own": {
        "num_key_value_heads": 4, "attention_bias": True, "mlp_bias": True, "tie_word_embeddings": False
    },
    "scaled rotary angles": {"rope_scaling": SCALING, "max_position_embeddings": 256},
    "factors everywhere": {"keys": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj",
                                    "mlp.gate_proj", "mlp.up_proj", "mlp.down_proj")},
    "another architecture": {"model_type": "qwen2"},
    "windows, which are answered one by one": {
        "model_type": "gemma3_text", "head_dim": 16, "query_pre_attn_scalar": 16, "sliding_window": 8,
        "sliding_window_pattern": 2
    },
}  # fmt: skip


def questions_of(count=70, prefix=5, seed=0):
    """Prompts of very different lengths with different longest answers; the first `prefix` tokens are the same."""
    rng = np.random.default_rng(seed)
    common = rng.integers(1, VOCABULARY, prefix)
    return [
        Question(
            np.concatenate([common, rng.integers(1, VOCABULARY, rng.integers(1, 40))]).astype(np.int32),
            int(rng.integers(1, 25)),
        )
        for _ in range(count)
    ]


def one_by_one(model, questions, ends=ENDS):
    found = []
    for each in questions:
        found.append([])
        for token, _ in generate_step(mx.array(each.prompt), model, max_tokens=each.most):
            if token in ends:
                break
            found[-1].append(token)
    return found


def both_engines(model):
    return [prepare(model, by_hand=by_hand) for by_hand in {False, fits(model)}]


@pytest.mark.parametrize("prefix", [0, 5])
@pytest.mark.parametrize("name", MODELS)
def test_answers_in_batches_are_those_one_by_one(name, prefix):
    model = build(LLAMA, **MODELS[name])
    questions = questions_of(prefix=prefix)
    ends = {17, 40, *one_by_one(model, questions[:1], ())[0][:1]}  # one of them comes first after some prompt
    expected = one_by_one(model, questions, ends)
    lengths = [len(answer) for answer in expected]
    assert 0 in lengths  # the end token comes first
    assert any(0 < length < each.most - 1 for length, each in zip(lengths, questions, strict=True))  # it comes early
    assert any(length == each.most > 1 for length, each in zip(lengths, questions, strict=True))  # it never comes
    for engine in both_engines(model):
        ended = []
        assert engine.answers(questions, ends, ended.append) == expected
        assert sum(ended) == len(questions)
        assert engine.answers(questions[:1], ends) == expected[:1]
        assert engine.answers([], ends) == []


def test_packed_weights_are_answered_from_too():
    model = build(LLAMA, bits=4)
    for _, each in model.named_modules():
        if type(each) in (nn.QuantizedLinear, nn.QuantizedEmbedding):
            keep_packed(each)
    assert fits(model)
    questions = questions_of(20)
    assert prepare(model).answers(questions, ENDS) == one_by_one(model, questions)


def test_rows_that_wait_take_the_slots_of_rows_that_have_ended(monkeypatch):
    model = build(LLAMA)
    questions = questions_of()
    expected = one_by_one(model, questions)
    monkeypatch.setattr("mbf_mlx.engine.by_hand.PROMPTS", 3)
    monkeypatch.setattr(llama_answers, "PROMPTS", 3)
    tokens = max(each.longest for each in questions)
    for engine in both_engines(model):
        for rows in (1, 2, 7):
            engine.room = lambda rows=rows: 2 * rows * 512 * tokens  # a token's keys and values have 512 bytes here
            assert engine.answered_together(512, tokens) == rows
            assert engine.answers(questions, ENDS) == expected


def test_few_bytes_let_one_row_go_and_many_no_more_than_is_of_use():
    engine = prepare(build(LLAMA))
    engine.room = lambda: 0
    assert engine.answered_together(512, 100) == 1
    engine.room = lambda: 1 << 60
    assert engine.answered_together(512, 100) == MOST_ROWS
    assert engine.answered_together(1 << 20, 100) == 10  # a budget of its own, in a machine of any size


def test_prompts_that_do_not_fit_together_go_in_smaller_batches():
    model = build(LLAMA)
    questions = questions_of(20)
    expected = one_by_one(model, questions)
    for engine in both_engines(model):
        seen = []

        def before(batch, training, seen=seen):
            assert not training
            if len(batch.lengths) > 2:
                raise MemoryLimitError("too large")
            seen.append(len(batch.lengths))

        engine.before = before
        assert engine.answers(questions, ENDS) == expected
        assert max(seen) == 2

        def refuse(batch, training):
            raise MemoryLimitError("no room at all")

        engine.before = refuse
        with pytest.raises(MemoryLimitError, match="no room at all"):
            engine.answers(questions, ENDS)


def test_questions_of_like_length_go_together_longest_first():
    lengths = [10, 400, 19, 39, 210, 11, 20]
    groups = list(groups_of_like_length([Question(np.zeros(each - 4, np.int32), 4) for each in lengths]))
    assert [[lengths[i] for i in group] for group in groups] == [[400, 210], [39, 20], [19, 11, 10]]


def test_the_text_of_tokens_is_what_mlx_lm_writes(tiny_llama):
    model, tokenizer = load(str(tiny_llama))
    texts = []
    for seed in range(12):
        prompt = np.random.default_rng(seed).integers(3, 290, 6).tolist()
        for most in (1, 2, 13):  # often in the middle of a letter of several bytes
            parts = list(stream_generate(model, tokenizer, prompt, max_tokens=most))
            tokens = [part.token for part in parts if part.token not in tokenizer.eos_token_ids]
            texts.append("".join(part.text for part in parts))
            assert text_of(tokenizer, tokens) == texts[-1]
    assert text_of(tokenizer, []) == ""
    assert any(not text.isascii() for text in texts)
