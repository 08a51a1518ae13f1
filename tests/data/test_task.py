"""Tasks: files, splits, names, and everything wrong with them. The file is long because of its table of bad tasks."""

import gc
import json
import os
import tracemalloc
from pathlib import Path

import pytest

from mbf_mlx.data.row import EXAMPLES
from mbf_mlx.data.task import check_name, read_task, read_tasks
from mbf_mlx.errors import InputError


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


def test_splits_may_be_of_different_formats(tmp_path, write_jsonl):
    write_jsonl("sums/train.JSONL", completions(5))
    (tmp_path / "sums" / "test.csv").write_text("prompt,completion\n1 plus 1?,2\n")
    task = read_task(tmp_path / "sums")
    assert [len(task.train), len(task.test), task.held_out] == [5, 1, 0]


def test_rows_are_a_sequence_that_can_be_sliced(write_jsonl):
    write_jsonl("sums/test.jsonl", completions(1, 100))
    rows = read_task(write_jsonl("sums/train.jsonl", completions(9)).parent).train
    prompts = [row.prompt for row in rows]
    assert [row.prompt for row in rows[2:5]] == prompts[2:5]
    assert [row.prompt for row in rows[::-3]] == prompts[::-3]
    assert rows[-1].prompt == prompts[-1] == "What is 8 plus 1?"
    with pytest.raises(IndexError):
        rows[9]


def test_a_row_that_changed_after_the_check_is_refused(write_jsonl):
    write_jsonl("sums/test.jsonl", completions(1, 100))
    file = write_jsonl("sums/train.jsonl", completions(3))
    rows = read_task(file.parent).train
    file.write_text(file.read_text().replace("What is 1", "Who is 11"))
    assert rows[0].prompt == "What is 0 plus 1?"
    with pytest.raises(InputError, match="train.jsonl:2: the row changed after it was checked: start again"):
        rows[1]
    file.write_text("")
    with pytest.raises(InputError, match="train.jsonl: the file is empty"):
        rows[0]


def test_the_hash_is_of_the_content_of_the_splits_and_of_nothing_else(tmp_path, write_jsonl):
    one = read_task(write_jsonl("one.jsonl", completions(4)))
    same = read_task(write_jsonl("elsewhere/train.jsonl", completions(4)).parent)
    more = read_task(write_jsonl("more.jsonl", completions(5)))
    write_jsonl("elsewhere/test.jsonl", completions(1, 100))
    tested = read_task(tmp_path / "elsewhere")
    assert one.sha256 == same.sha256
    assert len({one.sha256, more.sha256, tested.sha256}) == 3
    assert len(one.sha256) == 64


def test_labels_are_the_different_completions_or_a_hash_of_too_many(write_jsonl):
    few = [{"prompt": str(i), "completion": f" {'ab'[i % 2]}\n"} for i in range(9)]
    assert read_task(write_jsonl("few.jsonl", few)).labels == ("a", "b")
    many = read_task(write_jsonl("many.jsonl", completions(65)))
    turned = read_task(write_jsonl("turned.jsonl", completions(65)[::-1]))
    other = read_task(write_jsonl("other.jsonl", completions(66)))
    assert isinstance(many.labels, str) and len(many.labels) == 32
    assert many.labels == turned.labels != other.labels
    assert len(read_task(write_jsonl("most.jsonl", completions(64))).labels) == 64
    talks = [{"messages": [{"role": "user", "content": "?"}, {"role": "assistant", "content": x}]} for x in "yn"]
    assert read_task(write_jsonl("talks.jsonl", talks)).labels == ("n", "y")
    assert read_task(write_jsonl("texts.jsonl", [{"text": "a"}, {"text": "b"}])).labels == ()


def test_rows_that_are_left_out_of_training_do_not_count_as_repeated(write_jsonl):
    write_jsonl("sums/test.jsonl", completions(2))
    file = write_jsonl("sums/train.jsonl", [*completions(5), *completions(2), *completions(4)[2:]])
    task = read_task(file.parent)
    assert len(task.train) == 5
    assert task.warnings == (
        f"{file.parent}: 4 rows of train are also in test: left out of training",
        f"{file}: 2 of 5 rows of train repeat an earlier one",
    )


def test_repeated_rows_are_counted_and_stay(write_jsonl):
    write_jsonl("sums/test.jsonl", completions(2, 100))
    file = write_jsonl("sums/train.jsonl", [*completions(4), *completions(2), *completions(1)])
    task = read_task(file.parent)
    assert len(task.train) == 7
    assert task.warnings == (f"{file}: 3 of 7 rows of train repeat an earlier one",)


def test_repeated_rows_are_held_out_together(write_jsonl):
    task = read_task(write_jsonl("sums.jsonl", completions(20) * 3))
    assert (len(task.train), len(task.test)) == (54, 6)
    assert not {row.prompt for row in task.train} & {row.prompt for row in task.test}
    told = [f"{task.path}: {n} of {of} rows of {split} repeat" for split, n, of in (("train", 36, 54), ("test", 4, 6))]
    assert [warning.removesuffix(" an earlier one") for warning in task.warnings] == told


def test_rows_that_are_left_out_of_training_are_not_counted_as_repeated(write_jsonl):
    write_jsonl("sums/test.jsonl", completions(1))
    file = write_jsonl("sums/train.jsonl", [*completions(1) * 5, *completions(3, 1)])
    assert read_task(file.parent).warnings == (
        f"{file.parent}: 5 rows of train are also in test: left out of training",
    )


def test_rows_that_also_stand_in_test_or_valid_are_left_out_of_training(write_jsonl):
    file = write_jsonl("sums/train.jsonl", completions(10))
    write_jsonl("sums/valid.jsonl", [*completions(1, 3), *completions(2, 100)])
    write_jsonl("sums/test.jsonl", [*completions(2, 5), *completions(1, 100)])
    task = read_task(file.parent)
    assert [row.line for row in task.train] == [1, 2, 3, 5, 8, 9, 10]
    assert (len(task.valid), len(task.test)) == (3, 3)
    assert task.warnings == (
        f"{file.parent}: 2 rows of train are also in test: left out of training",
        f"{file.parent}: 1 row of train is also in valid: left out of training",
        f"{file.parent}: 1 row of valid is also in test",
    )


def test_a_single_row_is_learned_and_nothing_is_scored(write_jsonl):
    file = write_jsonl("sums.jsonl", completions(1))
    task = read_task(file)
    assert (len(task.train), len(task.test), task.held_out) == (1, 0, 0)
    assert task.warnings == (f"{file}: only one row, so none is held out and nothing will be scored",)


def test_of_few_rows_one_is_held_out(write_jsonl):
    task = read_task(write_jsonl("sums.jsonl", completions(3)))
    assert (len(task.train), len(task.test), task.held_out) == (2, 1, 1)


def test_only_the_first_bad_rows_of_each_file_are_printed_and_the_rest_is_counted(tmp_path, monkeypatch, write_jsonl):
    monkeypatch.chdir(tmp_path)
    write_jsonl("sums/train.jsonl", [{"prompt": "a"}] * 30)
    write_jsonl("sums/test.jsonl", [{"text": 1}] * 20)
    with pytest.raises(InputError) as error:
        read_task("sums")
    lines = str(error.value).splitlines()
    assert lines[0] == "sums: 50 rows do not fit:"
    assert [line.split(": ")[0] for line in lines[1:21]] == [f"  sums/train.jsonl:{i}" for i in range(1, 21)]
    assert lines[21] == "  … and 10 more in sums/train.jsonl"
    assert lines[22:42] == [f'  sums/test.jsonl:{i}: "text": expected text, got a number' for i in range(1, 21)]
    assert len(lines) == 43


def test_a_task_has_rows_of_one_kind(tmp_path, monkeypatch, write_jsonl):
    monkeypatch.chdir(tmp_path)
    write_jsonl("sums/train.jsonl", [*completions(2), {"text": "a"}])
    write_jsonl(
        "sums/valid.jsonl", [{"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}]
    )
    with pytest.raises(InputError) as error:
        read_task("sums")
    expected = "expected a prompt/completion row as in sums/train.jsonl:1, got a"
    assert str(error.value) == (
        "sums: 2 rows do not fit:\n"
        f"  sums/train.jsonl:3: {expected} text row (a task has rows of one kind)\n"
        f"  sums/valid.jsonl:1: {expected} messages row (a task has rows of one kind)\n"
        f"  a row that fits: {EXAMPLES['completion']}"
    )


def test_bad_rows_and_bad_files_of_a_task_are_said_together(tmp_path, monkeypatch, write_jsonl):
    monkeypatch.chdir(tmp_path)
    write_jsonl("sums/train.jsonl", [{"prompt": "a", "completion": 1}])
    write_jsonl("sums/valid.jsonl", [])
    (tmp_path / "sums" / "test.csv").write_bytes("prompt,completion\n".encode("utf-16"))
    with pytest.raises(InputError) as error:
        read_task("sums")
    assert str(error.value) == (
        "sums/valid.jsonl: the file is empty\n"
        "sums/test.csv: expected text in UTF-8, got UTF-16 text (save or unpack it as UTF-8 text)\n"
        "sums: 1 row does not fit:\n"
        '  sums/train.jsonl:1: "completion": expected text, got a number\n'
        '  a row that fits: {"prompt": "a", "completion": "1"}'
    )


KNOWN = "(a task is a .jsonl, .csv, .tsv or .json file, or a folder with train.*)"
TRAIN = "expected a train file (train.jsonl, train.csv, train.tsv, train.json)"
UTF8 = "(save or unpack it as UTF-8 text)"
ROW = b'{"prompt": "a", "completion": "b"}\n'
# what is wrong: (the files, the task, the message)
BAD_TASKS = {
    "nothing there": ({}, "mail", f"mail: No such file or directory {KNOWN}"),
    "a file for a folder": ({"mail": b""}, "mail/train.jsonl", f"mail/train.jsonl: Not a directory {KNOWN}"),
    "a NUL byte in the path": ({}, "ma\0il", f"ma\0il: embedded null byte {KNOWN}"),
    "a path of 5000 letters": ({}, "m" * 5000, f"{'m' * 5000}: File name too long {KNOWN}"),
    "no ending": (
        {"mail": ROW},
        "mail",
        "mail: expected a .jsonl, .csv, .tsv or .json file, or a folder with train.*, got no ending",
    ),
    "another ending": (
        {"mail.txt": ROW},
        "mail.txt",
        "mail.txt: expected a .jsonl, .csv, .tsv or .json file, or a folder with train.*, got .txt",
    ),
    "an empty file": ({"mail.jsonl": b""}, "mail.jsonl", "mail.jsonl: the file is empty"),
    "blank lines alone": ({"mail.jsonl": b"\n \n"}, "mail.jsonl", "mail.jsonl: expected rows, got none"),
    "names of columns alone": ({"mail.csv": b"text\n"}, "mail.csv", "mail.csv: expected rows, got none"),
    "UTF-16": (
        {"mail.jsonl": ROW.decode().encode("utf-16")},
        "mail.jsonl",
        f"mail.jsonl: expected text in UTF-8, got UTF-16 text {UTF8}",
    ),
    "UTF-16 of the other order": (
        {"mail.json": b"\xfe\xff\0{"},
        "mail.json",
        f"mail.json: expected text in UTF-8, got UTF-16 text {UTF8}",
    ),
    "gzip": (
        {"mail.jsonl": b"\x1f\x8b\x08"},
        "mail.jsonl",
        f"mail.jsonl: expected text in UTF-8, got a gzip archive {UTF8}",
    ),
    "a spreadsheet": (
        {"mail.csv": b"PK\x03\x04"},
        "mail.csv",
        f"mail.csv: expected text in UTF-8, got a zip archive or a spreadsheet {UTF8}",
    ),
    "Parquet": (
        {"mail/train.jsonl": b"PAR1\x15\x04"},
        "mail",
        f"mail/train.jsonl: expected text in UTF-8, got a Parquet file {UTF8}",
    ),
    "an empty folder": ({"mail/": None}, "mail", f"mail: {TRAIN}, got an empty folder"),
    "a folder of other files": ({"mail/a.jsonl": ROW, "mail/b.txt": b""}, "mail", f"mail: {TRAIN}, got a.jsonl, b.txt"),
    "a train file of another format": ({"mail/train.parquet": b""}, "mail", f"mail: {TRAIN}, got train.parquet"),
    "a train file in an archive": ({"mail/train.jsonl.gz": b""}, "mail", f"mail: {TRAIN}, got train.jsonl.gz"),
    "a folder of tasks": (
        {"all/mail/train.jsonl": ROW, "all/sums/train.csv": b""},
        "all",
        f"all: {TRAIN}, got a folder of tasks: name them one by one, as in all/mail",
    ),
    "two train files": (
        {"mail/train.jsonl": ROW, "mail/train.csv": b""},
        "mail",
        "mail: expected one train file, got train.csv and train.jsonl (keep one of them)",
    ),
    "two test files": (
        {"mail/train.jsonl": ROW, "mail/test.tsv": b"", "mail/TEST.jsonl": b""},
        "mail",
        "mail: expected one test file, got TEST.jsonl and test.tsv (keep one of them)",
    ),
    "a folder for the train file": (
        {"mail/train.jsonl/": None},
        "mail",
        "mail/train.jsonl: expected a file",
    ),
    "nothing but test rows": (
        {"mail/train.jsonl": ROW, "mail/test.jsonl": ROW},
        "mail",
        "mail: every row of train is also in test or valid: nothing is left to learn",
    ),
    "an empty test file": (
        {"mail/train.jsonl": ROW, "mail/test.jsonl": b""},
        "mail",
        "mail/test.jsonl: the file is empty",
    ),
}


@pytest.mark.parametrize("case", BAD_TASKS)
def test_what_is_no_task_is_refused_with_its_reason(case, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    files, path, message = BAD_TASKS[case]
    for name, content in files.items():
        Path(name).parent.mkdir(parents=True, exist_ok=True)
        if content is None:
            Path(name).mkdir(parents=True)
        else:
            Path(name).write_bytes(content)
    with pytest.raises(InputError) as error:
        read_task(path)
    assert str(error.value) == message


def test_links_that_lead_nowhere_and_pipes_are_refused(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("round.jsonl").symlink_to("round.jsonl")
    with pytest.raises(InputError, match=r"round\.jsonl: Too many levels of symbolic links"):
        read_task("round.jsonl")
    os.mkfifo("pipe.jsonl")
    with pytest.raises(InputError, match=r"pipe\.jsonl: expected a file"):
        read_task("pipe.jsonl")


def test_a_task_is_found_through_a_link_and_from_inside_its_folder(tmp_path, monkeypatch, write_jsonl):
    folder = write_jsonl("sums/train.jsonl", completions(3)).parent
    (tmp_path / "linked").symlink_to(folder)
    assert read_task(tmp_path / "linked").name == "linked"
    monkeypatch.chdir(folder)
    assert read_task(".").name == "sums"
    assert read_task(Path("..", "sums")).name == "sums"


NAME = (
    "expected 1 to 100 letters without slashes, control characters or white space around them "
    "(--name gives a task another name)"
)


@pytest.mark.parametrize(
    "name", ["", ".", "..", "a/b", "a\\b", "a\nb", "\x1b[31m", " a", "a ", "a" * 101, "\udce4", "a\u2028b"]
)
def test_a_name_that_cannot_be_printed_or_told_apart_is_refused(name):
    with pytest.raises(InputError) as error:
        check_name(name)
    assert str(error.value) == f"task name {name!r}: {NAME}"


def test_names_with_spaces_dots_and_letters_of_any_script_are_kept(write_jsonl):
    for name in ("my mails", "v1.2", "Grüße 你好", "a" * 100, "100%"):
        assert read_task(write_jsonl(f"{name}.jsonl", completions(2))).name == name
        assert read_task(write_jsonl(f"{name}/train.jsonl", completions(2)).parent).name == name
    assert read_task(write_jsonl("mail.jsonl", completions(2)), name="post").name == "post"


def test_files_that_are_not_read_are_named(write_jsonl):
    file = write_jsonl("sums/train.jsonl", completions(4))
    write_jsonl("sums/dev.jsonl", completions(1, 100))
    write_jsonl("sums/test.json.bak", completions(1, 100))
    write_jsonl("sums/train.jsonl.bak", completions(1, 100))
    assert read_task(file.parent).warnings == (
        f"{file.parent}/dev.jsonl: not read: expected valid.jsonl, valid.csv, valid.tsv, valid.json",
        f"{file.parent}/test.json.bak: not read: expected test.jsonl, test.csv, test.tsv, test.json",
    )
    write_jsonl("sums/test.jsonl", completions(1, 100))
    assert f"{file}: test.jsonl beside it not read: name the folder to use all of them" in read_task(file).warnings


def test_a_row_costs_less_than_forty_bytes_of_memory_however_long_it_is(tmp_path):
    file = tmp_path / "sums.jsonl"
    with open(file, "w") as lines:
        for i in range(4_000):
            lines.write(json.dumps({"prompt": f"{i} " + "word " * 400, "completion": "yes"}) + "\n")
    read_task(file)
    gc.collect()
    tracemalloc.start()
    task = read_task(file)
    gc.collect()
    kept, most = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert len(task.train) == 3_600
    assert kept < 40 * 4_000
    assert most < 200 * 4_000 < file.stat().st_size / 4


def test_the_published_tasks_are_read_whole(task_data):
    counts = {}
    for folder in sorted(
        (*task_data.glob("tasks/*"), *task_data.glob("superni/*"), *task_data.glob("cl_benchmark/*/*"))
    ):
        task = read_task(folder)
        counts["/".join(folder.parts[-2:])] = len(task.train), len(task.valid), len(task.test)
    assert counts["SC/amazon"] == (2000, 0, 1000) and counts["tasks/sms"] == (770, 88, 242)
    assert counts["superni/task511_reddit_tifu_long_text_summarization"] == (994, 0, 100)
    assert counts["NLI/MNLI"] == (2000, 0, 984)
    assert len(counts) == 46
