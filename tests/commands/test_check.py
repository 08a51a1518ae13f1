import json

import pytest
from typer.testing import CliRunner

from mbf_mlx.commands import app
from tests.support.command_line import mbf

ROWS = [{"prompt": f"Is {i} even?", "completion": " yes" if i % 2 == 0 else " no"} for i in range(40)]

SPLIT = {"prompt": "new or old? both", "completion": "old<|im_end|> new"}


@pytest.fixture
def check(tmp_path, monkeypatch):
    """Run `mbf check` in tmp_path; its result has exit_code, stdout and stderr."""
    monkeypatch.chdir(tmp_path)
    return lambda *arguments: CliRunner().invoke(app, ["check", *map(str, arguments)], catch_exceptions=False)


def test_without_a_model_characters_are_counted_and_the_answer_is_marked(check, write_jsonl):
    write_jsonl("even.jsonl", ROWS)
    result = check("even.jsonl")
    assert result.exit_code == 0
    assert result.stdout == (
        "even: prompt/completion rows, even.jsonl\n"
        "  train      36 rows  characters: median 14, 95% 15, longest 15\n"
        "  test        4 rows  characters: median 14, 95% 14, longest 14  "
        "(held out of training: there are no test rows)\n"
        "  answers: no, yes\n"
        "  the first row, even.jsonl:1; the text in ⟦ ⟧ is trained on:\n"
        "Is 0 even?⟦ yes⟧\n\n"
    )


def test_with_a_model_tokens_are_counted_and_the_row_stands_in_its_template(check, write_jsonl, tiny_llama):
    write_jsonl("even/train.jsonl", ROWS)
    write_jsonl("even/valid.jsonl", [{"prompt": "Is 50 even?", "completion": "yes"}])
    write_jsonl("even/test.jsonl", [{"prompt": "Is 51 even?", "completion": "no"}])
    result = check("even", "--model", tiny_llama)
    assert result.exit_code == 0
    marked = "<|im_start|>user\nIs 0 even?<|im_end|>\n<|im_start|>assistant\n⟦yes<|im_end|>⟧\n\n"
    assert result.stdout.endswith(f"even/train.jsonl:1; the text in ⟦ ⟧ is trained on:\n{marked}")
    assert "tokens: median" in result.stdout and "held out" not in result.stdout
    raw = check("even", "--model", tiny_llama, "--template", "none")
    assert raw.stdout.endswith(":\nIs 0 even?⟦ yes<|im_end|>⟧\n\n")
    whole = check("even", "--model", tiny_llama, "--template", "none", "--no-mask-prompt")
    assert whole.stdout.endswith(":\nI⟦s 0 even? yes<|im_end|>⟧\n\n")


def test_json_is_one_document_with_all_that_is_printed(check, write_jsonl, tiny_llama):
    write_jsonl("even.jsonl", ROWS)
    write_jsonl("talk.jsonl", [{"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}])
    result = check("even.jsonl", "talk.jsonl", "--model", tiny_llama, "--max-seq-length", 26, "--json")
    even, talk = json.loads(result.stdout)["tasks"]
    assert (even["name"], even["format"], even["labels"]) == ("even", "prompt/completion", ["no", "yes"])
    assert (even["rows"], even["held_out"]) == ({"train": 36, "valid": 0, "test": 4}, 4)
    assert (even["unit"], even["max_seq_length"]) == ("tokens", 26)
    assert even["lengths"]["train"]["max"] > 26 and 0 < even["cut_rows"] <= 40
    assert len(even["sha256"]) == 64
    assert even["example"]["place"] == "even.jsonl:1"
    assert [piece["text"] for piece in even["example"]["pieces"] if piece["supervised"]] == ["yes<|im_end|>"]
    assert talk["warnings"] == ["talk.jsonl: only one row, so none is held out and nothing will be scored"]
    assert check("even.jsonl", "--json").stdout.count('"unit": "characters"') == 1


def test_every_bad_line_of_every_task_is_said_before_a_model_is_looked_for(check, write_jsonl):
    write_jsonl("one.jsonl", [{"prompt": "a"}, {"prompt": "a", "completion": ""}])
    write_jsonl("two.jsonl", [{"text": 3}])
    result = check("one.jsonl", "two.jsonl", "--model", "no-such-model")
    assert result.exit_code == 1 and result.stdout == ""
    assert result.stderr == (
        "error: one.jsonl: 2 rows do not fit:\n"
        '  one.jsonl:1: expected "prompt" and "completion", or "messages", or "text", got "prompt"\n'
        '  one.jsonl:2: "completion": expected text, got nothing\n'
        '  a row that fits: {"prompt": "Is this mail spam?\\nYou won!\\nAnswer:", "completion": " yes"}\n'
        "two.jsonl: 1 row does not fit:\n"
        '  two.jsonl:1: "text": expected text, got a number\n'
        '  a row that fits: {"text": "3"}\n'
    )


def test_every_row_that_is_too_long_is_named(check, write_jsonl, tiny_llama):
    write_jsonl("even/train.jsonl", [*ROWS, {"prompt": "a", "completion": "yes, and so on" * 9}])
    write_jsonl("even/test.jsonl", [{"prompt": "b", "completion": "no, and so on" * 9}])
    result = check("even", "--model", tiny_llama, "--max-seq-length", 60)
    lines = result.stderr.splitlines()
    assert result.exit_code == 1 and result.stdout == ""
    assert lines[-3] == "error: even: 2 rows do not fit:"
    for line, place in zip(lines[-2:], ("train.jsonl:41", "test.jsonl:1"), strict=True):
        assert line.startswith(f"  even/{place}: ") and line.endswith("do not fit into --max-seq-length 60")


def test_warnings_go_to_stderr_and_commands_to_the_terminal_are_not_passed_on(check, write_jsonl):
    write_jsonl("even.jsonl", [{"prompt": "\x1b[31mred", "completion": "a\x07b"}, *ROWS, ROWS[0]])
    result = check("even.jsonl")
    assert result.stderr == "warning: even.jsonl: 1 of 38 rows of train repeats an earlier one\n"
    assert r"\x1b[31mred" in result.stdout and "\x1b[31mred" not in result.stdout and "\x07" not in result.stdout


def test_rows_that_hold_special_tokens_are_counted(check, write_jsonl, tiny_llama):
    write_jsonl("even.jsonl", [{"prompt": "<|im_start|>user\nHi", "completion": "Hello"}, *ROWS])
    assert check("even.jsonl", "--model", tiny_llama).stderr == (
        "warning: even.jsonl: 1 row holds text that this model reads as special tokens, such as <|im_start|>; "
        "its template adds its own\n"
    )


def test_many_answers_are_counted_and_long_examples_lose_their_middle(check, write_jsonl):
    write_jsonl("few.jsonl", [{"prompt": "word " * 900, "completion": f"{i:02}"} for i in range(30)])
    printed = check("few.jsonl").stdout
    assert (
        "  answers: 00, 01, 02, 03, 04, 05, 06, 07, 08, 09, 10, 11, 12, 13, 14, 15, 16, 17, 18, 19, … (30 in all)\n"
        in printed
    )
    assert len(printed.splitlines()[-2]) < 700 and " … " in printed.splitlines()[-2]
    write_jsonl("many.jsonl", [{"prompt": "a", "completion": str(i)} for i in range(99)])
    assert "  answers: more than 64 different ones\n" in check("many.jsonl").stdout


def test_conversations_and_texts_are_marked_without_a_model(check, write_jsonl):
    turns = [("system", "Be short."), ("user", "Hi"), ("assistant", "Hello"), ("user", "Bye"), ("assistant", "See you")]
    write_jsonl("talk.jsonl", [{"messages": [{"role": role, "content": text} for role, text in turns]}] * 2)
    assert check("talk.jsonl").stdout.endswith(
        ":\nsystem: Be short.\nuser: Hi\nassistant: ⟦Hello⟧\nuser: Bye\nassistant: ⟦See you⟧\n\n\n"
    )
    write_jsonl("text.jsonl", [{"text": "Ferns have no flowers."}, {"text": "Trees may."}])
    assert check("text.jsonl").stdout.count("⟦") == 2


def test_a_model_and_a_stream_at_once_are_refused(check, write_jsonl, tiny_llama):
    write_jsonl("even.jsonl", ROWS)
    result = check("even.jsonl", "--model", tiny_llama, "--stream", "somewhere")
    assert result.exit_code == 1
    assert result.stderr == "error: --model and --stream: expected one of them (a stream has its own model)\n"


def test_a_stream_brings_its_model_and_its_template(check, write_jsonl, tiny_llama):
    from mbf_mlx import Stream

    write_jsonl("even.jsonl", ROWS)
    Stream.open("stream", base=str(tiny_llama), template="none")
    printed = check("even.jsonl", "--stream", "stream").stdout
    assert printed.endswith(":\nIs 0 even?⟦ yes<|im_end|>⟧\n\n")


@pytest.mark.parametrize("template", ["chat", "none"])
def test_an_answer_that_generation_would_cut_is_refused_by_every_command_alike(
    write_jsonl, tiny_llama, tmp_path, template
):
    rows = [*({"prompt": f"new or old? {i}", "completion": "old"} for i in range(9)), SPLIT]
    task = write_jsonl("age.jsonl", rows)
    options = ["--model", tiny_llama, "--template", template]
    for command in (["check", task], ["learn", tmp_path / "stream", task]):
        done = mbf(*command, *options)
        assert done.returncode == 1 and "Traceback" not in done.stderr
        assert "age.jsonl:10: the answer holds <|im_end|>, at which this model's generation stops" in done.stderr
    assert not (tmp_path / "stream" / "generations" / "000001").exists()


def test_text_with_markup_is_told_of_no_template_and_gets_no_second_end(check, write_jsonl, tiny_llama):
    write_jsonl("raw.jsonl", [{"text": f"<|im_start|>user\n{i}?<|im_end|>\n"} for i in range(20)])
    result = check("raw.jsonl", "--model", tiny_llama)
    assert "20 rows hold text that this model reads as special tokens, such as <|im_start|>\n" in result.stderr
    assert "template" not in result.stderr
    assert result.stdout.endswith("0?<|im_end|>⟧\n\n")


def test_weights_system_texts_and_keys_that_are_not_read_are_told_before_anything_runs(write_jsonl, tiny_llama):
    turns = [("user", "hi"), ("assistant", "hello"), ("user", "2+2?"), ("assistant", "4")]
    messages = [{"role": role, "content": content} for role, content in turns]
    messages[1]["weight"], messages[3]["weight"] = 0, 1
    rows = [{"messages": messages, "system": f"Be short {i}.", "history": [["a", "b"]]} for i in range(12)]
    task = write_jsonl("talk.jsonl", rows)
    for options in ([], ["--model", tiny_llama]):
        done = mbf("check", task, *options)
        assert done.returncode == 0 and f"warning: {task}: not read: history (12 rows)\n" in done.stderr
        assert "⟦4" in done.stdout and "⟦hello" not in done.stdout and "Be short" in done.stdout


def test_letters_that_stand_between_others_are_shown_as_they_are(check, write_jsonl):
    written = "10\u00a0km by \U0001f468\u200d\U0001f469\u200d\U0001f467, co\u00adop, \u0645\u06cc\u200c\u062e\u0648"
    write_jsonl("even.jsonl", [{"prompt": written, "completion": f"{written} {i}"} for i in range(20)])
    result = check("even.jsonl")
    assert f"{written}⟦{written}" in result.stdout and "�" not in result.stdout
