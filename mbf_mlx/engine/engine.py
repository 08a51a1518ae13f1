"""What every engine does: the loss of a batch, its gradients and its scores, and greedy answers to prompts.

Letters: N supervised positions of a batch (data/batches.py), D the hidden size, V the vocabulary. An engine turns a
batch into hidden states (N, D) and these into logits (N, V). Losses are differentiable with respect to the model's
trainable parameters: the LoRA factors, as mlx-lm attaches them. The optimizer and the steps are left to
learning/train.py.

There are two engines, and choose.py picks one. by_hand.py computes a Llama on a CPU with a pass and gradients of our
own. through_mlx.py runs mlx-lm's own pass, for every architecture and device.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Iterator, Sequence
from typing import ClassVar

import mlx.core as mx
import numpy as np
from mlx import nn

from mbf_mlx.config import Precision
from mbf_mlx.data.batches import IGNORED, Batch, LabelledTokens, make_batch
from mbf_mlx.device.budgets import KEPT_TOKENS, LOGITS_COPIES
from mbf_mlx.engine.answers import MOST_ROWS, Question, groups_of_like_length
from mbf_mlx.errors import InputError, MemoryLimitError

Arrays = dict[str, mx.array]  # by name: what is differentiated, and its gradients
LossAndGrad = Callable[[Arrays, Batch], tuple[mx.array, Arrays]]
KNOWN_WELL = 1e-6  # nats, added to a loss before its logarithm is taken
# Arguments: the batch's place in the list, the layer's name, its inputs (T, in), the gradients with respect to its
# outputs (T, out), and the row of the batch that each token belongs to (T,).
Note = Callable[[int, str, mx.array, mx.array, np.ndarray], None]
# Arguments: a part's number in its batch, how many parts the batch has, the layer's name, its inputs (T, in), the
# gradients with respect to its outputs (T, out), and the part's row of each token, -1 for the shared prefix (T,).
TrainingNote = Callable[[int, int, str, mx.array, mx.array, np.ndarray], None]


class Engine(ABC):
    """Losses and scores of batches, on one model.

    Args:
        model: A model as mlx-lm loads it, with LoRA layers attached.
        checkpoint: Recompute a block's activations in the backward pass instead of keeping them. It may change from
            one batch to the next.
        logits_bytes: How much memory logits may take at a time, as `budgets.LOGITS_BYTES` explains.

    Attributes:
        before: Called with each batch, and whether it is trained on, before it is computed. Raises to refuse the batch.
        room: Returns how many bytes the process may still take.
        training_note: Called for each trained layer in a training's backward pass, if `notes_training`.
    """

    by_hand: ClassVar[bool]  # whether llama_pass.py computes the pass; memory/formula.py counts that pass differently

    notes_training: ClassVar[bool] = False  # whether a backward pass in training calls `training_note`

    def __init__(self, model: nn.Module, *, checkpoint: bool, logits_bytes: int) -> None:
        self.model = model
        self.training_note: TrainingNote | None = None
        self.checkpoint = checkpoint
        self.logits_bytes = logits_bytes
        self.before: Callable[[Batch, bool], None] = lambda batch, training: None
        self.room: Callable[[], int] = lambda: 2 * KEPT_TOKENS

    @property
    @abstractmethod
    def vocabulary(self) -> int:
        """The number of tokens that the model knows, V."""

    def multiply_in(self, precision: Precision) -> None:
        """Multiply with the frozen weights in this precision, in training and in measuring; scores stay in float32.

        Raises:
            InputError: this engine or this machine cannot.
        """
        if precision == "bfloat16":
            raise InputError(
                "precision: expected float32, got bfloat16, which is for a Llama on a CPU without dropout whose weights"
                " are unpacked"
            )

    def loss_sum(self, batch: Batch) -> mx.array:
        """Return the sum of the cross-entropy over the batch's N supervised tokens: a float32 scalar.

        The cross-entropy is in float32 whatever the model computes in. Dropout is on or off as `model.train()` and
        `model.eval()` left it.
        """
        if not len(batch.targets):
            return mx.array(0.0)
        self.before(batch, True)
        return self._loss(batch)

    def loss_and_grad(self, apply: Callable[[Arrays], None]) -> LossAndGrad:
        """Return a function from arrays and a batch to `loss_sum` of the batch and its gradients, by the arrays' names.

        Make a new one for each task: a compiled function keeps whatever else `apply` read when it was compiled.

        Args:
            apply: Puts the arrays into the model.
        """

        def loss(arrays: Arrays, batch: Batch) -> mx.array:
            apply(arrays)
            return self.loss_sum(batch)

        return mx.value_and_grad(loss)

    @abstractmethod
    def watched_together(self, rows: Sequence[LabelledTokens], start: int, batch_size: int) -> list[Batch]:
        """Return the batches that the next call of `watch` should see: one or more rows, from `start` on.

        Args:
            rows: All rows.
            start: The first row that was not watched yet.
            batch_size: The rows that train together, and so fit in memory.

        Raises:
            MemoryLimitError: `before` refuses even a single row.
        """

    def watch(self, batches: Sequence[Batch], note: Note, logarithm: bool = True) -> None:
        """Call `note` with the inputs of each trained layer and with the gradients with respect to its outputs.

        What is differentiated is the sum over rows of a row's mean loss, or of that loss's logarithm. Within a row the
        two differ by a factor only. In half precision the logarithm keeps the gradients of rows that the model knows
        well, which would otherwise vanish.

        Args:
            batches: As `watched_together` makes them. A batch without supervised tokens is skipped.
            note: Has to evaluate what it makes of its arguments. Several threads may call it.
            logarithm: Whether to differentiate the logarithm.
        """
        self._watch([(place, batch) for place, batch in enumerate(batches) if len(batch.targets)], note, logarithm)

    def score(self, batch: Batch) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Return what the model says at each supervised position.

        Returns:
            The cross-entropy of the target, float32[N]; the most likely token, int32[N]; and by how much its logit
            exceeds the second best, float32[N].
        """
        if not len(batch.targets):
            return np.zeros(0, np.float32), np.zeros(0, np.int32), np.zeros(0, np.float32)
        self.before(batch, False)
        targets, states = mx.array(batch.targets), self._states(batch)
        parts: list[tuple[np.ndarray, np.ndarray, np.ndarray]] = []
        for start, stop in self.chunks(len(batch.targets)):
            losses, logits = cross_entropy(self._logits(states[start:stop]), targets[start:stop])
            best = mx.argmax(logits, axis=-1, keepdims=True)
            second = mx.where(mx.arange(logits.shape[-1]) == best, -mx.inf, logits).max(axis=-1)
            margin = mx.take_along_axis(logits, best, axis=-1)[:, 0] - second
            mx.eval(losses, best, margin)  # now, or the logits of all chunks would be in memory together
            parts.append((np.array(losses), np.array(best[:, 0].astype(mx.int32)), np.array(margin)))
        all_losses, all_best, all_margins = zip(*parts)
        return np.concatenate(all_losses), np.concatenate(all_best), np.concatenate(all_margins)

    def answers(
        self,
        questions: Sequence[Question],
        ends: Collection[int],
        advance: Callable[[int], None] = lambda rows: None,
    ) -> list[list[int]]:
        """Return the greedy answer to each question, as tokens, without the end token.

        Args:
            questions: The prompts.
            ends: The tokens at which an answer ends.
            advance: Called with the number of answers that have ended since the last call.

        Raises:
            MemoryLimitError: `before` refuses even a single prompt.
        """
        found: list[list[int]] = [[] for _ in questions]
        for group in groups_of_like_length(questions):
            for place, tokens in self._answers([questions[i] for i in group], ends):
                found[group[place]] = tokens
                advance(1)
        return found

    def answered_together(self, bytes_a_token: int, tokens: int) -> int:
        """Return how many rows are answered together: their keys and values take half of the room at most.

        Args:
            bytes_a_token: Of keys and values, in all blocks.
            tokens: The most that one row keeps.
        """
        kept = min(KEPT_TOKENS, self.room() // 2)
        return max(1, min(MOST_ROWS, kept // (bytes_a_token * tokens)))

    def prompts_together(self, questions: Sequence[Question], most: int, *, share_prefix: bool) -> Batch:
        """Return the first `most` prompts as a batch, or as many as memory has room for.

        Raises:
            MemoryLimitError: `before` refuses even the first.
        """
        count = min(most, len(questions))
        while True:
            batch = make_batch(questions, range(count), share_prefix=share_prefix)
            try:
                self.before(batch, False)
                return batch
            except MemoryLimitError:
                if count == 1:
                    raise
                count //= 2

    def chunks(self, count: int, sharing: int = 1) -> Iterator[tuple[int, int]]:
        """Yield the first and last + 1 of the positions whose logits fit into the budget together.

        Args:
            count: Positions in all.
            sharing: How many threads share the budget.
        """
        most = max(1, self.logits_bytes // (4 * LOGITS_COPIES * self.vocabulary * sharing))
        rows = max(1, -(-count // max(1, -(-count // most))))  # as few chunks as possible, all of one size
        for start in range(0, count, rows):
            yield start, min(start + rows, count)

    @abstractmethod
    def _loss(self, batch: Batch) -> mx.array:
        """Return the loss of a batch with targets, differentiable."""

    @abstractmethod
    def _states(self, batch: Batch) -> mx.array:
        """Return what `_logits` makes logits of, a row for each supervised position."""

    @abstractmethod
    def _logits(self, states: mx.array) -> mx.array:
        """Return the logits (N, V) of some rows of `_states`."""

    @abstractmethod
    def _answers(self, questions: Sequence[Question], ends: Collection[int]) -> Iterator[tuple[int, list[int]]]:
        """Yield the place and the answer of each of some questions of about one length, as `answers` returns them."""

    @abstractmethod
    def _watch(self, batches: list[tuple[int, Batch]], note: Note, logarithm: bool) -> None:
        """Do what `watch` says, on batches that have targets, each with its place."""


def cross_entropy(logits: mx.array, targets: mx.array) -> tuple[mx.array, mx.array]:
    """Return the cross-entropy of each target, float32 (N,) and 0 for IGNORED, and the logits (N, V) in float32."""
    logits = logits.astype(mx.float32)
    targets = mx.stop_gradient(targets)  # a checkpointed call would compute their gradient
    right = mx.take_along_axis(logits, mx.maximum(targets, 0)[:, None], axis=-1)[:, 0]
    return mx.where(targets == IGNORED, 0, mx.logsumexp(logits, axis=-1) - right), logits
