"""Where each token of a batch stands: for attention, which alone has to know rows, places and the shared prefix.

Letters: T tokens of a batch, the prefix's P first and then each row's own, without padding; R rows of at most W tokens;
N supervised positions; d the size of a head. Knows no mlx.
"""

from dataclasses import dataclass

import numpy as np

from mbf_mlx.data.batches import Batch


@dataclass(frozen=True, kw_only=True)
class RowLayout:
    """Where rows stand among tokens: row r has lengths[r] of them from starts[r] on, and none is longer than width."""

    starts: list[int]
    lengths: list[int]
    width: int
    mask: np.ndarray  # (1 or R, keys, W), added to scores of the row's own keys: 0, or -inf for a key after the query


@dataclass(frozen=True, kw_only=True)
class Tokens:
    """The tokens that are queries in one block, or the tokens that are keys."""

    own: RowLayout  # each row without the prefix
    prefix: RowLayout | None  # the prefix as one row; None if it is not among these tokens
    turn: tuple[np.ndarray, np.ndarray]  # cosines and sines of each token's rotary angles, (T, d / 2)

    @property
    def parts(self) -> list[RowLayout]:
        """The rows, and the prefix if it is there."""
        return [self.own] if self.prefix is None else [self.own, self.prefix]


class Layout:
    """Where each token of a batch stands, or of a part of a batch.

    Only the first part computes the prefix, so for the others it is not among their T tokens.

    Args:
        batch: A batch or one of its parts.
        angles: Cosines and sines of the rotary angles of positions 0, 1, …, two arrays (at least P + W, d / 2).

    Attributes:
        part: The batch's number among the parts, from 0.
        tokens: The T tokens, int32.
        picked: Which of them are supervised positions, (N,).
        all: All tokens: the queries of every block but the last, and the keys of every block.
        supervised: The tokens at supervised positions: the queries of the last block.
    """

    def __init__(self, batch: Batch, angles: tuple[np.ndarray, np.ndarray]):
        shared, width = len(batch.prefix), batch.tokens.shape[1]
        here = shared if batch.part == 0 else 0  # tokens of the prefix that this part computes
        self.part = batch.part
        real = np.arange(width) < batch.lengths[:, None]
        place = np.nonzero(real)[1]  # in its row, of each token after the prefix
        self.tokens = np.concatenate([batch.prefix[:here], batch.tokens[real]])
        number = np.cumsum(real).reshape(real.shape) - 1 + here
        self.picked = number.reshape(-1)[batch.positions]  # which of the T tokens are supervised inputs

        prefix = None
        if here:
            prefix = RowLayout(starts=[0], lengths=[shared], width=shared, mask=_mask(np.arange(shared)[None], shared))
        everything = np.concatenate([np.arange(here), shared + place])
        causal = _mask(np.arange(width)[None], width)
        rows = RowLayout(starts=_starts(batch.lengths, here), lengths=batch.lengths.tolist(), width=width, mask=causal)
        self.all = Tokens(own=rows, prefix=prefix, turn=(angles[0][everything], angles[1][everything]))

        counts = np.bincount(batch.row_of, minlength=len(real))
        chosen = place[self.picked - here]
        # The places of the queries in each row; a row with fewer queries is filled up with its first token.
        queries = np.zeros((len(real), int(counts.max())), np.int64)
        queries[batch.row_of, np.arange(len(chosen)) - np.repeat(_starts(counts, 0), counts)] = chosen
        mask = causal if len(chosen) == len(place) else _mask(queries, width)
        rows = RowLayout(starts=_starts(counts, 0), lengths=counts.tolist(), width=queries.shape[1], mask=mask)
        angles = angles[0][shared + chosen], angles[1][shared + chosen]
        self.supervised = Tokens(own=rows, prefix=None, turn=angles)

    def rows_at(self, tokens: int) -> np.ndarray:
        """Return the row of each token, -1 for those of the prefix: of all tokens, or of the supervised ones.

        Args:
            tokens: How many tokens there are, which says which of the two is meant.
        """
        own = self.all.own.lengths if tokens == len(self.tokens) else self.supervised.own.lengths
        rows = np.repeat(np.arange(len(own)), own)
        return np.concatenate([np.full(tokens - len(rows), -1), rows])


def _starts(lengths: np.ndarray, first: int) -> list[int]:
    return [first, *(first + np.cumsum(lengths)[:-1]).tolist()]


def _mask(places: np.ndarray, keys: int) -> np.ndarray:
    """Return the mask of queries at `places` (R, W), (R, keys, W)."""
    later = np.arange(keys)[:, None] > places[:, None, :]
    return np.where(later, np.float32(-np.inf), np.float32(0))
