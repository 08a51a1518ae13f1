"""Where the answers are in what a chat template writes: every template with every kind of tokenizer, and refusals."""

import json
from functools import cache

import pytest

from mbf_mlx.data.row import BadRow
from tests.support.encoded import encode, generation_prompt, row, supervised, talk
from tests.support.tiny_tokenizers import STYLES, TEMPLATES, make_tokenizer

pytest.importorskip("mlx_lm.tokenizer_utils", reason="mlx-lm is not installed: pip install 'mbf-mlx[cpu]'")


@cache
def tokenizer_of(style="bytes", template="chatml", bos=False, ends=("<|im_end|>",)):
    return make_tokenizer(style, template, bos=bos, ends=ends)


# ---- every template

EVERY = [(style, template, bos) for style in STYLES for template in TEMPLATES for bos in (False, True)]
THINKS = "thinks when it begins"


@pytest.mark.parametrize(("style", "template", "bos"), EVERY)
def test_supervised_tokens_go_on_exactly_where_generation_starts(style, template, bos):
    tokenizer = tokenizer_of(style, template, bos)
    rows = [row(prompt="Is it good?", completion=" yes"), talk("Is it good?", "yes")]
    rows.append(talk("Hello", "Hi there", "Is it good?", "no, it is late"))
    for one in rows:
        encoded = encode(one, tokenizer)
        asked = list(one.messages[:-1]) or [{"role": "user", "content": one.prompt}]
        prompt = generation_prompt(tokenizer, asked)
        assert encoded.tokens[: encoded.prompt_length].tolist() == prompt
        assert encoded.supervised[encoded.prompt_length :].all()
        answered = tokenizer.decode(encoded.tokens[encoded.prompt_length :])
        assert answered.strip().endswith("<|im_end|>") and answered.count("<|im_end|>") == 1


@pytest.mark.parametrize(("style", "template", "bos"), EVERY)
def test_what_is_supervised_is_the_answers_and_their_end(style, template, bos):
    tokenizer = tokenizer_of(style, template, bos)
    thought = "<think>\n\n</think>\n\n" if template == "thinks when it ends" else ""
    space = " " if template == "llama2" else ""
    one = encode(row(prompt="Is it good?", completion=" yes"), tokenizer)
    assert supervised(tokenizer, one) == [f"{space}{thought}yes{space}<|im_end|>"]
    many = encode(talk("Hello", "Hi there", "Is it good?", "yes"), tokenizer)
    found = supervised(tokenizer, many)
    if template in ("words", THINKS):
        # The space before the answer, the template's or the tokenizer's, may share a token with its first word.
        found[0] = found[0].lstrip(" ")
    end = "" if template == "words" else "<|im_end|>"
    assert found == [f"{space}Hi there{space}{end}", f"{space}{thought}yes{space}<|im_end|>"]


def test_the_end_of_a_turn_is_the_first_token_at_which_generation_stops():
    both = tokenizer_of(template="phi", ends=("<|im_end|>", "<|endoftext|>"))
    last = make_tokenizer(template="phi", ends=("<|endoftext|>",))
    last._tokenizer.eos_token = "<|endoftext|>"
    last._eos_token_ids = {last.eos_token_id}
    one = row(prompt="Good?", completion="yes")
    assert supervised(both, encode(one, both)) == ["yes<|im_end|>"]
    assert supervised(last, encode(one, last)) == ["yes<|im_end|>\n<|endoftext|>"]


def test_calls_of_tools_are_supervised_and_the_tools_stand_in_the_prompt():
    tokenizer = tokenizer_of(template="tools")
    call = {"type": "function", "function": {"name": "add", "arguments": '{"a": 1}'}}
    tools = [{"type": "function", "function": {"name": "add"}}]
    messages = [
        {"role": "user", "content": "1 + 2?"},
        {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": "tool", "content": "3"},
        {"role": "assistant", "content": "It is 3."},
    ]
    encoded = encode(row(messages=messages, tools=tools), tokenizer)
    assert supervised(tokenizer, encoded) == ['<call>{"a": 1}</call><|im_end|>', "It is 3.<|im_end|>"]
    assert json.dumps(tools) in tokenizer.decode(encoded.tokens)
    single = encode(row(prompt="1 + 2?", completion="3", tools=tools), tokenizer)
    assert json.dumps(tools) in tokenizer.decode(single.tokens)


def test_calls_that_the_template_does_not_write_are_refused():
    tokenizer = tokenizer_of()
    call = {"type": "function", "function": {"name": "add", "arguments": {}}}
    calls = {"role": "assistant", "content": None, "tool_calls": [call]}
    question, result, answer = ({"role": role, "content": "3"} for role in ("user", "tool", "assistant"))
    for messages in ([question, calls], [question, calls, result, answer]):
        with pytest.raises(BadRow, match="no supervised token: the model's template or tokenizer leaves none of the"):
            encode(row(messages=messages), tokenizer)


# ---- what does not fit

REFUSED = {
    "a template that knows no system message": (
        "llama2",
        {"messages": [{"role": role, "content": "a"} for role in ("system", "user", "assistant")]},
        "the model's chat template refuses the row: only user and assistant roles are supported",
    ),
    "a template that shortens earlier answers": (
        "{% for m in messages %}[{{ m.content if loop.last else m.content[:1] }}]{% endfor %}",
        {"messages": [{"role": role, "content": "a thing"} for role in ("user", "assistant") * 2]},
        "the model's chat template changes an earlier answer: expected rows with one answer",
    ),
    "an answer that the template shortens": (
        THINKS,
        {"prompt": "a", "completion": "a</think>b"},
        "the model's chat template changes the answer: expected to find it behind the prompt",
    ),
    "an answer that a template drops": (
        "{% for m in messages %}{% if m.role == 'user' %}{{ m.content }}{% else %}<|im_end|>{% endif %}{% endfor %}",
        {"prompt": "a", "completion": "b"},
        "no supervised token: the model's template or tokenizer leaves none of the answer",
    ),
    "a template with an error": (
        "{{ messages.nothing.at_all }}",
        {"prompt": "a", "completion": "b"},
        "the model's chat template refuses the row: 'list object' has no attribute 'nothing'",
    ),
    "a template that wants to leave the sandbox": (
        "{{ messages.__class__.__mro__[1].__subclasses__() }}",
        {"prompt": "a", "completion": "b"},
        "the model's chat template refuses the row: access to attribute '__class__' of 'list' object is unsafe.",
    ),
    "messages for a model without a template": (
        None,
        {"messages": [{"role": role, "content": "a"} for role in ("user", "assistant")]},
        "messages need a chat template (the model has none): expected prompt/completion or text rows",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_a_row_that_the_template_does_not_take_is_refused_with_the_reason(case):
    template, document, message = REFUSED[case]
    tokenizer = make_tokenizer(template=template)
    if template and template not in TEMPLATES:
        tokenizer._tokenizer.chat_template = template
        tokenizer.has_chat_template = True
    with pytest.raises(BadRow) as error:
        encode(row(**document), tokenizer)
    assert str(error.value) == message
