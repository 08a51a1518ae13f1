"""One row: which JSON values fit, and the message for those that do not. The file is long because of their table."""

import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mbf_mlx.data.row import EXAMPLES, BadRow, is_learned, reference_text, row_from
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
    "single quotes": ("{'prompt': 'a'}", "broken JSON: keys and texts need double quotes", COMPLETION),
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


def test_the_table_holds_75_wrong_lines_with_their_whole_messages():
    assert len(BAD_LINES) >= 75


# ---- whatever a row holds

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


# ---- keys that change what is learned


def of(**document):
    return row_from(document, Path("task.jsonl"), 1)


def turns(*messages):
    return [{"role": role, "content": content, **more} for role, content, more in messages]


def test_an_answer_of_weight_0_is_read_and_not_learned():
    messages = turns(("user", "hi", {}), ("assistant", "hello", {"weight": 0}), ("user", "2+2?", {}))
    row = of(messages=[*messages, {"role": "assistant", "content": "4", "weight": 1}])
    assert [is_learned(message) for message in row.messages] == [False, False, False, True]
    assert row.messages[1]["weight"] == 0 and "weight" not in row.messages[3]
    # What follows the last answer to learn changes nothing.
    more = [
        *messages,
        *turns(("assistant", "4", {}), ("user", "Bye", {"weight": 0}), ("assistant", "Bye", {"weight": 0})),
    ]
    assert of(messages=more) == row and reference_text(of(messages=more)) == "4"


@pytest.mark.parametrize(
    ("role", "weight", "reason"),
    [
        ("assistant", 0, "every answer has the weight 0: expected one to learn"),
        ("assistant", 0.5, "messages[1].weight: expected 0 (only read) or 1 (learned), got 0.5"),
        ("assistant", "1", 'messages[1].weight: expected 0 (only read) or 1 (learned), got "1"'),
        ("user", 1, "messages[1].weight: only an assistant's message is learned, got 1 with the role user"),
    ],
)
def test_a_weight_that_leaves_nothing_to_learn_or_has_no_meaning_is_refused(role, weight, reason):
    messages = turns(("user", "hi", {}), (role, "hello", {"weight": weight}))
    messages += turns(("assistant", "4", {})) if role == "user" else []
    with pytest.raises(BadRow) as caught:
        of(messages=messages)
    assert str(caught.value) == reason


def test_a_system_text_beside_the_messages_or_the_prompt_is_read():
    asked, told = {"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}
    whole = of(messages=[{"role": "system", "content": "Be short."}, asked, told])
    assert of(messages=[asked, told], system="Be short.") == whole
    assert of(messages=[{"role": "developer", "content": "Be short."}, asked, told]) == whole
    assert of(messages=list(whole.messages), system="Be short.") == whole
    assert of(messages=[asked, told], system="") == of(messages=[asked, told], system=None)
    assert of(prompt="a", completion="b", system="Be short.").system == "Be short."
    assert of(prompt="a", completion="b", system="x").digest != of(prompt="a", completion="b").digest
    with pytest.raises(BadRow, match="two system messages: expected one"):
        of(messages=list(whole.messages), system="Be long.")
    with pytest.raises(BadRow, match='"system": expected text, got a number'):
        of(prompt="a", completion="b", system=3)


def test_functions_are_the_tools_of_older_rows():
    call = {"name": "add", "arguments": '{"a": 1}'}
    asked = {"role": "user", "content": "1 + 2?"}
    told = {"role": "assistant", "content": "3"}
    old = [asked, {"role": "assistant", "content": None, "function_call": call}]
    old += [{"role": "function", "name": "add", "content": "3"}, told]
    new = [asked, {"role": "assistant", "content": None, "tool_calls": [{"type": "function", "function": call}]}]
    new += [{"role": "tool", "name": "add", "content": "3"}, told]
    row = of(messages=old, functions=[{"name": "add"}])
    assert row == of(messages=new, tools=[{"type": "function", "function": {"name": "add"}}]) and row.unread == ()
    with pytest.raises(BadRow, match='"functions": expected a list of objects'):
        of(messages=old, functions="add")


def test_what_is_not_read_is_said_once_with_its_rows(tmp_path):
    file = tmp_path / "mail.jsonl"
    rows = [
        {"prompt": f"{i}?", "completion": "b", "id": i, "history": [["a", "b"]] if i < 3 else []} for i in range(20)
    ]
    rows[7]["a b"] = 1
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert read_task(file).warnings == (f'{file}: not read: id (20 rows), history (3 rows), "a b" (1 row)',)
    file.write_text(json.dumps({"prompt": "a", "completion": "b", **{f"key{i}": 1 for i in range(40)}}) + "\n")
    more = json.dumps({"prompt": "b", "completion": "b", "other": 1, "another": 1}) + "\n"
    file.write_text(file.read_text() + more)
    (warning,) = read_task(file).warnings
    assert warning.endswith("key39 (1 row), others (1 row)")


def test_the_columns_of_a_table_are_told_apart_as_keys_are(tmp_path):
    file = tmp_path / "mail.csv"
    file.write_text("id,system,prompt,completion,note\n1,Be short.,a,b,\n2,,c,d,\n")
    task = read_task(file)
    assert task.warnings == (f"{file}: not read: id (2 rows)",)
    assert {row.system for row in [*task.train, *task.test]} == {"Be short.", ""}
