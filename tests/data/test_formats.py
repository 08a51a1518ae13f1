import json
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from mbf_mlx.data.json_stream import MAX_DOCUMENT
from mbf_mlx.data.row import EXAMPLES, BadRow, reference_text, row_from
from mbf_mlx.data.task import read_task
from mbf_mlx.data.text_file import MAX_LINE
from mbf_mlx.errors import InputError

COMPLETION, MESSAGES, TEXT = EXAMPLES["completion"], EXAMPLES["messages"], EXAMPLES["text"]
KEYS = 'expected "prompt" and "completion", or "messages", or "text", got '
A_GOOD_LINE = '{"prompt": "a", "completion": "b"}'


def talk(*turns, **more):
    messages = [{"role": role, "content": content} for role, content in turns]
    return json.dumps({"messages": messages, **more})


HI, HELLO = ("user", "Hi"), ("assistant", "Hello")
FIXED = '{"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]}'
HALF = "holds half a surrogate pair (\\ud800 to \\udfff), which is no character"
PARTS = 'expected {"type": "text", "text": …}; pictures and sound cannot be learned'

# what is wrong: (the line, the reason that is given, the row that is shown as one that fits)
BAD_LINES = {
    "an object without its end": ('{"prompt": "a"', "broken JSON: Expecting ',' delimiter at column 15", COMPLETION),
    "a text without its end": ('{"prompt": "a', "broken JSON: Unterminated string starting at column 12", COMPLETION),
    "single quotes": ("{'prompt': 'a'}", "broken JSON: keys and texts stand in double quotes", COMPLETION),
    "two rows in a line": (
        f"{A_GOOD_LINE} {A_GOOD_LINE}",
        "broken JSON: something follows the first value (one row a line)",
        COMPLETION,
    ),
    "a comma at the end of the line": (
        f"{A_GOOD_LINE},",
        "broken JSON: something follows the first value (one row a line)",
        COMPLETION,
    ),
    "UTF-16 without its mark": (
        "{\0}\0",
        "broken JSON: holds a NUL byte (is the file UTF-16, or binary?)",
        COMPLETION,
    ),
    "the mark of a file that was joined to another": (
        f"\ufeff{A_GOOD_LINE}",
        "broken JSON: begins with a byte order mark (where files were joined, take it out)",
        COMPLETION,
    ),
    "a comment": ("# mails", "broken JSON: Expecting value at column 1", COMPLETION),
    "plain words": ("What is this?", "broken JSON: Expecting value at column 1", COMPLETION),
    "a tab in a text": (
        '{"prompt": "a\tb", "completion": "b"}',
        "broken JSON: Invalid control character at column 14",
        COMPLETION,
    ),
    "an unknown escape": ('{"prompt": "\\x41"}', "broken JSON: Invalid \\escape at column 13", COMPLETION),
    "NaN": ('{"prompt": "a", "completion": "b", "w": NaN}', "broken JSON: NaN is not JSON", COMPLETION),
    "a number of 5000 digits": (f'{{"id": {"9" * 5000}}}', "broken JSON: a number is too long", COMPLETION),
    "100,000 lists in each other": ('{"more": ' + "[" * 100_000 + "]" * 100_000 + "}", "nested too deeply", COMPLETION),
    "a key twice": ('{"prompt": "a", "prompt": "b"}', 'the key "prompt" stands twice', COMPLETION),
    "a key of a message twice": (
        '{"messages": [{"role": "user", "role": "user", "content": "a"}]}',
        'the key "role" stands twice',
        COMPLETION,
    ),
    "a byte of Latin-1": (
        '{"prompt": "café"}'.encode("latin-1"),
        "not UTF-8: byte 0xe9 at column 16 (save the file as UTF-8)",
        COMPLETION,
    ),
    "half a character": (
        '{"prompt": "café'.encode()[:-1],
        "not UTF-8: byte 0xc3 at column 16 (save the file as UTF-8)",
        COMPLETION,
    ),
    "a line of over 8 MB": (
        f'{{"prompt": "{"a" * MAX_LINE}", "completion": "b"}}',
        "the line is longer than 8 MB (one row a line; split the text)",
        COMPLETION,
    ),
    "a list": ("[1, 2]", 'expected an object {"prompt": …, "completion": …}, got a list', COMPLETION),
    "a text": ('"prompt"', 'expected an object {"prompt": …, "completion": …}, got text', COMPLETION),
    "null": ("null", 'expected an object {"prompt": …, "completion": …}, got null', COMPLETION),
    "a number": ("4.2", 'expected an object {"prompt": …, "completion": …}, got a number', COMPLETION),
    "true": ("true", 'expected an object {"prompt": …, "completion": …}, got true', COMPLETION),
    "an empty object": ("{}", f"{KEYS}an empty object", COMPLETION),
    "no completion": ('{"prompt": "a"}', f'{KEYS}"prompt"', COMPLETION),
    "no prompt": ('{"completion": "b"}', f'{KEYS}"completion"', COMPLETION),
    "tools alone": ('{"tools": []}', f'{KEYS}"tools"', COMPLETION),
    "many other keys": (
        json.dumps({f"k{i}": i for i in range(9)}),
        f'{KEYS}"k0", "k1", "k2", "k3", "k4", "k5", …',
        COMPLETION,
    ),
    "another name for completion": (
        '{"prompt": "a", "response": "b"}',
        f'{KEYS}"prompt", "response" (rename "response" to "completion")',
        A_GOOD_LINE,
    ),
    "other names for both": (
        '{"question": "a", "answer": "b"}',
        f'{KEYS}"question", "answer" (rename "question" to "prompt" and "answer" to "completion")',
        A_GOOD_LINE,
    ),
    "capital letters": (
        '{"Prompt": "a", "Completion": "b"}',
        f'{KEYS}"Prompt", "Completion" (rename "Prompt" to "prompt" and "Completion" to "completion")',
        A_GOOD_LINE,
    ),
    "a misspelt key": (
        '{"promt": "a", "completion": "b"}',
        f'{KEYS}"promt", "completion" (rename "promt" to "prompt")',
        A_GOOD_LINE,
    ),
    "Alpaca's keys": (
        '{"instruction": "Add.", "input": "1 and 2", "output": "3"}',
        f'{KEYS}"instruction", "input", "output" '
        '(write "instruction" and "input" together as "prompt", and "output" as "completion")',
        '{"prompt": "Add.\\n1 and 2", "completion": "3"}',
    ),
    "ShareGPT's keys": (
        '{"conversations": [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Hello"}]}',
        f'{KEYS}"conversations" (rename "conversations" to "messages")',
        FIXED,
    ),
    "a null for the prompt": (
        '{"prompt": null, "completion": "b"}',
        '"prompt": expected text, got null',
        COMPLETION,
    ),
    "an object for the prompt": (
        '{"prompt": {"a": 1}, "completion": "b"}',
        '"prompt": expected text, got an object',
        COMPLETION,
    ),
    "a number for the completion": (
        '{"prompt": "a", "completion": 5}',
        '"completion": expected text, got a number',
        '{"prompt": "a", "completion": "5"}',
    ),
    "a list for the completion": (
        '{"prompt": "a", "completion": ["b"]}',
        '"completion": expected text, got a list',
        COMPLETION,
    ),
    "true for the completion": (
        '{"prompt": "a", "completion": true}',
        '"completion": expected text, got true',
        COMPLETION,
    ),
    "an empty prompt": ('{"prompt": "", "completion": "b"}', '"prompt": expected text, got nothing', COMPLETION),
    "an empty completion": (
        '{"prompt": "a", "completion": ""}',
        '"completion": expected text, got nothing',
        COMPLETION,
    ),
    "white space for a completion": (
        '{"prompt": "a", "completion": " \\n "}',
        '"completion": expected text, got nothing but white space',
        COMPLETION,
    ),
    "a NUL byte": (
        '{"prompt": "a\\u0000", "completion": "b"}',
        '"prompt": holds a NUL byte (is the file UTF-16, or binary?)',
        COMPLETION,
    ),
    "half a surrogate pair": ('{"prompt": "a", "completion": "\\ud800"}', f'"completion": {HALF}', COMPLETION),
    "an empty text": ('{"text": ""}', '"text": expected text, got nothing', TEXT),
    "a null for the text": ('{"text": null}', '"text": expected text, got null', TEXT),
    "a list for the text": ('{"text": ["a"]}', '"text": expected text, got a list', TEXT),
    "tools beside a text": ('{"text": "a", "tools": []}', '"tools" go with "messages", not with "text"', TEXT),
    "a null for the messages": ('{"messages": null}', '"messages": expected a list, got null', MESSAGES),
    "a text for the messages": ('{"messages": "Hi"}', '"messages": expected a list, got text', MESSAGES),
    "no messages": (
        '{"messages": []}',
        "\"messages\": expected at least a user's and an assistant's message, got an empty list",
        MESSAGES,
    ),
    "a number for a message": (
        '{"messages": [1]}',
        'messages[0]: expected an object {"role": …, "content": …}, got a number',
        MESSAGES,
    ),
    "a message without a role": (
        '{"messages": [{"content": "Hi"}]}',
        'messages[0]: expected "role" and "content", got "content"',
        MESSAGES,
    ),
    "from and value": (
        '{"messages": [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Hello"}]}',
        'messages[0]: expected "role" and "content", got "from", "value" '
        '(rename "from" to "role" and "value" to "content")',
        FIXED,
    ),
    "a role by another name": (
        talk(("human", "Hi"), HELLO),
        'messages[0].role: expected system, user, assistant or tool, got "human" (write "user")',
        FIXED,
    ),
    "an unknown role": (
        talk(("robot", "Hi"), HELLO),
        'messages[0].role: expected system, user, assistant or tool, got "robot"',
        MESSAGES,
    ),
    "a null for a role": (
        talk((None, "Hi"), HELLO),
        "messages[0].role: expected system, user, assistant or tool, got null",
        MESSAGES,
    ),
    "a list for a role": (
        talk((["user"], "Hi"), HELLO),
        "messages[0].role: expected system, user, assistant or tool, got a list",
        MESSAGES,
    ),
    "no content": (
        '{"messages": [{"role": "user"}, {"role": "assistant", "content": "b"}]}',
        'messages[0]: expected "content", got "role"',
        MESSAGES,
    ),
    "a null for a content": (
        talk(("user", None), HELLO),
        "messages[0].content: expected text, got null",
        MESSAGES,
    ),
    "a number for a content": (
        talk(("user", 3), HELLO),
        "messages[0].content: expected text, got a number",
        MESSAGES,
    ),
    "an empty user message": (
        talk(("user", ""), HELLO),
        "messages[0].content: expected text, got nothing",
        MESSAGES,
    ),
    "an empty answer": (talk(HI, ("assistant", "")), "messages[1].content: expected text, got nothing", MESSAGES),
    "a null for an answer": (talk(HI, ("assistant", None)), "messages[1].content: expected text, got null", MESSAGES),
    "a picture": (
        talk(("user", [{"type": "image_url", "image_url": {"url": "x"}}]), HELLO),
        f"messages[0].content[0]: {PARTS}",
        MESSAGES,
    ),
    "parts that are no objects": (talk(("user", ["Hi"]), HELLO), f"messages[0].content[0]: {PARTS}", MESSAGES),
    "no parts": (talk(("user", []), HELLO), "messages[0].content: expected text, got nothing", MESSAGES),
    "no answer": (talk(HI), "no message of the assistant: expected an answer to learn", MESSAGES),
    "a question at the end": (
        talk(HI, HELLO, HI),
        "the last message is of role user: expected the assistant's answer (add it, or end before)",
        MESSAGES,
    ),
    "a tool's result at the end": (
        talk(HI, HELLO, ("tool", "3")),
        "the last message is of role tool: expected the assistant's answer (add it, or end before)",
        MESSAGES,
    ),
    "an answer at the beginning": (
        talk(HELLO, HI, HELLO),
        "messages[0] is the assistant's: expected a message before it that it answers",
        MESSAGES,
    ),
    "a text for the tools": (talk(HI, HELLO, tools="add"), '"tools": expected a list of objects', MESSAGES),
    "names for the tools": (talk(HI, HELLO, tools=["add"]), '"tools": expected a list of objects', MESSAGES),
    "half a surrogate pair in the tools": (
        '{"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}], '
        '"tools": [{"name": "\\udc00"}]}',
        f'"tools": {HALF}',
        MESSAGES,
    ),
    "a text for the calls": (
        '{"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "", "tool_calls": "add"}]}',
        "messages[1].tool_calls: expected a list of objects",
        MESSAGES,
    ),
    "half a surrogate pair in a name": (
        '{"messages": [{"role": "user", "content": "a", "name": "\\udfff"}, {"role": "assistant", "content": "b"}]}',
        f"messages[0]: {HALF}",
        '{"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}',
    ),
}


@pytest.mark.parametrize("case", BAD_LINES)
def test_a_bad_line_is_named_with_its_reason_and_a_row_that_fits(case, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    line, reason, fits = BAD_LINES[case]
    line = line if isinstance(line, bytes) else line.encode()
    Path("mail.jsonl").write_bytes(A_GOOD_LINE.encode() + b"\n\n" + line + b"\n")
    with pytest.raises(InputError) as error:
        read_task("mail.jsonl")
    assert str(error.value) == f"mail.jsonl: 1 row does not fit:\n  mail.jsonl:3: {reason}\n  a row that fits: {fits}"


@pytest.mark.parametrize("case", [case for case in BAD_LINES if BAD_LINES[case][2].startswith("{")])
def test_the_row_that_is_shown_does_fit(case):
    row_from(json.loads(BAD_LINES[case][2]), Path("mail.jsonl"), 1)


ODD_LINES = {
    "windows line ends": A_GOOD_LINE + "\r\n" + A_GOOD_LINE + "\r\n",
    "a byte order mark": "\ufeff" + A_GOOD_LINE,
    "blank lines": f"\n{A_GOOD_LINE}\n \t\n\n",
    "white space around an object": f"  {A_GOOD_LINE}  \n",
    "no line end at the end": A_GOOD_LINE,
    "other keys": '{"id": 7, "prompt": "a", "completion": "b", "source": {"url": null}}\n',
    "messages beside prompt and completion": '{"messages": 1, "prompt": "a", "completion": "b", "text": 2}\n',
}


@pytest.mark.parametrize("case", ODD_LINES)
def test_what_is_odd_but_clear_is_read(case, tmp_path):
    file = tmp_path / "mail.jsonl"
    file.write_bytes(ODD_LINES[case].encode())
    task = read_task(file)
    assert {(row.prompt, row.completion) for row in (*task.train, *task.test)} == {("a", "b")}


def test_line_separators_of_unicode_do_not_end_a_row(tmp_path):
    file = tmp_path / "mail.jsonl"
    file.write_text('{"prompt": "a\u2028b\u0085c", "completion": "d"}\n', encoding="utf-8")
    assert read_task(file).train[0].prompt == "a\u2028b\u0085c"


def test_parts_of_text_are_joined_and_arguments_of_calls_become_objects():
    call = {"type": "function", "function": {"name": "add", "arguments": '{"a": 1}'}}
    row = row_from(
        {
            "messages": [
                {"role": "system", "content": ""},
                {"role": "user", "content": [{"type": "text", "text": "1 "}, {"type": "text", "text": "+ 2?"}]},
                {"role": "assistant", "content": None, "tool_calls": [call]},
                {"role": "tool", "content": "3", "tool_call_id": "x", "name": None},
                {"role": "assistant", "content": " It is 3. "},
            ],
            "tools": [{"type": "function", "function": {"name": "add"}}],
        },
        Path("mail.jsonl"),
        1,
    )
    assert row.messages[1]["content"] == "1 + 2?"
    assert row.messages[2]["content"] == ""
    assert row.messages[2]["tool_calls"][0]["function"]["arguments"] == {"a": 1}
    assert row.messages[3] == {"role": "tool", "content": "3", "tool_call_id": "x"}
    assert reference_text(row) == "It is 3."


# ---- tables

CSV_FITS = "prompt,completion\n  Is this mail spam? You won!,yes"
TSV_FITS = "prompt\tcompletion\n  Is this mail spam? You won!\tyes"
COLUMNS = 'expected columns named "prompt" and "completion", or "text", got '
DOUBLE = '(put a field with quotes in it into quotes and double them: "")'

# what is wrong: (ending, the table, its bad line, the reason)
BAD_TABLES = {
    "no names of columns": (".csv", "a,b\nc,d\n", 1, f'{COLUMNS}"a", "b"'),
    "a column too few": (".csv", "prompt,answer\na,b\n", 1, f'{COLUMNS}"prompt", "answer"'),
    "semicolons": (
        ".csv",
        "prompt;completion\na;b\n",
        1,
        f'{COLUMNS}"prompt;completion" (columns of a .csv file are parted by commas)',
    ),
    "tabs in a CSV": (
        ".csv",
        "prompt\tcompletion\na\tb\n",
        1,
        f'{COLUMNS}"prompt\\tcompletion" (columns of a .csv file are parted by commas)',
    ),
    "commas in a TSV": (
        ".tsv",
        "prompt,completion\na,b\n",
        1,
        f'{COLUMNS}"prompt,completion" (columns of a .tsv file are parted by tabs)',
    ),
    "a column twice": (".csv", "prompt,completion,prompt\na,b,c\n", 1, 'the column "prompt" stands twice'),
    "a field too few": (".csv", "prompt,completion\na\n", 2, "expected 2 fields as in the first line, got 1"),
    "a comma without quotes": (
        ".csv",
        "prompt,completion\na,b\nWell, no,b\n",
        3,
        "expected 2 fields as in the first line, got 3",
    ),
    "an empty field": (".tsv", "prompt\tcompletion\na\t\n", 2, '"completion": expected text, got nothing'),
    "a blank field": (".csv", 'text\n"  "\n', 2, '"text": expected text, got nothing but white space'),
    "a quote without its end": (
        ".csv",
        'prompt,completion\na,b\n"c,d\n',
        3,
        f"broken table row: unexpected end of data {DOUBLE}",
    ),
    "a quote inside quotes": (
        ".csv",
        'prompt,completion\n"the "best" film",b\n',
        2,
        f"broken table row: ',' expected after '\"' {DOUBLE}",
    ),
    "a NUL byte": (
        ".csv",
        "prompt,completion\na\0,b\n",
        2,
        '"prompt": holds a NUL byte (is the file UTF-16, or binary?)',
    ),
    "a byte of Latin-1": (
        ".csv",
        "prompt,completion\na,b\ncafé,b\n".encode("latin-1"),
        3,
        "not UTF-8: byte 0xe9 at column 4 (save the file as UTF-8)",
    ),
    "a line of over 8 MB": (
        ".csv",
        f"prompt,completion\n{'a' * MAX_LINE},b\n",
        2,
        "the line is longer than 8 MB (one row a line; split the text)",
    ),
}


@pytest.mark.parametrize("case", BAD_TABLES)
def test_a_bad_row_of_a_table_is_named_with_its_reason(case, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    suffix, table, line, reason = BAD_TABLES[case]
    file = Path(f"mail{suffix}")
    file.write_bytes(table if isinstance(table, bytes) else table.encode())
    with pytest.raises(InputError) as error:
        read_task(file)
    fits = CSV_FITS if suffix == ".csv" else TSV_FITS
    if '"text"' in reason and "columns" not in reason:
        fits = TEXT
    elif any(key in reason for key in ('"prompt": ', '"completion": ')):
        fits = COMPLETION
    assert str(error.value) == f"{file}: 1 row does not fit:\n  {file}:{line}: {reason}\n  a row that fits: {fits}"


def test_a_table_keeps_commas_quotes_and_line_ends_in_quotes(tmp_path):
    file = tmp_path / "mail.csv"
    text = '\ufeffid, Prompt ,completion\r\n1,"Well, ""now""\r\nwhat?",no\r\n\r\n2,b,c\r\n3,d,e\r\n'
    file.write_bytes(text.encode())
    task = read_task(file)
    rows = {row.line: (row.prompt, row.completion) for row in (*task.train, *task.test)}
    assert rows == {2: ('Well, "now"\r\nwhat?', "no"), 5: ("b", "c"), 6: ("d", "e")}


def test_a_table_of_text_is_read_and_says_that_its_labels_are_not(tmp_path):
    file = tmp_path / "mail.tsv"
    file.write_text("text\tlabel\nWin!\tspam\nHello\tham\n")
    task = read_task(file)
    assert task.format == "text"
    assert task.warnings == (
        f'{file}: 2 rows of "text" have "label", too, which is not read: to learn it, write "prompt" and "completion"',
    )


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
    f"other rows stand one a line in a .jsonl file\n  {COLOURS}"
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
    "a key without quotes": ('{"Definition": ["a"], 1: 2}', "mail.json:1: broken JSON: keys stand in double quotes"),
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
        f"stand one a line in a .jsonl file\n  a row that fits there: {COMPLETION}",
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


def test_the_tables_hold_well_over_100_wrong_files_with_their_whole_messages():
    assert sum(map(len, (BAD_LINES, BAD_TABLES, BAD_DOCUMENTS, BAD_LABELS))) >= 125


# ---- whatever a file holds

json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda inner: (
        st.lists(inner, max_size=4)
        | st.dictionaries(
            st.sampled_from(
                ["prompt", "completion", "messages", "role", "content", "text", "tools", "tool_calls", "type"]
            )
            | st.text(max_size=5),
            inner,
            max_size=4,
        )
    ),
    max_leaves=12,
)
messages = st.fixed_dictionaries(
    {
        "messages": st.lists(
            st.fixed_dictionaries({"role": st.sampled_from(["user", "assistant", "tool"]), "content": json_values})
        )
    },
    optional={"tools": json_values},
)


@given(json_values | messages)
def test_any_json_value_is_a_row_or_gets_a_reason_in_one_line(value):
    try:
        row = row_from(json.loads(json.dumps(value)), Path("mail.jsonl"), 1)
        assert row.kind in EXAMPLES
    except BadRow as error:
        assert str(error) and "\n" not in str(error)


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@given(data=st.data())
@pytest.mark.parametrize("suffix", [".jsonl", ".csv", ".tsv", ".json"])
def test_whatever_bytes_a_file_holds_it_is_a_task_or_an_input_error(suffix, data, tmp_path):
    pieces = [b'{"prompt": "a", "completion": "b"}', b"prompt,completion\n", b"prompt\tcompletion\n", b"\n", b'"', b","]
    pieces += [
        b"\r\n",
        b"\xef\xbb\xbf",
        b"\xff\xfe",
        b"[",
        b"]",
        b"{",
        b"}",
        b'"Instances"',
        b'"Definition"',
        b":",
        b"\0",
    ]
    pieces += [b'{"Definition": "a", "Instances": [{"input": "a", "output": "b"}', b'{"label": "a", "sentence": "b"}']
    content = b"".join(data.draw(st.lists(st.sampled_from(pieces) | st.binary(max_size=6), max_size=20)))
    file = tmp_path / f"mail{suffix}"
    file.write_bytes(content)
    try:
        task = read_task(file)
    except InputError as error:
        assert str(error).startswith(str(file))
    else:
        rows = [*task.train, *task.test]
        assert rows and all(row.file == file and (row.prompt or row.text) for row in rows)


fields = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0"), min_size=1).filter(str.strip)


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@given(rows=st.lists(st.tuples(fields, fields), min_size=1, max_size=8))
def test_rows_written_as_json_lines_or_as_a_table_are_read_as_they_were_written(rows, tmp_path):
    import csv

    lines = "".join(json.dumps({"prompt": a, "completion": b}) + "\n" for a, b in rows)
    (tmp_path / "mail.jsonl").write_text(lines)
    with open(tmp_path / "mail.csv", "w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows([("prompt", "completion"), *rows])
    for name in ("mail.jsonl", "mail.csv"):
        task = read_task(tmp_path / name)
        found = sorted((row.line, row.prompt, row.completion) for row in (*task.train, *task.test))
        assert [(prompt, completion) for _, prompt, completion in found] == rows
