"""Rows of a task file, their tokens, and which of them are supervised."""

from pathlib import Path

from mbf_mlx.config import DataConfig
from mbf_mlx.data.encode import Encoder
from mbf_mlx.data.row import BadRow, row_from


def row(**document):
    return row_from(document, Path("task.jsonl"), 1)


def talk(*contents, **more):
    """A row of messages, user and assistant in turn."""
    messages = [{"role": ("user", "assistant")[i % 2], "content": content} for i, content in enumerate(contents)]
    return row(messages=messages, **more)


def encode(row, tokenizer, *, template="chat", mask_prompt=True, max_length=2048):
    """One row's tokens; BadRow is raised where it has none."""
    data = DataConfig(template=template, mask_prompt=mask_prompt, max_seq_length=max_length)
    _, encoded = next(Encoder(tokenizer, data).stream([row]))
    if isinstance(encoded, BadRow):
        raise encoded
    return encoded


def supervised(tokenizer, encoded):
    """The supervised tokens as text, each run of them apart."""
    return [text for text, on in Encoder(tokenizer, DataConfig()).marked(encoded) if on]


def generation_prompt(tokenizer, messages, **more):
    """What mlx_lm.generate makes of a conversation."""
    text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True, **more)
    return tokenizer.encode(text, add_special_tokens=False)
