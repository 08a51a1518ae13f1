"""Tables, and whatever a file of any format holds. The other formats: test_row.py and test_benchmark_formats.py."""

import json
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from mbf_mlx.data.task import read_task
from mbf_mlx.data.text_file import MAX_LINE
from mbf_mlx.errors import InputError

# ---- tables

CSV_FITS = "prompt,completion\n  Is this mail spam? You won!,yes"
TEXT_FITS = "text\n  Ferns are plants without flowers."
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
        f'{COLUMNS}"prompt;completion" (columns of a .csv file are separated by commas)',
    ),
    "tabs in a CSV": (
        ".csv",
        "prompt\tcompletion\na\tb\n",
        1,
        f'{COLUMNS}"prompt\\tcompletion" (columns of a .csv file are separated by commas)',
    ),
    "commas in a TSV": (
        ".tsv",
        "prompt,completion\na,b\n",
        1,
        f'{COLUMNS}"prompt,completion" (columns of a .tsv file are separated by tabs)',
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
    fits = TEXT_FITS if reason.startswith('"text"') else fits
    assert str(error.value) == f"{file}: 1 row does not fit:\n  {file}:{line}: {reason}\n  a row that fits: {fits}"


def test_a_table_keeps_commas_quotes_and_line_ends_in_quotes(tmp_path):
    file = tmp_path / "mail.csv"
    text = '\ufeffid, Prompt ,completion\r\n1,"Well, ""now""\r\nwhat?",no\r\n\r\n2,b,c\r\n3,d,e\r\n'
    file.write_bytes(text.encode())
    task = read_task(file)
    rows = {row.line: (row.prompt, row.completion) for row in (*task.train, *task.test)}
    assert rows == {2: ('Well, "now"\r\nwhat?', "no"), 5: ("b", "c"), 6: ("d", "e")}


# A TSV, and its rows: (line, prompt, completion)
TSV_ROWS = {
    "quotes that mean themselves": (
        '"Best picture of the year\tgood\nI left early.\tbad\nMy screen has 24"\tbad\n',
        [(2, '"Best picture of the year', "good"), (3, "I left early.", "bad"), (4, 'My screen has 24"', "bad")],
    ),
    "a quote inside quotes": ('"the "best" film\tgood\n', [(2, '"the "best" film', "good")]),
    "a quote that never ends": ('"a\tb\nc\td\n', [(2, '"a', "b"), (3, "c", "d")]),
    "quotes around two fields": ('"a\tb"\nc\td\n', [(2, '"a', 'b"'), (3, "c", "d")]),
    "fields in quotes": ('"a ""b"" c"\t"d"\n"e\tf"\tg\n', [(2, 'a "b" c', "d"), (3, "e\tf", "g")]),
    "a field of several lines": (
        '"one\n\ntwo"\tgood\na\t"three\nfour"\nc\td\n',
        [(2, "one\n\ntwo", "good"), (5, "a", "three\nfour"), (7, "c", "d")],
    ),
    "a line that never ends among rows": (
        "".join(f'"{i}\tb\n' for i in range(50)),
        [(2 + i, f'"{i}', "b") for i in range(50)],
    ),
    "a line without a text among the lines of a field": (
        '1.\t"a\n\tb c"\n"2\n3"\td\n',
        [(2, "1.", "a\n\tb c"), (4, "2\n3", "d")],
    ),
    "windows line ends": ('"a"\tb\r\n"c\td\r\n', [(2, "a", "b"), (3, '"c', "d")]),
}


@pytest.mark.parametrize("case", TSV_ROWS)
def test_a_quote_in_a_tsv_merges_no_rows(case, tmp_path):
    file = tmp_path / "mail.tsv"
    text, expected = TSV_ROWS[case]
    file.write_bytes(f"prompt\tcompletion\n{text}".encode())
    task = read_task(file)
    assert sorted((row.line, row.prompt, row.completion) for row in (*task.train, *task.test)) == expected
    long = [(line, line + (a + b).count("\n")) for line, a, b in expected if "\n" in a + b]
    told = [f"{file}: 2 rows in quotes go over several lines (the first: {long[0][0]} to {long[0][1]})"] if long else []
    assert [warning for warning in task.warnings if "several lines" in warning] == told


def test_a_broken_row_of_several_lines_costs_no_others(tmp_path):
    file = tmp_path / "mail.tsv"
    file.write_text('prompt\tcompletion\n"one\ntwo\na\tb\n')
    with pytest.raises(InputError) as error:
        read_task(file)
    assert "2 rows do not fit" in str(error.value)
    assert "mail.tsv:2: expected 2 fields as in the first line, got 1" in str(error.value)


def rows_of_table(file, text):
    file.write_text(text)
    task = read_task(file)
    rows = sorted((*task.train, *task.test), key=lambda row: row.line)
    return [(row.line, row.prompt, row.completion) for row in rows], task.warnings


def test_a_quote_of_a_tsv_is_a_letter_where_it_encloses_no_field(tmp_path):
    lines = ['"Best picture of the year\tgood', "I left early.\tbad", 'My screen has 24"\tbad', '"In" is a film\tgood']
    rows, warnings = rows_of_table(tmp_path / "films.tsv", "prompt\tcompletion\n" + "\n".join(lines) + "\n")
    assert rows == [(line, *text.split("\t")) for line, text in enumerate(lines, 2)] and warnings == ()
    rows, _ = rows_of_table(tmp_path / "last.tsv", 'prompt\tcompletion\na\tb\n"c\td')
    assert rows == [(2, "a", "b"), (3, '"c', "d")]


def test_fields_of_a_tsv_may_stand_in_quotes(tmp_path):
    text = 'prompt\tcompletion\n"a\tb"\t"c ""d"""\n"e\nf"\tg\nh\t"i\nj\nk"\n'
    rows, warnings = rows_of_table(tmp_path / "quoted.tsv", text)
    assert rows == [(2, "a\tb", 'c "d"'), (3, "e\nf", "g"), (5, "h", "i\nj\nk")]
    assert warnings == (f"{tmp_path}/quoted.tsv: 2 rows in quotes go over several lines (the first: 3 to 4)",)


def test_a_row_that_swallows_lines_of_a_csv_is_said(tmp_path):
    rows, warnings = rows_of_table(tmp_path / "a.csv", 'prompt,completion\na,"b\nc,d\ne,f"\ng,h\n')
    assert rows == [(2, "a", "b\nc,d\ne,f"), (5, "g", "h")]
    assert warnings == (f"{tmp_path}/a.csv: 1 row in quotes goes over several lines (the first: 2 to 4)",)


def test_a_table_of_text_is_read_and_says_that_its_labels_are_not(tmp_path):
    file = tmp_path / "mail.tsv"
    file.write_text("text\tlabel\nWin!\tspam\nHello\tham\n")
    task = read_task(file)
    assert task.format == "text"
    assert task.warnings == (f'{file}: not read: label (2 rows) (to learn an answer, write "prompt" and "completion")',)


# ---- whatever a file holds


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
