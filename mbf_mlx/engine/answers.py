"""What greedy answers are asked for, which of them are computed together, and how their text is read.

The engines compute the answers: by_hand.py with llama_answers.py, through_mlx.py with mlx-lm's batch generation.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

MOST_ROWS = 64  # that are answered together; more would gain little and keep more in memory
ALIKE = 0.5  # rows go together if the shortest takes at least this share of the longest one's tokens


@dataclass(frozen=True, eq=False)
class Question:
    """A prompt that is to be answered.

    Its two properties make it a row of a batch (data/batches.py) whose one target is the token behind the prompt.
    """

    prompt: np.ndarray  # int32[n], n >= 1
    most: int  # tokens of the answer at most, at least 1; the end token counts

    @property
    def longest(self) -> int:
        """The most tokens of prompt and answer."""
        return len(self.prompt) + self.most

    @property
    def tokens(self) -> np.ndarray:
        """The prompt and a token behind it, int32[n + 1]."""
        return np.append(self.prompt, 0).astype(np.int32)

    @property
    def supervised(self) -> np.ndarray:
        """Which tokens are labels, bool[n + 1]: the last."""
        return np.append(np.zeros(len(self.prompt), bool), True)


def groups_of_like_length(questions: Sequence[Question]) -> Iterator[list[int]]:
    """Yield the questions in groups of about one length, as their places in `questions`; the longest come first."""
    group: list[int] = []
    for place in sorted(range(len(questions)), key=lambda i: -questions[i].longest):
        if group and questions[place].longest < ALIKE * questions[group[0]].longest:
            yield group
            group = []
        group.append(place)
    if group:
        yield group


def text_of(tokenizer: Any, tokens: Sequence[int]) -> str:
    """Return the text of an answer's tokens, as mlx-lm writes it token by token."""
    detokenizer = tokenizer.detokenizer  # a new one
    text = ""
    for token in tokens:
        detokenizer.add_token(token)
        text += detokenizer.last_segment
    detokenizer.finalize()
    return text + str(detokenizer.last_segment)
