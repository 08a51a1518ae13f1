"""What `mbf serve` says to the fields of a request: those that fit, those that do not, and what comes back."""

import json
import shutil

import pytest

from mbf_mlx.config import LoRAConfig
from tests.support.served import HI, chat, error_of, is_well, lines, raw, running, send

pytest.importorskip("mlx.core", reason="mlx is not installed: pip install 'mbf-mlx[cpu]'")

from mbf_mlx import Stream

NULLABLE = [
    *("temperature", "max_tokens", "max_completion_tokens", "stream", "logprobs", "top_p", "top_k", "stop", "seed"),
    *("n", "logit_bias", "tools", "tool_choice", "response_format", "stream_options", "model", "top_logprobs"),
    *("presence_penalty", "frequency_penalty", "min_p", "chat_template_kwargs", "functions", "suffix", "user"),
]
HUGE = int("9" * 400)
REFUSED = [
    *({"logit_bias": {token: 5}} for token in ("300000", "-1", "1.5", "x", "\u0663", "9" * 30)),
    *({"logit_bias": {"1": bias}} for bias in ("x", True, 1e9, [], "NaN")),
    {"logit_bias": [1]},
    *({"temperature": value} for value in (-1, True, "1", [], 1e300, HUGE)),
    *({"top_p": value} for value in (-0.1, 1.1, "x", HUGE)),
    *({"top_k": value} for value in (-1, 1.5, True, "3")),
    *({"min_p": value} for value in (-1, 2)),
    *({"xtc_probability": value} for value in (-1, 2, "1")),
    {"xtc_threshold": 0.9},
    *({"repetition_penalty": value} for value in (-1, 1e-300, HUGE, "1")),
    *({f"{name}_penalty": value} for name in ("presence", "frequency") for value in (HUGE, "1", [])),
    *({f"{name}_context_size": value} for name in ("repetition", "presence") for value in (-1, 1.5, HUGE)),
    *({"seed": value} for value in (-1, 1 << 64, 1.5, "1", True)),
    *({"max_tokens": value} for value in (0, -1, 1.5, True, "9")),
    *({"max_completion_tokens": value} for value in (0, "9")),
    *({"stop": value} for value in ([""], "", 3, ["a"] * 99, [None], {"a": 1}, "x" * 5000)),
    *({"logprobs": value} for value in ("yes", 1)),
    *({"logprobs": True, "top_logprobs": value} for value in (-1, 21, 1.5, HUGE)),
    {"top_logprobs": 2},
    *({"stream": value} for value in ("yes", 1)),
    *({"stream_options": value} for value in ([], {"include_usage": "x"})),
    *({"model": value} for value in (3, [], {})),
    *({"n": value} for value in (2, True, "1")),
    *({"response_format": value} for value in ({"type": "json_object"}, "text", {})),
    *({"tools": value} for value in ({}, [1], [{}], [{"function": {"name": 3}}])),
    {"tools": [{"type": "function", "function": {"name": "f"}}]},  # the template has no place for it
    *({"tool_choice": value} for value in ("required", {"type": "function"}, [])),
    {"functions": [{"name": "f"}]},
    *(
        {"chat_template_kwargs": value}
        for value in (
            [],
            {"chat_template": ""},
            {"chat_template": "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}"},
            {"tokenize": False},
            {"messages": "x"},
            {"add_generation_prompt": False},
            {"return_dict": True},
            {"loop": {"a": 1}},
            {"unknown_name": True},
        )
    ),
    *({"messages": value} for value in ("hi", [], [1], [{}], [[]], {"role": "user"}, [{"role": "user"}])),
    *({"messages": [{"role": "user", "content": value}]} for value in (3, {}, [1], [{}], [{"type": "text"}], None)),
    {"messages": [{"role": "user", "content": "\ud800"}]},
    {"messages": [{"role": "assistant", "tool_calls": [{}]}]},
    {"messages": [{"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": "{"}}]}]},
    {"messages": [{"role": "user", "content": [{"type": "text", "text": 5}]}]},
    {"messages": [{"role": "user", "content": [{"type": "image_url"}]}]},
    {"messages": [{"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": "[["}}]}]},
    {"logit_bias": {"1": 5, "01": -5}},
    {"messages": [{"role": "user", "content": "red " * 10_000}]},  # longer than the context
    {"stop": "\udfff"},
    {"frobnicate": 1},
    {"draft_model": "x"},
    {"adapters": "/etc"},
    {"role_mapping": {"user": "x"}},
]


@pytest.mark.parametrize("fields", REFUSED, ids=lambda fields: json.dumps(fields)[:60])
def test_a_field_that_does_not_fit_is_refused_with_one_sentence(served, fields):
    status, document = chat(served[0], **fields)
    assert (status, document["error"]["type"]) == (400, "invalid_request_error"), document
    assert 5 < len(error_of(document)) < 400


def test_the_first_token_that_the_model_lacks_is_refused(served, tiny_llama):
    size = json.loads((tiny_llama / "config.json").read_text())["vocab_size"]
    assert chat(served[0], logit_bias={str(size - 1): 1})[0] == 200
    for token in (size, size + 1):
        assert chat(served[0], logit_bias={str(token): 5})[0] == 400


def test_the_server_is_well_after_all_of_them(served):
    is_well(served[0])


@pytest.mark.parametrize(
    "fields",
    [
        {"top_k": 1_000_000, "temperature": 1.0},
        {"top_k": 299, "temperature": 1.0},
        {"top_p": 1e-46, "temperature": 1.0},
        {"top_p": 0, "temperature": 1.0},
        {"temperature": 1e-320},
        {"temperature": 100},
        {"min_p": 1e-300, "temperature": 1.0},
        {"min_p": 1, "temperature": 1.0},
        {"xtc_probability": 1.0, "temperature": 1.0},
        {"xtc_probability": 1, "xtc_threshold": 0, "temperature": 1.0},
        {"repetition_penalty": 100, "repetition_context_size": 0},
        {"presence_penalty": -100, "frequency_penalty": 100, "frequency_context_size": 1_000_000},
        {"logit_bias": {"0": -100, "1": 100}},
        {"logit_bias": {}},
        {"seed": (1 << 64) - 1, "temperature": 1.0},
        {"seed": 0, "logprobs": True, "top_logprobs": 20},
        {"max_tokens": 10**300, "stop": "e"},
        {"tool_choice": "none", "tools": [{"type": "function", "function": {"name": "f"}}]},
        {"response_format": {"type": "text"}, "n": 1, "user": "u", "metadata": {"a": "b"}},
        dict.fromkeys(NULLABLE),
        {"messages": [{"role": "user", "content": [{"type": "text", "text": "red"}, {"type": "text", "text": "\0"}]}]},
        {"messages": [{"role": "user", "content": ""}]},
    ],
    ids=lambda fields: json.dumps(fields)[:60],
)
def test_the_ends_of_a_field_are_answered(served, fields):
    status, document = chat(served[0], **fields)
    assert status == 200, document
    json.dumps(document, allow_nan=False)


def test_log_probabilities_have_openais_form_whole_and_in_pieces(served):
    options = {"logprobs": True, "top_logprobs": 3, "max_tokens": 6, "logit_bias": {"2": -100}}
    whole = chat(served[0], **options)[1]["choices"][0]
    assert len(whole["logprobs"]["content"]) == 6
    for each in whole["logprobs"]["content"]:
        assert set(each) == {"token", "logprob", "bytes", "top_logprobs"} and len(each["top_logprobs"]) == 3
        assert each["top_logprobs"][0] == {name: each[name] for name in ("token", "logprob", "bytes")}
    bare = chat(served[0], **{**options, "top_logprobs": None})[1]["choices"][0]["logprobs"]["content"]
    assert [each["token"] for each in bare] == [each["token"] for each in whole["logprobs"]["content"]]
    body = json.dumps({"messages": HI, "stream": True, **options}).encode()
    events = raw(served[0], lines(f"Content-Length: {len(body)}", body=body)).decode().split("\n\n")
    documents = [json.loads(line[6:].replace("[DONE]", "{}")) for line in events if "data: " in line[:6]]
    pieces = [document["choices"][0] for document in documents if document]
    assert [each for piece in pieces for each in piece["logprobs"]["content"]] == whole["logprobs"]["content"]
    assert "".join(piece["delta"].get("content", "") for piece in pieces) == whole["message"]["content"]
    assert pieces[-1]["finish_reason"] == whole["finish_reason"] == "length"
    text = {"prompt": "red cold", "max_tokens": 3, "logprobs": 2, "logit_bias": {"2": -100}}
    found = send(served[0], "POST", "/v1/completions", text)[1]["choices"][0]
    assert {name: len(values) for name, values in found["logprobs"].items()} == dict.fromkeys(
        ("tokens", "token_logprobs", "top_logprobs", "text_offset"), 3
    )
    assert send(served[0], "POST", "/v1/completions", {"prompt": ["red"]})[0] == 400


def test_a_stop_sequence_ends_an_answer_wherever_the_tokens_borders_are():
    from mbf_mlx.serving.answers import StopText

    for pieces in (["no sto", "p here"], ["no stop here"], list("no stop here")):
        stop = StopText(("stop", "here"))
        shown = "".join(stop.feed(piece) for piece in pieces)
        assert (shown, stop.found) == ("no ", True)
    stop = StopText(("stop",))
    assert stop.feed("a st") + stop.feed("", last=True) == "a st" and not stop.found


def test_a_template_that_fails_or_drops_a_role_refuses_the_request(tiny_llama, tmp_path):
    base = shutil.copytree(tiny_llama, tmp_path / "base")
    (base / "chat_template.jinja").write_text(
        "{% for m in messages %}{% if m.role == 'system' %}{{ raise_exception('no system here') }}"
        "{% elif m.role in ('user', 'assistant') %}{{ m.content }} {% endif %}{% endfor %}"
        "{% if greedy %}{% for i in range(greedy) %}x{% endfor %}{% endif %}"
    )
    stream = Stream.open(tmp_path / "s", base=str(base), lora=LoRAConfig(rank=4))
    with running(stream) as (server, _):
        status, document = chat(server, messages=[{"role": "system", "content": "x"}, *HI])
        assert status == 400 and "no system here" in error_of(document)
        status, document = chat(server, messages=[{"role": "developer", "content": "x"}, *HI])
        assert status == 400 and "no system here" in error_of(document)  # as in the rows of a task
        status, document = chat(server, messages=[*HI, {"role": "tool", "content": "x"}])
        assert status == 400 and "no place for the role 'tool'" in error_of(document)
        assert chat(server, chat_template_kwargs={"greedy": 3})[0] == 200
        assert chat(server, chat_template_kwargs={"greedy": 99_999})[0] == 400  # longer than the context
        assert chat(server, chat_template_kwargs={"greedy": "x"})[0] == 400
        assert chat(server, chat_template_kwargs={"bos_token": "x"})[0] == 400
        is_well(server)
