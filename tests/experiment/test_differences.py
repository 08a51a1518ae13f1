"""Methods against one of them, from rows worked by hand."""

import pytest

from mbf_mlx.errors import InputError
from mbf_mlx.experiment.differences import columns, differences, reference_name
from tests.support.cells import row


def cell(label, seed, order, last, **changes):
    return row(seed, order, label=label, scores=((0.5,), last), hash=f"{label}{order}{seed}", **changes)


CELLS = [
    cell("slao", 0, "ab", (0.4, 0.8)),  # average 0.6
    cell("slao", 1, "ab", (0.5, 0.7)),  # 0.6
    cell("slao", 0, "ba", (0.3, 0.7)),  # 0.5
    cell("best", 0, "ab", (0.6, 0.8)),  # 0.7: +0.1, newest 0
    cell("best", 1, "ab", (0.6, 1.0)),  # 0.8: +0.2, newest +0.3
    cell("best", 0, "ba", (0.6, 1.0)),  # 0.8: +0.3, newest +0.3
    cell("best", 2, "ba", (0.0, 0.0)),  # no such cell of slao: not counted
    cell("best", 1, "ba", (0.0, 0.0), scored_on="valid"),
    cell("best", 1, "ba", (0.0, 0.0), rows={"test": 60}),
    cell("worse", 1, "ab", (0.4, 0.6), setting="low"),  # 0.5: -0.1, newest -0.1
    cell("elsewhere", 5, "ab", (0.4, 0.6)),
]


def test_a_method_is_held_against_the_same_order_and_seed_of_another():
    best, worse = differences(CELLS, "slao")
    assert (best.name, best.cells, worse.name, worse.cells) == ("best", 3, "worse [low]", 1)
    assert best.orders == pytest.approx({"ab": 0.15, "ba": 0.3})
    assert (best.mean, best.least, best.most, best.newest) == pytest.approx((0.2, 0.1, 0.3, 0.2))
    assert best.error == pytest.approx(0.1 / 3**0.5)  # deviation of 0.1, 0.2 and 0.3, of three cells
    assert worse.mean == pytest.approx(-0.1) and worse.error is None and worse.orders["ba"] is None
    (back,) = [line for line in differences(CELLS, "best") if line.name == "slao"]
    assert back.mean == pytest.approx(-0.2)


def test_differences_read_as_points_with_a_sign():
    found = columns(differences(CELLS, "slao"))
    assert found == {
        "method": ["best", "worse [low]"],
        "on ab": ["+15.0", "-10.0"],
        "on ba": ["+30.0", "-"],
        "cells": ["3", "1"],
        "mean": ["+20.0", "-10.0"],
        "standard error": ["5.8", "-"],
        "least, most": ["+10.0, +30.0", "-10.0, -10.0"],
        "newest": ["+20.0", "-10.0"],
    }
    assert list(columns(differences(CELLS[:2] + CELLS[3:5], "slao")))[:2] == ["method", "cells"]  # of one order


def test_a_method_without_a_score_has_no_line():
    blank = cell("blank", 0, "ab", (None, None))
    assert [line.name for line in differences([*CELLS[:3], blank], "slao")] == []


def test_the_one_to_compare_with_is_named_with_its_setting_or_without():
    names = ["slao [low]", "slao, last merge [low]", "ewc [low]", "ewc [high]", "ewc [high]"]
    assert reference_name(names, "slao") == reference_name(names, "slao [low]") == "slao [low]"
    assert reference_name(["slao"], "slao") == "slao"
    with pytest.raises(InputError, match=r"--against: expected one of 'ewc \[low\]', 'ewc \[high\]', got 'ewc'"):
        reference_name(names, "ewc")
    with pytest.raises(InputError, match=r"expected one of 'slao \[low\]', .*'ewc \[high\]', got 'sloa'"):
        reference_name(names, "sloa")
