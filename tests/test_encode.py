from pathlib import Path

import pytest

from mbf_mlx.config import DataConfig
from mbf_mlx.encode import Encoder, encode, encode_prompt
from mbf_mlx.rows import BadRow, row_from
from tests.tiny_llama import write_tokenizer


@pytest.fixture(scope="session")
def tokenizer(tmp_path_factory):
    """mlx-lm's wrapper around a small byte-level BPE with a ChatML template."""
    transformers = pytest.importorskip("transformers", reason="comes with mlx-lm: pip install 'mbf-mlx[cpu]'")
    utils = pytest.importorskip("mlx_lm.tokenizer_utils", reason="pip install 'mbf-mlx[cpu]'")
    folder = tmp_path_factory.mktemp("tokenizer")
    write_tokenizer(folder)
    return utils.TokenizerWrapper(transformers.AutoTokenizer.from_pretrained(folder))


def row(**document):
    return row_from(document, Path("task.jsonl"), 1)


def supervised(tokenizer, encoded):
    """The supervised tokens as text, each run of them apart."""
    return [text for text, on in Encoder(tokenizer, DataConfig()).marked(encoded) if on]


def test_of_a_prompt_and_completion_the_completion_and_its_end_token_are_supervised(tokenizer):
    encoded = encode(row(prompt="Is it good?", completion=" yes"), tokenizer)
    assert supervised(tokenizer, encoded) == ["yes<|im_end|>"]
    assert tokenizer.decode(encoded.tokens) == (
        "<|im_start|>user\nIs it good?<|im_end|>\n<|im_start|>assistant\nyes<|im_end|>"
    )


def test_without_a_template_prompt_and_completion_stand_as_they_are(tokenizer):
    encoded = encode(row(prompt="Is it good?", completion=" yes"), tokenizer, template="none")
    assert supervised(tokenizer, encoded) == [" yes<|im_end|>"]
    assert tokenizer.decode(encoded.tokens) == "Is it good? yes<|im_end|>"


def test_all_answers_of_a_conversation_are_supervised_and_nothing_else(tokenizer):
    messages = [
        {"role": "system", "content": "Be short."},
        {"role": "user", "content": "Hello"},
        {"role": "assistant", "content": "Hi there"},
        {"role": "user", "content": "Is it good?"},
        {"role": "assistant", "content": "yes"},
    ]
    encoded = encode(row(messages=messages), tokenizer)
    assert supervised(tokenizer, encoded) == ["Hi there<|im_end|>", "yes<|im_end|>"]


def test_the_supervised_tokens_go_on_exactly_where_generation_starts(tokenizer):
    question = row(prompt="Is it good?", completion="yes")
    prompt = encode_prompt(question, tokenizer).tolist()
    message = [{"role": "user", "content": "Is it good?"}]
    assert prompt == tokenizer.apply_chat_template(message, add_generation_prompt=True)
    encoded = encode(question, tokenizer)
    assert encoded.tokens[: len(prompt)].tolist() == prompt
    assert not encoded.supervised[: len(prompt)].any() and encoded.supervised[len(prompt) :].all()


def test_a_long_prompt_loses_the_left_of_its_text_and_nothing_of_the_template(tokenizer):
    encoded = encode(row(prompt="one two three four five six", completion="yes"), tokenizer, max_length=28)
    assert len(encoded.tokens) <= 28 and encoded.cut > 0
    text = tokenizer.decode(encoded.tokens)
    assert text.startswith("<|im_start|>user\n") and text.endswith(
        "six<|im_end|>\n<|im_start|>assistant\nyes<|im_end|>"
    )


def test_a_completion_that_does_not_fit_is_refused(tokenizer):
    with pytest.raises(BadRow, match="do not fit into --max-seq-length 12"):
        encode(row(prompt="one", completion="a very long answer that has many words"), tokenizer, max_length=12)
