"""Rows of a task that can be learned: which of two words comes first in the alphabet."""

import numpy as np

WORDS = ["red", "green", "blue", "small", "large", "cold", "warm", "old", "new", "round"]


def rows_of(count, seed=0):
    generator = np.random.default_rng(seed)
    words = generator.choice(WORDS, size=(count, 4))
    return [{"prompt": " ".join(line), "completion": "yes" if line[0] < line[1] else "no"} for line in words]
