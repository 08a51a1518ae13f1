"""The one thread that answers, which survives whatever one answer does to it.

mlx-lm runs a loop that batches the requests. An exception in it would end the thread, and the server would stay up
without an answer for anybody. Here the loop starts again: the requests that it had taken get the error, and those that
wait are answered. Prompts are made into tokens before they come here, so no request's text is read in this thread.
"""

import copy
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from queue import Empty, Queue
from typing import Any

import mlx.core as mx
from mlx_lm.models.cache import LRUPromptCache
from mlx_lm.server import CompletionRequest, GenerationArguments, GenerationContext, ModelProvider, ResponseGenerator

from mbf_mlx.data.tokenizer_pieces import PieceTokenizer

STALLED = 60.0  # seconds without a sign of life after which /health says that nobody answers
LOOK = 0.25  # seconds between two looks at whether the client is still there


class Unanswered(Exception):
    """The thread could not finish an answer; the message says why."""


@dataclass
class Prepared(CompletionRequest):
    """A request whose prompt is tokens already: what mlx-lm's `_tokenize` returns."""

    parts: tuple[Any, ...] = field(default=())


class Replies(Queue[Any]):
    """What the thread answers to one request: its context, progress, tokens, and None at the end."""

    def __init__(self, alive: Callable[[], None]) -> None:
        super().__init__()
        self._alive = alive
        self._context: GenerationContext | None = None
        self.gone = False

    def put(self, item: Any, block: bool = True, timeout: float | None = None) -> None:
        """Take one item from the thread; a request that nobody waits for is told to stop."""
        self._alive()
        if isinstance(item, GenerationContext):
            self._context = item
        if self.gone:
            self.leave()
        super().put(item, block, timeout)

    def leave(self) -> None:
        """Nobody reads this answer any more: it ends at its next token, or never starts."""
        self.gone = True
        if self._context is not None:
            self._context.stop()


class Generator(ResponseGenerator):
    """mlx-lm's loop, started again after any exception.

    Args:
        provider: Loads the model.
        remembered: Conversations whose prompts stay in memory.
        say: Takes one line for the person who runs the server.
    """

    def __init__(self, provider: ModelProvider, remembered: int, say: Callable[[str], None]) -> None:
        self._remembered, self._say = remembered, say
        self._taken: set[Replies] = set()
        self._guard = threading.Lock()
        self._last_sign = time.monotonic()
        super().__init__(provider, LRUPromptCache(remembered))

    @property
    def is_healthy(self) -> bool:
        """Whether the thread answers: it lives, and has loaded, waited or computed a token lately."""
        busy = self.model_provider.is_loading or time.monotonic() - self._last_sign < STALLED
        return self._generation_thread.is_alive() and busy

    def replies(self, request: Prepared, args: GenerationArguments, look: Callable[[], None]) -> Iterator[Any]:
        """Yield what the thread answers: a GenerationContext, then tuples of progress and `Response`s.

        Args:
            request: The prompt.
            args: How to answer it.
            look: Called several times a second while we wait; what it raises ends the answer.

        Raises:
            Unanswered: the thread failed in the middle of the answer.
        """
        replies = Replies(self._sign)
        self.requests.put((replies, request, args))
        try:
            while True:
                look()
                try:
                    item = replies.get(timeout=LOOK)
                except Empty:
                    if not self._generation_thread.is_alive():
                        raise Unanswered("the thread that generates has ended; start the server again") from None
                    continue
                if item is None:
                    return
                if isinstance(item, BaseException):
                    raise Unanswered(f"{type(item).__name__}: {item}") from item
                yield item
        finally:
            replies.leave()
            with self._guard:
                self._taken.discard(replies)

    def _sign(self) -> None:
        self._last_sign = time.monotonic()

    def _run_generate(self) -> None:
        while True:
            try:
                self._generate()
                return
            except BaseException as error:  # a panic in a tokenizer's Rust code is no Exception
                self._start_over(error)

    def _start_over(self, error: BaseException) -> None:
        """Give the error to the requests that the loop had taken, and forget what it had computed."""
        with self._guard:
            failed, self._taken = self._taken, set()
        for replies in failed:
            replies.put(Unanswered(f"{type(error).__name__}: {error}"))
        self._say(f"generating failed ({type(error).__name__}: {error}); the server goes on")
        self.prompt_cache = LRUPromptCache(self._remembered)
        self._state_machine_cache.clear()
        mx.clear_cache()
        time.sleep(0.05)

    def _next_request(self, timeout: float | None = None) -> Any:
        self._sign()
        request = super()._next_request(timeout)
        if request is None or request[0].gone:
            return None
        with self._guard:
            self._taken.add(request[0])
        return request

    def _tokenize(self, tokenizer: Any, request: Any, args: GenerationArguments) -> Any:
        return copy.deepcopy(request.parts)  # the loop takes the segments apart

    def prepare(self, tokenizer: Any, request: CompletionRequest, args: GenerationArguments) -> tuple[Any, ...]:
        """Return a prompt as mlx-lm's loop wants it: tokens, segments and their kinds, the first state, no images."""
        if request.request_type == "text":  # as training tokenizes it
            tokens = PieceTokenizer(tokenizer).begun([request.prompt])[0]
            return tokens, [tokens], ["assistant"], "normal", None
        parts: tuple[Any, ...] = super()._tokenize(tokenizer, request, args)
        return parts
