"""The JSON of two benchmarks: the prompts that its rows become, and the messages for files that do not fit."""

import json
from pathlib import Path

import pytest

from mbf_mlx.data.json_stream import MAX_DOCUMENT
from mbf_mlx.data.row import EXAMPLES
from mbf_mlx.data.task import read_task
from mbf_mlx.errors import InputError

COMPLETION = EXAMPLES["completion"]
A_GOOD_LINE = '{"prompt": "a", "completion": "b"}'


# ---- the benchmarks' JSON

ORDER = {
    "Definition": ["Name the colour."],
    "Positive Examples": [],
    "Instances": [{"input": "Grass", "output": ["green"]}],
}
COLOURS = (
    'a file that fits: {"Definition": ["Name the colour."], '
    '"Instances": [{"id": "1", "input": "Grass", "output": ["green"]}]}'
)


def test_super_natural_instructions_become_the_prompts_of_the_paper(tmp_path):
    file = tmp_path / "colours.json"
    instances = [
        {"id": "1", "input": "Grass", "output": ["green", "light green"]},
        {"id": "2", "input": "The sky", "output": "blue"},
        {"id": "3", "input": "Water", "output": [""]},
    ]
    document = {"Instances": instances, "Definition": ["Name the colour.\n"], "Negative Examples": [{"a": [1, {}]}]}
    file.write_text(json.dumps(document, indent=1), encoding="utf-8-sig")
    task = read_task(file)
    rows = {row.line: row for row in (*task.train, *task.test)}
    assert rows[3].prompt == (
        "Definition: Name the colour.\n\nNow complete the following example -\nInput: Grass\nOutput:"
    )
    assert (rows[3].completion, rows[3].answers) == (" green", (" green", " light green"))
    assert rows[11].answers == (" blue",)
    assert len(rows) == 2 and task.warnings == (f"{file}: 1 row skipped: the output is empty",)


def test_labels_and_sentences_become_the_prompts_of_their_group(tmp_path):
    folder = tmp_path / "TC" / "agnews"
    folder.mkdir(parents=True)
    (folder / "labels.json").write_text('["World", "Sports"]')
    rows = [{"label": "Sports", "sentence": "Title: A\nText: B"}, {"sentence": "C", "label": "World"}]
    (folder / "train.json").write_text(json.dumps([*rows, {"label": "-", "sentence": "D"}], indent=0))
    (folder / "test.json").write_text(json.dumps([{"label": "World", "sentence": "E"}]))
    task = read_task(folder)
    assert (task.name, task.labels) == ("agnews", ("Sports", "World"))
    assert task.train[0].prompt == (
        "What is the topic of the following paragraph? Choose one from the option.\n"
        "Option: World, Sports \nTitle: A\nText: B\nAnswer:"
    )
    assert [row.completion for row in task.train] == [" Sports", " World"]
    skipped = 'train.json: 1 row skipped: the label is "-": its annotators did not agree'
    assert task.warnings == (f"{folder}/{skipped}",)


def test_the_choices_of_copa_stand_without_an_instruction(tmp_path):
    (tmp_path / "COPA").mkdir()
    (tmp_path / "COPA" / "labels.json").write_text('["A", "B"]')
    (tmp_path / "COPA" / "train.json").write_text('[{"label": "B", "sentence": "Which?"}]')
    assert read_task(tmp_path / "COPA").train[0].prompt == "Option: A, B \nWhich?\nAnswer:"


def change(**changes):
    return json.dumps({key: value for key, value in {**ORDER, **changes}.items() if value is not ...})


def instance(**fields):
    return change(Instances=[{"input": "Snow", "output": ["white"]}, fields])


NOT_SUPERNI = (
    'mail.json: an object in a .json file is read as Super-NaturalInstructions: expected a "Definition" in words; '
    f"other rows go one a line into a .jsonl file\n  {COLOURS}"
)
ONE = "mail.json: 1 row does not fit:\n  mail.json:1: "
FITS = f"\n  {COLOURS.replace('a file that', 'a row that')}"
BAD_DOCUMENTS = {
    "no definition": (change(Definition=...), NOT_SUPERNI),
    "an empty definition": (change(Definition=[" "]), NOT_SUPERNI),
    "a number for the definition": (change(Definition=7), NOT_SUPERNI),
    "an empty list for the definition": (change(Definition=[]), NOT_SUPERNI),
    "no instances": (change(Instances=...), "mail.json: expected rows, got none"),
    "an empty list of instances": (change(Instances=[]), "mail.json: expected rows, got none"),
    "an object for the instances": (
        change(Instances={"a": 1}),
        f'{ONE}expected an instance {{"input": …, "output": […]}}{FITS}',
    ),
    "an instance without an output": (
        instance(input="a"),
        f'{ONE}expected an instance {{"input": …, "output": […]}}{FITS}',
    ),
    "an empty input": (instance(input="", output="b"), f'{ONE}"input": expected text, got nothing{FITS}'),
    "a number for the output": (instance(input="a", output=1), f'{ONE}"output": expected text, got a number{FITS}'),
    "a null among the outputs": (
        instance(input="a", output=["b", None]),
        f'{ONE}"output": expected text, got null{FITS}',
    ),
    "a blank output": (
        instance(input="a", output=" "),
        f'{ONE}"output": expected text, got nothing but white space{FITS}',
    ),
    "half a surrogate pair": (
        '{"Definition": "\\ud800", "Instances": [{"input": "a", "output": "b"}]}',
        'mail.json: "Definition": holds half a surrogate pair (\\ud800 to \\udfff), which is no character',
    ),
    "a document without its end": (
        change()[:-1],
        "mail.json:1: broken JSON: expected ',', got the end of the file",
    ),
    "a comma too many": (
        '{\n"Definition": ["a"],\n}',
        "mail.json:3: broken JSON: Expecting value",
    ),
    "a key without quotes": ('{"Definition": ["a"], 1: 2}', "mail.json:1: broken JSON: keys need double quotes"),
    "a key twice": ('{\n"Definition": {"a": 1, "a": 2}}', 'mail.json:2: the key "a" stands twice'),
    "NaN": ('{"Definition": NaN}', "mail.json:1: broken JSON: NaN is not JSON"),
    "100,000 lists in each other": ('{"a": ' + "[" * 100_000, "mail.json:1: nested too deeply"),
    "two documents": (f"{change()}\n[]", "mail.json:2: something follows the list or object"),
    "a number": ("7", "mail.json:1: broken JSON: expected '{', got '7'"),
    "rows of JSON lines": (
        f"{A_GOOD_LINE}\n{A_GOOD_LINE}\n",
        "mail.json: holds one JSON object a line: rename it to mail.jsonl",
    ),
    "a list of other rows": (
        f"[{A_GOOD_LINE}]",
        "mail.json: a list in a .json file is read as O-LoRA's benchmark, objects of label and sentence; other rows "
        f"go one a line into a .jsonl file\n  a row that fits there: {COMPLETION}",
    ),
    "an empty list": ("[]", 'mail.json: expected labels.json beside it: a list such as ["True", "False"]'),
    "a byte of Latin-1": (
        '{\n"Definition": "é"}'.encode("latin-1"),
        "mail.json:2: not UTF-8: byte 0xe9 (save the file as UTF-8)",
    ),
    "over 64 MB": (
        b"{" + b" " * MAX_DOCUMENT,
        "mail.json: a .json file is read whole, and 64 MB is over 64 MB: write it as .jsonl, a row a line such as "
        + COMPLETION,
    ),
}


@pytest.mark.parametrize("case", BAD_DOCUMENTS)
def test_a_bad_document_is_refused_with_its_reason(case, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    document, message = BAD_DOCUMENTS[case]
    Path("mail.json").write_bytes(document if isinstance(document, bytes) else document.encode())
    with pytest.raises(InputError) as error:
        read_task("mail.json")
    assert str(error.value) == message


ROW = '[{"label": "yes", "sentence": "a"}'
LABEL_FITS = (
    '\n  a row that fits: [{"label": "Sports", "sentence": "Title: The final\\nText: They won."}], in a folder like '
    "TC/agnews/"
)
BAD = "QQP: 1 row does not fit:\n  QQP/train.json:1: "
BAD_LABELS = {
    "no labels": (
        "QQP",
        None,
        f"{ROW}]",
        'QQP/train.json: expected labels.json beside it: a list such as ["True", "False"]',
    ),
    "an empty list of labels": (
        "QQP",
        "[]",
        f"{ROW}]",
        'QQP/labels.json: expected a list of labels such as ["True", "False"], got an empty one',
    ),
    "a number for a label": ("QQP", "[1]", f"{ROW}]", "QQP/labels.json: a label: expected text, got a number"),
    "an object for the labels": ("QQP", "{}", f"{ROW}]", "QQP/labels.json:1: broken JSON: expected '[', got '{}'"),
    "another label": ("QQP", '["no"]', f"{ROW}]", f'{BAD}"label": expected one of labels.json, got "yes"{LABEL_FITS}'),
    "no sentence": (
        "QQP",
        '["yes"]',
        f'{ROW}, {{"label": "yes"}}]',
        f'{BAD}expected {{"label": …, "sentence": …}}{LABEL_FITS}',
    ),
    "an empty sentence": (
        "QQP",
        '["yes"]',
        f'{ROW}, {{"label": "yes", "sentence": ""}}]',
        f'{BAD}"sentence": expected text, got nothing{LABEL_FITS}',
    ),
    "a list without its end": (
        "QQP",
        '["yes"]',
        ROW,
        "QQP/train.json:1: broken JSON: expected ',', got the end of the file",
    ),
    "a folder of no known group": (
        "mail",
        '["yes"]',
        f"{ROW}]",
        "mail/train.json: rows of label and sentence take their instruction from the folder: expected it in a folder "
        "of one of NLI, QQP, SC, TC, BoolQA, MultiRC, WiC, COPA, as in TC/agnews/train.json\n"
        f"  your own tasks: rows such as {COMPLETION} in a .jsonl file",
    ),
}


@pytest.mark.parametrize("case", BAD_LABELS)
def test_bad_labels_and_sentences_are_refused_with_their_reason(case, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    folder, labels, rows, message = BAD_LABELS[case]
    Path(folder).mkdir()
    if labels is not None:
        Path(folder, "labels.json").write_text(labels)
    Path(folder, "train.json").write_text(rows)
    with pytest.raises(InputError) as error:
        read_task(folder)
    assert str(error.value) == message


def test_the_tables_hold_35_wrong_files_with_their_whole_messages():
    assert len(BAD_DOCUMENTS) + len(BAD_LABELS) >= 35
