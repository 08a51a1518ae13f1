"""Measures against tables worked out by hand."""

import math

import pytest

from mbf_mlx.metrics import (
    Disparity,
    Mean,
    average_accuracy,
    backward_transfer,
    forgetting,
    forward_transfer,
    learning_accuracy,
    newest_score,
    order_disparity,
    spread,
)

# Task 1 falls 0.9 -> 0.5 after a rise to 1.0 in between; task 2 falls 0.8 -> 0.7; task 3 is learned to 0.6.
THREE = [[0.9, 0.2, 0.1], [1.0, 0.8, 0.3], [0.5, 0.7, 0.6]]


def test_average_accuracy_is_the_mean_of_the_last_row():
    assert average_accuracy(THREE) == Mean(pytest.approx((0.5 + 0.7 + 0.6) / 3), 3)


def test_backward_transfer_divides_by_t_minus_1():
    assert backward_transfer(THREE) == Mean(pytest.approx(((0.5 - 0.9) + (0.7 - 0.8)) / 2), 2)


def test_learning_accuracy_is_the_mean_of_the_diagonal():
    assert learning_accuracy(THREE) == Mean(pytest.approx((0.9 + 0.8 + 0.6) / 3), 3)
    assert learning_accuracy([[None], [0.5, 0.7]]) == Mean(0.7, 1, (1,))


def test_forgetting_is_measured_from_the_best_earlier_score():
    assert forgetting(THREE) == Mean(pytest.approx(((1.0 - 0.5) + (0.8 - 0.7)) / 2), 2)


def test_forgetting_is_negative_where_the_last_score_is_the_best():
    assert forgetting([[0.2], [0.5, 0.9]]).value == pytest.approx(-0.3)


def test_forward_transfer_is_the_gain_over_the_base_just_before_learning():
    assert forward_transfer(THREE, [0.3, 0.1, 0.25]) == Mean(pytest.approx(((0.2 - 0.1) + (0.3 - 0.25)) / 2), 2)


def test_forward_transfer_says_which_tasks_were_not_scored_ahead():
    rows = [[0.9], [1.0, 0.8, 0.3], [0.5, 0.7, 0.6]]
    assert forward_transfer(rows, [0.3, 0.1, 0.25]) == Mean(pytest.approx(0.05), 1, (2,))


def test_forward_transfer_refuses_a_base_row_of_another_length():
    with pytest.raises(ValueError, match="expected 3 scores of the base model, got 2"):
        forward_transfer(THREE, [0.3, 0.1])


def test_newest_score_is_the_last_on_the_diagonal():
    assert newest_score(THREE) == 0.6
    assert newest_score([[0.9], [0.5, None]]) is None


def test_rows_that_end_at_their_own_task_give_the_same():
    ragged = [row[: i + 1] for i, row in enumerate(THREE)]
    for measure in (average_accuracy, backward_transfer, forgetting, newest_score):
        assert measure(ragged) == measure(THREE)


def test_one_task_has_neither_transfer_nor_forgetting():
    assert average_accuracy([[0.4]]) == Mean(0.4, 1)
    assert backward_transfer([[0.4]]) == forgetting([[0.4]]) == Mean(None, 0)


def test_an_empty_stream_has_no_measures():
    for measure in (average_accuracy, backward_transfer, forgetting):
        assert measure([]) == Mean(None, 0)
    assert forward_transfer([], []) == Mean(None, 0)
    assert newest_score([]) is None


def test_a_missing_score_is_left_out_and_named():
    rows = [[0.9], [1.0, None], [None, 0.7, 0.6]]
    assert average_accuracy(rows) == Mean(pytest.approx(0.65), 2, (1,))
    assert backward_transfer(rows) == Mean(None, 0, (1, 2))
    assert forgetting(rows) == Mean(None, 0, (1, 2))


def test_forgetting_takes_the_best_of_those_earlier_scores_that_are_there():
    rows = [[None], [0.8, 0.5], [0.6, 0.5, 0.9]]
    assert forgetting(rows) == Mean(pytest.approx((0.2 + 0.0) / 2), 2)
    assert backward_transfer(rows) == Mean(pytest.approx(0.0), 1, (1,))


def test_a_score_that_is_no_number_counts_as_missing():
    assert average_accuracy([[0.5], [math.nan, 0.7]]) == Mean(0.7, 1, (1,))


def test_order_disparity_is_the_largest_and_the_mean_range():
    finals = [{"a": 0.5, "b": 0.7}, {"b": 0.4, "a": 0.6}, {"a": 0.9, "b": 0.6}]
    assert order_disparity(finals) == Disparity(pytest.approx(0.4), pytest.approx((0.4 + 0.3) / 2))


def test_order_disparity_names_tasks_that_an_order_did_not_score():
    assert order_disparity([{"a": 0.5, "b": 0.7}, {"a": 0.6, "b": None}]) == Disparity(
        pytest.approx(0.1), pytest.approx(0.1), ("b",)
    )
    assert order_disparity([{"a": 0.5}]) == Disparity(None, None)
    assert order_disparity([]) == Disparity(None, None)


def test_spread_divides_by_n_minus_1():
    assert spread([1.0, 2.0, 4.0]) == (pytest.approx(7 / 3), pytest.approx(math.sqrt(7 / 3)), 3)


def test_spread_of_one_or_no_value_has_no_deviation():
    assert spread([None, 0.5]) == (0.5, None, 1)
    assert spread([None]) == (None, None, 0)
