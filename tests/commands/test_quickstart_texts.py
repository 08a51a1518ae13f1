"""The three task folders of `mbf quickstart`: rows we wrote, so every promise about them is checked here."""

import json
import re
from collections import Counter
from itertools import combinations
from pathlib import Path

import pytest

QUICKSTART = Path(__file__).parents[2] / "mbf_mlx" / "quickstart"
TASKS = ("home", "inbox", "bins")  # the order in which they are learned
ROWS = {"train": 120, "test": 60}  # at least: every label stands equally often
MOST_BYTES = 60_000  # of one file
MOST_SHARED_WORDS = 0.6  # Jaccard similarity of two texts' word sets

each_task = pytest.mark.parametrize("task", TASKS)
each_split = pytest.mark.parametrize("split", ROWS)


def rows(task: str, split: str) -> list[dict[str, str]]:
    lines = (QUICKSTART / task / f"{split}.jsonl").read_text(encoding="utf-8").splitlines()
    return [json.loads(line) for line in lines]


def labels(task: str) -> set[str]:
    return {row["completion"] for row in rows(task, "train")}


def own_text(row: dict[str, str]) -> str:
    """Return what follows the instruction line that all rows of a task share."""
    return row["prompt"].split("\n")[1]


def words(text: str) -> set[str]:
    return set(re.findall(r"[a-z0-9']+", text.lower()))


def jaccard(one: set[str], other: set[str]) -> float:
    return len(one & other) / len(one | other)


def test_quickstart_holds_three_tasks_and_a_readme():
    assert {path.name for path in QUICKSTART.iterdir()} == {*TASKS, "README.md"}
    for task in TASKS:
        assert {path.name for path in (QUICKSTART / task).iterdir()} == {"train.jsonl", "test.jsonl"}


@each_task
@each_split
def test_every_row_has_a_prompt_and_a_completion_and_nothing_else(task, split):
    found = rows(task, split)
    assert ROWS[split] <= len(found) < ROWS[split] + len(labels(task))
    for row in found:
        assert list(row) == ["prompt", "completion"]
        assert row["prompt"] == row["prompt"].strip() and row["completion"] == row["completion"].strip()


@each_task
def test_rows_of_a_task_share_one_instruction_line_that_names_every_label(task):
    prompts = [row["prompt"] for split in ROWS for row in rows(task, split)]
    assert all(prompt.count("\n") == 1 for prompt in prompts)
    (instruction,) = {prompt.split("\n")[0] for prompt in prompts}
    assert labels(task) <= set(re.findall(r"\w+", instruction))


def test_instructions_of_two_tasks_share_few_words():
    instructions = [words(rows(task, "train")[0]["prompt"].split("\n")[0]) for task in TASKS]
    assert max(jaccard(one, other) for one, other in combinations(instructions, 2)) < 0.3


@each_task
@each_split
def test_labels_are_balanced_in_any_first_part_of_a_file(task, split):
    completions = [row["completion"] for row in rows(task, split)]
    assert 6 <= len(labels(task)) <= 8
    assert len(set(Counter(completions).values())) == 1
    for start in range(0, len(completions), len(labels(task))):  # one row of every label, again and again
        assert set(completions[start : start + len(labels(task))]) == labels(task)


def test_no_label_belongs_to_two_tasks():
    for one, other in combinations(TASKS, 2):
        assert not labels(one) & labels(other)


def test_labels_are_short_plain_words():
    for label in set().union(*map(labels, TASKS)):
        assert re.fullmatch(r"[a-z]{3,8}", label), label


@each_task
def test_few_texts_say_their_own_label(task):
    found = rows(task, "train") + rows(task, "test")
    saying = [row for row in found if row["completion"] in words(own_text(row))]
    assert len(saying) <= len(found) / 8, saying


@each_task
def test_no_two_texts_are_near_copies(task):
    texts = [words(own_text(row)) for row in rows(task, "train") + rows(task, "test")]
    for one, other in combinations(texts, 2):
        assert jaccard(one, other) < MOST_SHARED_WORDS, (one, other)


@each_task
@each_split
def test_files_are_small_ascii_with_one_row_a_line(task, split):
    data = (QUICKSTART / task / f"{split}.jsonl").read_bytes()
    assert data.isascii() and b"\r" not in data and b"\\u" not in data
    assert data.endswith(b"}\n") and data.count(b"\n") == len(rows(task, split))
    assert len(data) < MOST_BYTES
