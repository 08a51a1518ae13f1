"""Batches: every row once, rows of one length together, and no target without the inputs it needs."""

from dataclasses import dataclass

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mbf_mlx.data.batches import IGNORED, make_batch, of_few_shapes, plan_batches, split, without_prefix


@dataclass(frozen=True)
class Row:
    tokens: np.ndarray
    supervised: np.ndarray


def row(tokens, supervised):
    return Row(np.array(tokens, dtype=np.int32), np.array(supervised, dtype=bool))


@st.composite
def rows_of_a_task(draw):
    """Rows with a common beginning of any length, any tokens supervised."""
    common = draw(st.lists(st.integers(0, 3), max_size=6))
    rows = []
    for _ in range(draw(st.integers(1, 5))):
        tokens = common + draw(st.lists(st.integers(0, 3), min_size=2, max_size=6))
        rows.append(row(tokens, draw(st.lists(st.booleans(), min_size=len(tokens), max_size=len(tokens)))))
    return rows


def context_of(batch, n):
    """The tokens that the model has read when it predicts target n."""
    r, place = divmod(int(batch.positions[n]), batch.tokens.shape[1])
    assert r == batch.row_of[n] and place < batch.lengths[r]
    return [*batch.prefix.tolist(), *batch.tokens[r, : place + 1].tolist()]


@given(rows=rows_of_a_task(), share=st.booleans())
def test_every_supervised_token_is_predicted_from_exactly_the_tokens_before_it(rows, share):
    batch = make_batch(rows, range(len(rows)), share_prefix=share)
    expected = [
        (r, each.tokens[:i].tolist(), int(each.tokens[i]))
        for r, each in enumerate(rows)
        for i in range(1, len(each.tokens))
        if each.supervised[i]
    ]
    for form in (batch, without_prefix(batch)):
        got = [(int(form.row_of[n]), context_of(form, n), int(form.targets[n])) for n in range(len(form.targets))]
        assert got == expected
    assert len(without_prefix(batch).prefix) == 0
    assert batch.real_tokens == sum(len(each.tokens) for each in rows)
    assert batch.tokens.dtype == batch.prefix.dtype == batch.positions.dtype == batch.targets.dtype == np.int32


@given(rows=rows_of_a_task(), share=st.booleans())
def test_a_batch_padded_to_few_shapes_predicts_the_same(rows, share):
    batch = make_batch(rows, range(len(rows)), share_prefix=share)
    padded, count = of_few_shapes(batch), len(batch.targets)
    for n in range(count):
        assert context_of(padded, n) == context_of(batch, n)
    np.testing.assert_array_equal(padded.targets[:count], batch.targets)
    assert (padded.targets[count:] == IGNORED).all() and len(padded.targets) == len(padded.positions)
    assert padded.positions.max(initial=0) < padded.tokens.size and padded.real_tokens == batch.real_tokens


def test_padded_shapes_have_at_most_eight_values_per_doubling_and_cost_little():
    widths, prefixes, counts = set(), set(), set()
    for length in range(1, 1025):
        rows = [row(np.full(length + 1, 5), np.arange(length + 1) >= 1)] * 2
        padded = of_few_shapes(make_batch(rows, [0, 1], share_prefix=False))
        assert length <= padded.tokens.shape[1] <= max(length + 1, 1.125 * length)
        widths.add(padded.tokens.shape[1])
        counts.add(len(padded.targets))
        rows = [row(np.full(length + 2, 5), np.arange(length + 2) > length)] * 2
        kept = len(of_few_shapes(make_batch(rows, [0, 1])).prefix)
        assert length / 1.125 <= kept <= length
        prefixes.add(kept)
    assert len(widths) == len(prefixes) == 8 + 8 * 7 and len(counts) <= 8 * 8


@given(rows=rows_of_a_task(), share=st.booleans(), cores=st.integers(1, 4))
def test_the_parts_of_a_batch_predict_the_same_in_the_same_order(rows, share, cores):
    batch = make_batch(rows, range(len(rows)), share_prefix=share)
    parts = split(batch, cores)
    assert len(parts) in (1, cores)
    found, before = [], 0
    for part in parts:
        found += [
            (int(part.row_of[n]) + before, context_of(part, n), int(part.targets[n])) for n in range(len(part.targets))
        ]
        before += len(part.lengths)
        assert len(parts) == 1 or part.tokens.shape[1] == part.lengths.max()
    assert found == [
        (int(batch.row_of[n]), context_of(batch, n), int(batch.targets[n])) for n in range(len(batch.targets))
    ]
    assert [i for part in parts for i in part.indices] == list(batch.indices)


def test_parts_have_about_as_many_tokens_each_and_the_prefix_counts_as_the_first_ones():
    rows = [row([i] * n, [0] * (n - 1) + [1]) for i, n in enumerate((9, 9, 9, 9, 9, 9, 9, 9))]
    assert [len(part.lengths) for part in split(make_batch(rows, range(8)), 2)] == [4, 4]
    assert [len(part.lengths) for part in split(make_batch(rows, range(8)), 4)] == [2, 2, 2, 2]
    assert len(split(make_batch(rows, range(1)), 2)) == 1
    behind = [row([7] * 11 + [i] * 5 + [1], [0] * 16 + [1]) for i in range(8)]
    parts = split(make_batch(behind, range(8)), 2)  # a prefix of 11 tokens and 8 rows of 5 inputs
    assert [(part.part, len(part.prefix), len(part.lengths)) for part in parts] == [(0, 11, 3), (1, 11, 5)]
    long = [row([7] * 30 + [i, 1], [0] * 31 + [1]) for i in range(4)]
    assert len(split(make_batch(long, range(4)), 2)) == 1


def test_the_prefix_is_all_that_the_rows_share_before_the_first_target():
    rows = [row([1, 2, 3, 4, 5], [0, 0, 0, 1, 1]), row([1, 2, 3, 9, 6, 7], [0, 0, 0, 0, 0, 1])]
    batch = make_batch(rows, [0, 1])
    assert batch.prefix.tolist() == [1, 2]  # token 3 is shared too, but it is the input that predicts token 4
    assert batch.tokens.tolist() == [[3, 4, 0], [3, 9, 6]]
    assert batch.positions.tolist() == [0, 1, 5]
    assert batch.targets.tolist() == [4, 5, 7]
    assert batch.lengths.tolist() == [2, 3]
    assert batch.computed_tokens == 8


def test_equal_rows_keep_the_input_of_each_target():
    rows = [row([1, 2, 3, 4], [0, 0, 1, 1])] * 3
    batch = make_batch(rows, [0, 1, 2])
    assert batch.prefix.tolist() == [1]
    assert batch.tokens.tolist() == [[2, 3]] * 3


def test_rows_of_two_tokens_share_nothing_and_are_predicted():
    batch = make_batch([row([1, 2], [0, 1]), row([1, 3], [1, 1])], [1, 0])
    assert len(batch.prefix) == 0
    assert batch.tokens.tolist() == [[1], [1]]
    assert batch.targets.tolist() == [3, 2]  # the first token of a row has no input before it
    assert batch.indices == (1, 0)


def test_what_follows_the_last_target_is_not_computed():
    batch = make_batch([row([1, 2, 3, 4, 5, 6], [0, 0, 1, 0, 0, 0])], [0])
    assert batch.tokens.tolist() == [[1, 2]]


def test_a_row_without_targets_neither_counts_nor_limits_the_prefix():
    rows = [row([1, 2, 3], [0, 0, 1]), row([7, 8, 9], [0, 0, 0]), row([1, 2, 4], [0, 0, 1])]
    batch = make_batch(rows, [0, 1, 2])
    assert batch.prefix.tolist() == [1]
    assert batch.targets.tolist() == [3, 4]
    assert make_batch(rows, [1]).targets.size == 0


def test_a_batch_without_rows_is_refused():
    with pytest.raises(ValueError, match="at least one row"):
        make_batch([], [])


@given(
    lengths=st.lists(st.integers(1, 300), max_size=60),
    batch_size=st.integers(1, 9),
    seed=st.integers(0, 2**31),
    epoch=st.integers(0, 5),
)
def test_an_epoch_holds_every_row_once_in_full_batches_but_one(lengths, batch_size, seed, epoch):
    batches = plan_batches(lengths, batch_size, seed, epoch)
    assert sorted(i for batch in batches for i in batch) == list(range(len(lengths)))
    assert sorted(map(len, batches))[1:] == [batch_size] * max(len(batches) - 1, 0)
    assert list(batches) == list(plan_batches(lengths, batch_size, seed, epoch))


def test_rows_of_a_batch_have_nearly_one_length():
    lengths = np.random.default_rng(0).integers(10, 200, size=800).tolist()
    batches = plan_batches(lengths, 8, 0, 0)
    computed = sum(len(batch) * max(lengths[i] for i in batch) for batch in batches)
    assert computed < 1.06 * sum(lengths)


def test_epochs_and_seeds_differ():
    lengths = [20] * 64
    plans = {str(list(plan_batches(lengths, 8, seed, epoch))) for seed in range(3) for epoch in range(3)}
    assert len(plans) == 9
    together = [{frozenset(batch) for batch in plan_batches(lengths, 8, 0, epoch)} for epoch in range(2)]
    assert together[0] != together[1]


def test_the_smaller_batch_does_not_always_hold_the_longest_rows():
    lengths = list(range(10, 43))
    smallest = [min(plan_batches(lengths, 8, seed, 0), key=len) for seed in range(20)]
    assert len({lengths[batch[0]] for batch in smallest}) > 2


EPOCH = [[6, 1, 3, 8], [2, 9, 7], [10, 4, 5, 0]]


def test_an_epoch_is_the_one_that_was_drawn_before_batches_were_made_on_demand():
    # The draw decides what a stream learns: it may not change from one version to the next.
    lengths = [int(n) for n in np.random.default_rng(5).integers(5, 60, size=11)]
    assert list(plan_batches(lengths, 4, 3, 2)) == EPOCH
    assert plan_batches(lengths, 4, 3, 2)[1:] == EPOCH[1:]
    assert list(plan_batches(np.array(lengths, np.uint32), 4, 3, 2)) == EPOCH


def test_a_batch_size_below_one_is_refused():
    with pytest.raises(ValueError, match="at least 1 row"):
        plan_batches([3, 4], 0, 0, 0)
