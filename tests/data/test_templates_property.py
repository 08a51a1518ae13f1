"""Whatever a conversation says, in whatever model's template: supervised are its answers and their end tokens."""

import json
import re
from functools import cache

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mbf_mlx.config import DataConfig
from mbf_mlx.data.encode import Encoded, Encoder
from tests.support.chat_templates import SHAPES, SPECIAL, THOUGHTS
from tests.support.encoded import row
from tests.support.tiny_tokenizers import STYLES, make_tokenizer

pytest.importorskip("mlx_lm.tokenizer_utils", reason="mlx-lm is not installed: pip install 'mbf-mlx[cpu]'")

MARK_AND_SPACE = re.compile(f"({'|'.join(map(re.escape, (*SPECIAL, *THOUGHTS, '<|endoftext|>')))}) ")
TOOLS = [{"type": "function", "function": {"name": "add", "parameters": {"type": "object", "properties": {}}}}]


@cache
def encoder_of(style, name):
    shape = SHAPES[name]
    tokenizer = make_tokenizer(style, None, ends=shape.ends, special=SPECIAL, added=THOUGHTS)
    tokenizer._tokenizer.chat_template = shape.template
    tokenizer.has_chat_template = True
    return Encoder(tokenizer, DataConfig(max_seq_length=10_000)), tokenizer


# What people write, and what looks like a piece of a template or of a special token.
PIECES = [
    *"eensw 1.:,!?-\n|<>/[]{}'\"#", "yes", "no", "Hi there", "It is late.", "end", "end|>", "|>", "<|", "im_end", "</s",
    "think", "\n\n", "  ", "\t", "    return a\n", "### Response:\n", "Assistant:", "USER: ", "[INST", "assistant\n",
    "é", "日本", "👍", "\ue000", "{{ a }}", "{% b %}", ".\n", "\n###", "user\n", "final",
]  # fmt: skip
said = (
    st.lists(st.sampled_from(PIECES) | st.text(st.characters(codec="utf-8", exclude_characters="\0▁"), max_size=4))
    .map("".join)
    .map(str.strip)
    .filter(lambda text: text and not any(mark in text for mark in (*SPECIAL, *THOUGHTS, "<|im_", "<|endoftext|>")))
)
short = st.sampled_from(["n", "e", "s", "w", "a", "yes", "end", "|", ">", ".", "end|>"])
answers = short | said


@st.composite
def conversations(draw, system):
    messages = [{"role": "system", "content": draw(said)}] if system and draw(st.booleans()) else []
    for _ in range(draw(st.integers(1, 3))):
        messages.append({"role": "user", "content": draw(answers)})
        messages.append({"role": "assistant", "content": draw(answers)})
    return messages


def spoken(text, style):
    """Text as a tokenizer decodes it: sentencepiece puts a space of its own behind every token that it knows whole."""
    return MARK_AND_SPACE.sub(r"\1", text) if style == "sentencepiece" else text


def check(style, name, document, expected):
    """What is supervised is what is expected, and before the last answer stands exactly what it is generated from."""
    encoder, tokenizer = encoder_of(style, name)
    one = row(**document)
    _, encoded = next(encoder.stream([one]))
    assert isinstance(encoded, Encoded), encoded
    found = [spoken(text, style) for text, on in encoder.marked(encoded) if on]
    expected = [spoken(text, style) for text in expected]
    # The last answer is exact. White space before an earlier one, or behind one without an end token, may share a
    # token with its first or last letter: then it is learned with it.
    assert found[-1] == expected[-1]
    assert [text.strip() for text in found] == [text.strip() for text in expected]
    asked = list(one.messages[:-1]) or [{"role": "user", "content": one.prompt}]
    more = {"tools": document["tools"]} if "tools" in document else {}
    prompt = tokenizer.apply_chat_template(asked, tokenize=False, add_generation_prompt=True, **more)
    assert encoded.tokens[: encoded.prompt_length].tolist() == tokenizer.encode(prompt, add_special_tokens=False)


@pytest.mark.parametrize("name", SHAPES)
@settings(deadline=None, max_examples=30)
@given(data=st.data(), style=st.sampled_from(STYLES))
def test_exactly_the_answers_of_a_conversation_are_supervised(name, data, style):
    shape = SHAPES[name]
    messages = data.draw(conversations(shape.system))
    contents = [message["content"] for message in messages if message["role"] == "assistant"]
    expected = [shape.says(content, last=False) for content in contents[:-1]]
    check(style, name, {"messages": messages}, [*expected, shape.says(contents[-1], last=True)])


@pytest.mark.parametrize("name", SHAPES)
@settings(deadline=None, max_examples=15)
@given(prompt=said, completion=answers, style=st.sampled_from(STYLES))
def test_exactly_the_completion_of_a_prompt_is_supervised(name, prompt, completion, style):
    document = {"prompt": prompt, "completion": f" {completion}\n"}
    check(style, name, document, [SHAPES[name].says(completion, last=True)])


@pytest.mark.parametrize("name", [name for name in SHAPES if SHAPES[name].thoughts])
@settings(deadline=None, max_examples=30)
@given(data=st.data(), style=st.sampled_from(STYLES))
def test_thoughts_are_learned_where_the_last_answer_has_them(name, data, style):
    shape = SHAPES[name]
    messages = data.draw(conversations(shape.system))
    thoughts = [data.draw(st.none() | answers) for _ in messages]
    bare = [message["content"] for message in messages if message["role"] == "assistant"]
    for message, thought in zip(messages, thoughts, strict=True):
        if message["role"] == "assistant" and thought:
            message["content"] = f"<think>\n{thought}\n</think>\n\n{message['content']}"
    last = shape.says(bare[-1], last=True)
    if thoughts[-1]:
        whole = f"<think>\n{thoughts[-1]}\n</think>\n\n{shape.says(bare[-1], last=False)}"
        opened = "<think>\n" if shape.template.endswith("<think>\n{% endif %}") else ""
        last = whole.removeprefix(opened)
    check(style, name, {"messages": messages}, [*(shape.says(each, last=False) for each in bare[:-1]), last])


@pytest.mark.parametrize("name", [name for name in SHAPES if SHAPES[name].call])
@settings(deadline=None, max_examples=30)
@given(
    question=said,
    result=said,
    answer=answers,
    style=st.sampled_from(STYLES),
    arguments=st.dictionaries(said, said, max_size=2),
)
def test_exactly_the_calls_of_tools_are_supervised(name, question, result, answer, style, arguments):
    shape = SHAPES[name]
    call = {"type": "function", "function": {"name": "add", "arguments": arguments}}
    messages = [
        {"role": "user", "content": question},
        {"role": "assistant", "content": "", "tool_calls": [call]},
        {"role": "tool", "content": result},
        {"role": "assistant", "content": answer},
    ]
    called = shape.call.replace("{}", json.dumps(arguments, ensure_ascii=False))
    check(style, name, {"messages": messages, "tools": TOOLS}, [called, shape.says(answer, last=True)])


@pytest.mark.parametrize("completion", ["n", "e", "s", "w", "end", "|", "<"])
def test_an_answer_is_not_looked_for_in_the_token_that_ends_it(completion):
    check("bytes", "Phi-4 that thinks", {"prompt": "Which way?", "completion": completion}, [f"{completion}<|end|>"])
