"""What a tokenizer renders under bounds is, letter by letter and token by token, what transformers renders."""

import json
from datetime import datetime
from functools import cache

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.support.chat_templates import SHAPES, SPECIAL, THOUGHTS
from tests.support.tiny_tokenizers import TEMPLATES, make_tokenizer

pytest.importorskip("mlx_lm.tokenizer_utils", reason="mlx-lm is not installed: pip install 'mbf-mlx[cpu]'")

from mbf_mlx.base.apply_template import bound_template
from mbf_mlx.base.renderer import Refused

TOOL = {"type": "function", "function": {"name": "add", "description": "é <b>", "parameters": {"type": "object"}}}
# What the environment of chat templates has beside jinja's own.
FEATURES = {
    "json": "{{ messages | tojson }}{{ messages | tojson(indent=2, sort_keys=true) }}{{ {'a': '<é>'} | tojson(true) }}",
    "json with separators": "{{ messages | tojson(separators=(',', ':')) }}",
    "a refusal": "{% if messages | length > 2 %}{{ raise_exception('too long: ' ~ messages[0].role) }}{% endif %}ok",
    "loop controls": "{% for m in messages %}{% if loop.index == 3 %}{% break %}{% endif %}"
    "{% if m.role == 'system' %}{% continue %}{% endif %}{{ m.content }}{% endfor %}",
    "generation": "{% for m in messages %}{% if m.role == 'assistant' %}{% generation %}{% set x = 1 %}"
    "{{ m.content }}\n{% endgeneration %}{{ x is defined }}{% else %}{{ m.content }}{% endif %}{% endfor %}",
    "white space": "{% for m in messages %}\n    {% if true %}\n  {{ m.content }}\n  {%- endif %}\n{% endfor %}\n",
    "a namespace": "{% set ns = namespace(a=1, self=2) %}{% set ns.b = ns.a + ns.self %}{{ ns.b }}"
    "{{ ns.c is defined }}",
    "a namespace with a bad name": "{% set ns = namespace() %}{% set ns.__class__ = 1 %}x",
    "a namespace that begins with one": "{{ namespace(_a=1) }}",
    "dictionaries": "{{ dict(a=1) }}{{ dict([('a', 2)], b=3) }}{{ dict.fromkeys('ab', 1) }}{{ dict.mro is defined }}",
    "what it is given": "{{ bos_token }}{{ eos_token }}{{ pad_token }}{{ tools }}{{ documents }}"
    "{{ add_generation_prompt }}{{ enable_thinking }}{{ own is defined }}{{ own }}{{ unk_token is defined }}",
    "the day": "{{ strftime_now('%d %b %Y') }}{{ strftime_now is defined }}",
    "thoughts": "{% for m in messages %}{{ m.reasoning_content }}|{{ m.thinking }}|{{ m.reasoning }}{% endfor %}",
    "keys": "{% for m in messages %}{% for key in m %}{{ key }}={{ m[key] }},{% endfor %}{% endfor %}",
    "numbers": "{% for m in messages %}{{ m.weight }}{{ m.weight is none }}{{ m.weight is integer }}{% endfor %}",
    "a template that is none": "{% for %}",
    "out of the sandbox": "{{ messages.__class__.__mro__ }}{{ messages.append(1) }}",
}
ALL = FEATURES | TEMPLATES | {name: shape.template for name, shape in SHAPES.items()}
said = st.sampled_from(
    ["", " ", "Hi\n", "<think>a</think>b", "</think>", "é日👍", "\u2028", "{{ a }}", "<|im_end|>"]
) | st.text(st.characters(codec="utf-8"), max_size=8)
calls = st.lists(
    st.fixed_dictionaries(
        {"function": st.fixed_dictionaries({"name": said, "arguments": st.just({"a": [1, 2.5, None]})})}
    )
)
messages = st.lists(
    st.fixed_dictionaries(
        {"role": st.sampled_from(["user", "assistant", "system", "tool"]), "content": said},
        optional={
            "tool_calls": calls | st.none(), "reasoning_content": said | st.none(), "thinking": said, "reasoning": said,
            "name": said, "weight": st.integers() | st.floats(allow_nan=False) | st.none() | st.booleans(),
        },
    ),
    min_size=1, max_size=5,
)  # fmt: skip
more = st.fixed_dictionaries(
    {},
    optional={
        "tools": st.just([TOOL]), "documents": st.just([{"title": "a", "text": "b"}]),
        "add_generation_prompt": st.booleans(),
        "own": st.integers() | said | st.lists(said), "bos_token": said,
    },
)  # fmt: skip


@cache
def tokenizer_of(name):
    tokenizer = make_tokenizer("bytes", None, special=SPECIAL, added=THOUGHTS)
    tokenizer._tokenizer.chat_template = ALL[name]
    tokenizer.has_chat_template = True
    bound_template(tokenizer)
    return tokenizer


def theirs(tokenizer, *arguments, **named):
    inner = tokenizer._tokenizer
    return type(inner).apply_chat_template(inner, *arguments, return_dict=False, enable_thinking=False, **named)


def result(function, *arguments, **named):
    try:
        return function(*arguments, **named)
    except Refused:
        return "refused"
    except Exception as error:
        if type(error).__module__.startswith("jinja2") or isinstance(error, (TypeError, ValueError, AttributeError)):
            return "refused"
        raise


@pytest.mark.parametrize("name", ALL)
@settings(max_examples=25, deadline=None)
@given(messages, more)
def test_a_conversation_is_rendered_as_transformers_renders_it(name, talk, named):
    tokenizer = tokenizer_of(name)
    for tokenize in (False, True):
        expected = result(theirs, tokenizer, talk, tokenize=tokenize, **named)
        assert (
            result(tokenizer.apply_chat_template, talk, tokenize=tokenize, enable_thinking=False, **named) == expected
        )


@settings(max_examples=20, deadline=None)
@given(st.lists(messages, min_size=1, max_size=100))
def test_several_conversations_are_rendered_at_once(talks):
    tokenizer = tokenizer_of("ChatML")
    for tokenize in (False, True):
        named = {"tokenize": tokenize, "enable_thinking": False}
        assert tokenizer.apply_chat_template(talks, **named) == theirs(tokenizer, talks, tokenize=tokenize)


def test_a_refusal_says_the_same_words():
    tokenizer = tokenizer_of("a refusal")
    with pytest.raises(Exception, match="^too long: user$") as expected:
        theirs(tokenizer, [{"role": "user", "content": "a"}] * 3, tokenize=False)
    with pytest.raises(Refused) as found:
        tokenizer.apply_chat_template([{"role": "user", "content": "a"}] * 3, tokenize=False)
    assert str(found.value) == str(expected.value)


def test_a_named_template_and_one_of_the_callers_are_taken_as_transformers_takes_them():
    tokenizer = make_tokenizer("bytes", None)
    tokenizer._tokenizer.chat_template = {"default": "default", "tool_use": "tools"}
    tokenizer.has_chat_template = True
    bound_template(tokenizer)
    bound_template(tokenizer)  # twice is once
    talk = [{"role": "user", "content": "a"}]
    for named in ({}, {"tools": [TOOL]}, {"chat_template": "tool_use"}, {"chat_template": "{{ messages[0].content }}"}):
        assert tokenizer.apply_chat_template(talk, tokenize=False, **named) == theirs(
            tokenizer, talk, tokenize=False, **named
        )
    assert tokenizer.apply_chat_template(talk, tokenize=False, chat_template="own") == "own"
    with pytest.raises(TypeError, match="not rendered under bounds: return_assistant_tokens_mask"):
        tokenizer.apply_chat_template(talk, return_assistant_tokens_mask=True)


def test_the_day_is_the_day_of_this_process(monkeypatch):
    from mbf_mlx.base import renderer

    class Later(datetime):
        @classmethod
        def now(cls, tz=None):
            return cls(2047, 3, 4)

    monkeypatch.setattr(renderer, "datetime", Later)
    talk = json.loads('[{"role": "user", "content": "a"}]')
    assert tokenizer_of("the day").apply_chat_template(talk, tokenize=False) == "04 Mar 2047True"
