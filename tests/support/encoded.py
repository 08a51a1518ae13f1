"""Rows of a task file, and what of their tokens is supervised."""

from pathlib import Path

from mbf_mlx.config import DataConfig
from mbf_mlx.data.encode import Encoder
from mbf_mlx.data.row import row_from


def row(**document):
    return row_from(document, Path("task.jsonl"), 1)


def talk(*contents, **more):
    """A row of messages, user and assistant in turn."""
    messages = [{"role": ("user", "assistant")[i % 2], "content": content} for i, content in enumerate(contents)]
    return row(messages=messages, **more)


def supervised(tokenizer, encoded):
    """The supervised tokens as text, each run of them apart."""
    return [text for text, on in Encoder(tokenizer, DataConfig()).marked(encoded) if on]
