"""Rows that are kept by their places, and compared by their digests."""

import numpy as np
import pytest

from mbf_mlx.data import file_rows


def test_rows_are_found_again_wherever_lines_and_offsets_jump():
    stand, expected = file_rows.Places(), []
    offset, line = 3, 1
    for number in range(300):
        expected.append((offset, line))
        stand.append(offset, line)
        offset += 5_000_000_000 if number == 100 else 40  # further than 32 bits reach
        line += 7 if number % 50 == 10 else 1  # blank lines, or a record over several
    assert [stand[number] for number in range(len(stand))] == expected


@pytest.mark.parametrize("distinct", [1, 2, 9, 10, 11, 57, 400])
@pytest.mark.parametrize("block", [3, 1 << 20])
def test_one_row_in_ten_of_those_that_differ_is_held_out(distinct, block, monkeypatch):
    monkeypatch.setattr(file_rows, "BLOCK", block)
    generator = np.random.default_rng(distinct)
    values = generator.integers(0, 2**63, distinct).astype(np.uint64)
    digests = generator.permutation(np.concatenate([values, generator.choice(values, 3 * distinct)]))
    rows = file_rows.FileRows(None, np.arange(len(digests), dtype=np.uint32), None, digests)
    assert set(digests[file_rows.pick_share(rows, 10)]) == set(np.sort(values)[: max(1, distinct // 10)])
