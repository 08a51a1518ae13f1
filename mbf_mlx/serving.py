"""Answers from a stream, through mlx-lm's own loading and generation.

The base is loaded as `mlx_lm.generate --model BASE --adapter-path STREAM/adapter` loads it, so both give the same text,
token for token. The conversation is rendered with the template that the stream was taught with.
"""

from collections.abc import Iterator, Sequence
from typing import Any

import mlx.core as mx
from mlx_lm import load, stream_generate
from mlx_lm.models.cache import can_trim_prompt_cache, make_prompt_cache, trim_prompt_cache
from mlx_lm.sample_utils import make_sampler

from mbf_mlx.sources import BaseFolder
from mbf_mlx.stream import StreamFolder

Message = dict[str, str]


class Speaker:
    """A model with a stream's deployed adapter, and the tokens of the conversation that it has read."""

    def __init__(self, stream: StreamFolder, base: BaseFolder) -> None:
        generation = stream.current()
        adapter = str(generation.folder / "adapter") if generation.manifest.t else None
        self.model, self.tokenizer = load(str(base.path), adapter_path=adapter)[:2]
        self.template = stream.identity.template
        self.base, self.tasks = base.name, generation.manifest.t
        self._cache: Any = make_prompt_cache(self.model)
        self._read: list[int] = []

    def prompt(self, messages: str | Sequence[Message]) -> list[int]:
        """Return the tokens that an answer to `messages` continues."""
        if self.template == "none":
            text = messages if isinstance(messages, str) else "\n".join(message["content"] for message in messages)
            return list(self.tokenizer.encode(text))
        turns = [{"role": "user", "content": messages}] if isinstance(messages, str) else list(messages)
        return list(self.tokenizer.apply_chat_template(turns, add_generation_prompt=True))

    def answer(
        self,
        messages: str | Sequence[Message],
        *,
        max_tokens: int = 256,
        temp: float = 0.0,
        top_p: float = 0.0,
        seed: int | None = None,
    ) -> Iterator[str]:
        """Yield the answer piece by piece; what this conversation shares with the last one is not read again.

        Args:
            messages: A prompt, or the messages of a conversation.
            max_tokens: After so many the answer ends.
            temp, top_p: How mlx-lm samples; greedy by default.
            seed: Of the sampling.
        """
        if seed is not None:
            mx.random.seed(seed)
        prompt = self.prompt(messages)
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

    def describe(self) -> str:
        """Return what speaks here, in a few words."""
        return f"{self.base} with the adapter of {self.tasks} task{'' if self.tasks == 1 else 's'}"

    def _rewind(self, prompt: list[int]) -> int:
        """Drop from the cache what `prompt` does not start with; return how much of it is kept."""
        shared = 0
        # At least one token is left to read, or there would be no logits to answer from.
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
