"""Rows of random tokens, as an export compares two models on them."""

from dataclasses import dataclass

import numpy as np


@dataclass
class TokenRow:
    tokens: np.ndarray
    supervised: np.ndarray


def token_rows(count, seed=0, length=12):
    generator = np.random.default_rng(seed)
    mask = np.arange(length) >= length - 3
    return [TokenRow(generator.integers(3, 300, length).astype(np.int32), mask) for _ in range(count)]
