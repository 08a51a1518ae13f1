"""The table of an experiment, from rows worked by hand."""

import pytest

from mbf_mlx.errors import InputError
from mbf_mlx.experiment.results import measured, read_results
from mbf_mlx.experiment.table import cells_of, columns, markdown, points, table
from mbf_mlx.files.log import Log
from mbf_mlx.metrics import Spread
from tests.support.cells import row


def test_a_cell_is_measured_from_its_matrix_and_the_base():
    found = measured([[0.8, 0.5], [0.6, 0.9]], [0.1, 0.3])
    assert found["average_accuracy"] == pytest.approx(0.75)
    assert found["backward_transfer"] == pytest.approx(-0.2)
    assert found["forgetting"] == pytest.approx(0.2)
    assert found["forward_transfer"] == pytest.approx(0.2)
    assert found["newest"] == 0.9 and found["learning_accuracy"] == pytest.approx(0.85)
    at_the_end = measured([[None], [0.6, 0.9]], None)  # trained after the last task alone
    assert at_the_end["learning_accuracy"] is None and at_the_end["average_accuracy"] == pytest.approx(0.75)


def test_means_over_orders_are_taken_seed_by_seed_and_then_over_seeds():
    rows = [
        row(0, scores=((0.8,), (0.6, 0.8))),  # average 0.7
        row(0, "ba", ("b", "a"), ((0.9,), (0.5, 0.7))),  # 0.6: the seed's mean 0.65; a 0.6 and 0.7, b 0.8 and 0.5
        row(1, scores=((0.8,), (0.7, 0.9))),  # 0.8
        row(1, "ba", ("b", "a"), ((0.9,), (0.6, 0.8))),  # 0.7: 0.75; a 0.7 and 0.8, b 0.9 and 0.6
        row(2, scores=((0.0,), (0.0, 0.0))),  # no second order yet: not counted over orders
    ]
    ab, ba, both = table(rows)
    assert (ab.order, ba.order, both.order, both.seeds, ab.seeds) == ("ab", "ba", "all", 2, 3)
    spread = both.measures["average_accuracy"]
    assert spread.mean == pytest.approx(0.7) and spread.deviation == pytest.approx(0.0707107, rel=1e-5)
    assert both.measures["largest_disparity"].mean == pytest.approx(0.3)
    assert both.measures["average_disparity"].mean == pytest.approx(0.2)
    assert ab.measures["largest_disparity"].mean is None
    assert ba.measures["newest"].mean == pytest.approx(0.75)
    assert ab.seconds == 70 and ab.kept_bytes == 2000


def test_a_mean_over_some_of_the_orders_is_not_called_one_over_all():
    cells = [row(order=o, label=name) for name, orders in (("x", "abc"), ("y", "ab"), ("z", "a")) for o in orders]
    valid = [row(order=o, label="x", scored_on="valid", scores=((0.1,), (0.1, 0.1))) for o in "ab"]
    found = {(line.label, line.order): line for line in table(cells)}
    assert ("x", "all") in found and ("y", "2 orders") in found and ("y", "all") not in found
    assert [key for key in found if key[0] == "z"] == [("z", "a")]
    apart = [line for line in table([*cells, *valid]) if line.order == "all"]
    assert [line.measures["average_accuracy"].mean for line in apart] == pytest.approx([0.75, 0.1])


def test_a_line_reads_as_points_with_the_deviation_between_seeds():
    (line,) = table([row(0), row(1, scores=((0.8,), (0.4, 0.9)))])
    cells = cells_of(line)
    assert cells[:7] == ["slao", "ab", "2", "70.0 ± 7.1", "-30.0 ± 14.1", "30.0 ± 14.1", "-"]
    assert cells[7:] == ["85.0 ± 0.0", "90.0 ± 0.0", "-", "-", "2.0 kB", "1 min 10 s"]
    assert points(None) == "-" and points(Spread(-0.0004, None, 1)) == "0.0"
    (one,) = table([row(setting="low", grows=True)])
    assert cells_of(one)[:4] == ["slao [low]", "ab", "1", "75.0"]
    assert cells_of(one)[-2] == "2.0 kB, grows"
    assert markdown(columns([one])).splitlines()[2].startswith("| slao [low] | ab | 1 | 75.0 | -20.0 |")


def test_a_column_in_which_no_line_has_anything_is_left_out():
    lines = table([row(order=order, label=label) for label, orders in (("x", "ab"), ("y", "a")) for order in orders])
    found = columns(lines)
    assert "FWT" not in found and found["MOPD"] == ["-", "-", "0.0", "-"]
    assert "MOPD" not in columns(lines[:2])
    one_order = columns(lines[:2])
    assert [len(line.split("|")) for line in markdown(one_order).splitlines()] == [len(one_order) + 2] * 4


def test_a_name_does_not_end_a_cell_of_a_markdown_table():
    assert markdown({"method": ["a|b"], "AA": ["1.0"]}).splitlines()[2] == "| a\\|b | 1.0 |"


def test_a_half_written_line_is_left_out_and_the_next_begins_behind_it(tmp_path):
    log = Log(tmp_path / "results.jsonl")
    log.add(row(0))
    with open(log.path, "ab") as file:
        file.write(b'{"hash": "x", "sco')
    log.add(row(1))
    assert [r["seed"] for r in log.read()] == [0, 1]
    assert [r["seed"] for r in read_results(tmp_path)] == [0, 1]
    log.add(row(0, hash="other settings"))
    log.add(row(1, hash="valid rows", scored_on="valid"))
    found = [(r["seed"], r["hash"]) for r in read_results(tmp_path)]
    assert found == [(0, "other settings"), (1, row(1)["hash"]), (1, "valid rows")]
    with pytest.raises(InputError, match=r"expected the results of an experiment"):
        read_results(tmp_path / "nothing")


SCORES = "scores: expected one row for each of 2 tasks, as long as its place"
BAD_ROWS = {
    "no label": ({"label": None}, "label: input should be a valid string"),
    "a list as label": ({"label": ["slao"]}, "label: input should be a valid string"),
    "a seed in words": ({"seed": {}}, "seed: input should be a valid integer"),
    "scores that are a number": ({"scores": 7}, "scores: input should be a valid list"),
    "a score in words": (
        {"scores": [["high"], [0.5, 0.5]]},
        "scores.0.0: input should be a valid number, unable to parse string as a number",
    ),
    "a base's score in words": (
        {"before": ["high", 0.5]},
        "before.0: input should be a valid number, unable to parse string as a number",
    ),
    "a base's score of one task": ({"before": [0.5]}, SCORES),
    "a task without scores": ({"scores": [[0.5]]}, SCORES),
    "a row of scores that is too short": ({"scores": [[0.5], [0.5]]}, SCORES),
    "bytes of one task": ({"kept_bytes": [1]}, SCORES),
    "a hash of one task": ({"task_hashes": ["aa"]}, SCORES),
    "options that are none": ({"options": 3}, "options: input should be a valid dictionary"),
    "no method": ({"method": None}, "method: input should be a valid string"),
    "a curve of words": (
        {"curves": [[["a", 1.0]], []]},
        "curves.0.0.0: input should be a valid number, unable to parse string as a number",
    ),
}


@pytest.mark.parametrize("case", BAD_ROWS)
def test_a_row_that_is_no_cell_is_named(tmp_path, case):
    change, message = BAD_ROWS[case]
    log = Log(tmp_path / "results.jsonl")
    log.add(row())
    log.add({**row(1), **change})
    with pytest.raises(InputError) as caught:
        read_results(tmp_path)
    assert str(caught.value) == (
        f"{log.path}: the row with hash {row(1)['hash']!r} is no cell of an experiment: {message}"
        "\nhint: take the line out, and mbf experiment runs its cell again"
    )


def test_brackets_without_end_are_no_results(tmp_path):
    (tmp_path / "results.jsonl").write_text("[" * 100_000 + "\n")
    with pytest.raises(InputError, match="expected the results of an experiment"):
        read_results(tmp_path)
