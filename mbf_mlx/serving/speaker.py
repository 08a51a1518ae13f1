"""Answers from a stream, through mlx-lm's own loading and generation.

The base is loaded as `mlx_lm.generate --model BASE --adapter-path STREAM/adapter` loads it, so both give the same text.
A CPU then unpacks the same weights into float32, as for training and scoring. This reads a prompt about 20 times as
fast, and the texts may differ where two tokens are almost equally likely. Conversations are rendered with the template
that the stream was taught with. Before the first answer, the adapter is proved to change the logits, because nobody
would notice an adapter that is not applied.
"""

from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import mlx.core as mx
from mlx_lm import stream_generate
from mlx_lm.models.cache import can_trim_prompt_cache, make_prompt_cache, trim_prompt_cache
from mlx_lm.sample_utils import make_sampler

from mbf_mlx.base.chat_templates import dated
from mbf_mlx.base.load import load_to_answer, settle
from mbf_mlx.base.renderer import Refused
from mbf_mlx.base.sources import BaseFolder, read_config, unpacked_bytes
from mbf_mlx.data.tokenizer_pieces import PieceTokenizer
from mbf_mlx.device import backend
from mbf_mlx.errors import InputError
from mbf_mlx.serving.proof import adapter_of, prove_adapter
from mbf_mlx.stream.folder import StreamFolder

Message = dict[str, str]


class Speaker:
    """A model with a stream's deployed adapter, and the tokens of the conversation that it has read so far."""

    def __init__(self, stream: StreamFolder, base: BaseFolder) -> None:
        generation = stream.current()
        stream.verify(generation)  # before mlx reads the adapter
        settled = partial(settle_to_speak, folder=base.path)
        self.model, self.tokenizer = load_to_answer(base.path, adapter_of(generation), lazy=True, prepare=settled)
        # A sentence on the model that answers.
        self.proof = prove_adapter(self.model, self.tokenizer, stream, adapter_of(generation))
        self.template, self._dated = stream.identity.template, dated(self.tokenizer, stream.date())
        self._raw = PieceTokenizer(self.tokenizer)
        self.base, self.context = stream.identity.base.name, read_config(base.path).get("max_position_embeddings")
        self._cache: Any = make_prompt_cache(self.model)
        self._read: list[int] = []

    def prompt(self, messages: str | Sequence[Message]) -> list[int]:
        """Return the tokens that an answer to `messages` continues.

        Raises:
            InputError: a text is not valid Unicode, as when a terminal passes bytes that are no UTF-8; or the prompt
                leaves no room for an answer in the base's context.
        """
        tokens = self._tokens(messages)
        if self.context and len(tokens) >= self.context:
            raise InputError(
                f"prompt: expected fewer than the {self.context:,} tokens that {self.base} can read,"
                f" got {len(tokens):,}"
                "\nhint: shorten it; in a chat, /new starts over"
            )
        return tokens

    def _tokens(self, messages: str | Sequence[Message]) -> list[int]:
        for text in [messages] if isinstance(messages, str) else [str(each.get("content")) for each in messages]:
            if not text.isascii() and any("\ud800" <= letter <= "\udfff" for letter in text):
                raise InputError("prompt: expected text in UTF-8, got bytes or half a surrogate pair that are no text")
        if self.template == "none" or not self.tokenizer.has_chat_template:
            return self._raw.begun([messages if isinstance(messages, str) else plain_text(messages)])[0]
        turns = [{"role": "user", "content": messages}] if isinstance(messages, str) else list(messages)
        try:
            return list(self.tokenizer.apply_chat_template(turns, add_generation_prompt=True, **self._dated))
        except Refused as error:
            raise InputError(f"prompt: the model's chat template refuses it: {error}") from None

    def answer(
        self,
        messages: str | Sequence[Message],
        *,
        max_tokens: int = 256,
        temp: float = 0.0,
        top_p: float = 0.0,
        seed: int | None = None,
    ) -> Iterator[str]:
        """Yield the answer piece by piece; the tokens that this conversation shares with the last are not read again.

        Args:
            messages: A prompt, or the messages of a conversation.
            max_tokens: The longest answer; the base's context may end it earlier.
            temp: Temperature of the sampling; 0 takes the likeliest token.
            top_p: Sample from the likeliest tokens that together have this probability; 0 is off.
            seed: Seed of the sampling.
        """
        if seed is not None:
            mx.random.seed(seed)
        prompt = self.prompt(messages)
        if self.context:
            max_tokens = min(max_tokens, self.context - len(prompt))
        known = self._rewind(prompt)
        self._read = list(prompt)
        for part in stream_generate(
            self.model,
            self.tokenizer,
            prompt[known:],
            max_tokens=max_tokens,
            sampler=make_sampler(temp=temp, top_p=top_p),
            prompt_cache=self._cache,
        ):
            self._read.append(int(part.token))
            yield part.text

    def _rewind(self, prompt: list[int]) -> int:
        """Drop the tokens from the cache that `prompt` does not start with; return how many are kept."""
        shared = 0
        # At least one token must be read, or there are no logits to answer from.
        for old, new in zip(self._read, prompt[:-1], strict=False):
            if old != new:
                break
            shared += 1
        held = self._cache[0].offset if self._read else 0
        shared = min(shared, held)
        if held > shared and not can_trim_prompt_cache(self._cache):
            self._cache, shared = make_prompt_cache(self.model), 0
        elif held > shared:
            trim_prompt_cache(self._cache, held - shared)
        return shared


def settle_to_speak(model: Any, folder: Path) -> None:
    """Bring a model that mlx-lm has loaded from `folder` into the form that is fastest on this device."""
    device = backend.setup()
    packed = backend.keep_quantized(unpacked_bytes(folder))
    settle(model, dequantize=not packed, float32=device.dtype is not None)


def plain_text(messages: Sequence[Message]) -> str:
    """Return a conversation as plain text, for a stream that was taught without a chat template."""
    return "\n".join(message["content"] for message in messages)
