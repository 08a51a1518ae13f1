"""Rows of tokens that are kept in memory or in a file, and come back as they were."""

import errno
import gc
import tracemalloc
from pathlib import Path

import numpy as np
import pytest

from mbf_mlx.data import token_rows
from mbf_mlx.data.batches import lengths_of, make_batch, plan_batches
from mbf_mlx.data.row import Row
from mbf_mlx.data.token_rows import Encoded, EncodedRows
from mbf_mlx.errors import InputError


def drawn(count):
    """Rows of 2 to 40 random tokens, as an encoder gives them."""
    rng = np.random.default_rng(0)
    found = []
    for number in range(count):
        length = int(rng.integers(2, 40))
        tokens, supervised = rng.integers(0, 50_000, length).astype(np.int32), rng.random(length) < 0.5
        supervised[-1] = True
        row = Row("completion", Path("task.jsonl"), number + 1, f"prompt {number}", "yes")
        found.append(Encoded(tokens, supervised, length - 1, number % 3, row))
    return found


def stored(rows, **more):
    kept = EncodedRows([each.row for each in rows], **more)
    for each in rows:
        kept.append(each)
    return kept


@pytest.fixture(params=["in memory", "in a file"])
def place(request, monkeypatch):
    """Small tasks stay in memory, large ones do not."""
    if request.param == "in a file":
        monkeypatch.setattr(token_rows, "IN_MEMORY", 100)


def test_rows_come_back_as_they_were(place, tmp_path):
    rows = drawn(50)
    kept = stored(rows, spill=tmp_path)
    assert list(tmp_path.iterdir()) == []  # the file has no name
    assert len(kept) == len(rows) and kept.cut_rows == sum(each.cut > 0 for each in rows)
    assert kept.lengths.tolist() == lengths_of(rows)
    for one, other in [*zip(kept, rows, strict=True), (kept[-1], rows[-1]), (kept[7:9][1], rows[8])]:
        assert one.tokens.dtype == np.int32 and one.supervised.dtype == bool
        np.testing.assert_array_equal(one.tokens, other.tokens)
        np.testing.assert_array_equal(one.supervised, other.supervised)
        assert (one.prompt_length, one.cut, one.row) == (other.prompt_length, other.cut, other.row)
    with pytest.raises(IndexError):
        kept[50]


def test_batches_are_the_same_from_a_file_as_from_memory(place):
    rows = drawn(50)
    kept = stored(rows)
    assert list(plan_batches(lengths_of(kept), 8, 1, 2)) == list(plan_batches(lengths_of(rows), 8, 1, 2))
    for indices in plan_batches(lengths_of(rows), 8, 1, 2):
        one, other = make_batch(kept, indices), make_batch(rows, indices)
        for name in ("prefix", "tokens", "lengths", "positions", "targets", "row_of"):
            np.testing.assert_array_equal(getattr(one, name), getattr(other, name))
        assert (one.indices, one.real_tokens) == (other.indices, other.real_tokens)


def test_a_row_costs_a_few_bytes_of_memory_however_long_it_is(monkeypatch):
    monkeypatch.setattr(token_rows, "IN_MEMORY", 1000)
    (long,) = [Encoded(np.arange(500, dtype=np.int32), np.ones(500, bool), 3, 0, Row("text", Path(), 1, text="a"))]
    kept = EncodedRows([long.row] * 20_000)
    gc.collect()
    tracemalloc.start()
    try:
        for _ in range(20_000):
            kept.append(long)
        assert tracemalloc.get_traced_memory()[0] < 20_000 * 20
    finally:
        tracemalloc.stop()


def test_a_full_disk_is_said_so(monkeypatch, tmp_path):
    kept = stored(drawn(2), spill=tmp_path)

    class Full:
        def seek(self, *_):
            raise OSError(errno.ENOSPC, "no space")

    monkeypatch.setattr(kept, "_file", Full())
    with pytest.raises(InputError, match="the disk is full"):
        kept.append(drawn(1)[0])
