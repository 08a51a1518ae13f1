import json

import pytest

from mbf_mlx.errors import InputError
from mbf_mlx.tasks import read_task, read_tasks


def completions(count, first=0):
    return [{"prompt": f"What is {i} plus 1?", "completion": f" {i + 1}"} for i in range(first, first + count)]


def test_a_folder_with_three_splits_is_one_task_named_after_the_folder(write_jsonl):
    train = write_jsonl("sums/train.jsonl", completions(20))
    write_jsonl("sums/valid.jsonl", completions(3, 100))
    write_jsonl("sums/test.jsonl", completions(4, 200))
    task = read_task(train.parent)
    assert (task.name, task.format, task.held_out) == ("sums", "prompt/completion", 0)
    assert [len(task.train), len(task.valid), len(task.test)] == [20, 3, 4]
    assert task.train[7].prompt == "What is 7 plus 1?"
    assert task.train[7].where == f"{train}:8"
    assert task.warnings == ()


def test_one_file_is_a_task_named_after_the_file(write_jsonl):
    assert read_task(write_jsonl("my sums.v2.jsonl", completions(5))).name == "my sums.v2"


def test_without_test_rows_one_in_ten_is_held_out_and_never_trained_on(write_jsonl):
    task = read_task(write_jsonl("sums.jsonl", completions(200)))
    assert (len(task.train), len(task.test), task.held_out) == (180, 20, 20)
    assert not {row.prompt for row in task.train} & {row.prompt for row in task.test}


def test_the_held_out_rows_are_chosen_by_their_content_not_by_their_place(write_jsonl):
    rows = completions(50)
    one = read_task(write_jsonl("one.jsonl", rows))
    two = read_task(write_jsonl("two.jsonl", rows[::-1]))
    assert {row.prompt for row in one.test} == {row.prompt for row in two.test}


def test_every_bad_line_is_named_with_its_reason_and_a_row_that_fits(tmp_path):
    file = tmp_path / "mail.jsonl"
    file.write_text('{"prompt": "a", "completion": "b"}\n{"prompt": "a"\n{"prompt": "a", "response": "b"}\n')
    with pytest.raises(InputError) as error:
        read_task(file)
    assert str(error.value) == (
        f"{file}: 2 rows do not fit:\n"
        f"  {file}:2: broken JSON: Expecting ',' delimiter at column 15\n"
        f'  {file}:3: expected "prompt" and "completion", or "messages", or "text", got "prompt", "response" '
        '(rename "response" to "completion")\n'
        '  a row that fits: {"prompt": "a", "completion": "b"}'
    )


def test_the_problems_of_all_tasks_are_said_together(tmp_path):
    for name in ("one", "two"):
        (tmp_path / f"{name}.jsonl").write_text(json.dumps({"prompt": name, "completion": None}))
    with pytest.raises(InputError, match=r"(?s)one\.jsonl:1: .*two\.jsonl:1: "):
        read_tasks([tmp_path / "one.jsonl", tmp_path / "two.jsonl"])
