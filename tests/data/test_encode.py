"""From rows to tokens: what is supervised, what is cut, what is refused. Templates are in test_answer_places.py."""

import re
from dataclasses import replace
from functools import cache
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mbf_mlx.config import DataConfig
from mbf_mlx.data.encode import Encoded, Encoder
from mbf_mlx.data.row import BadRow
from mbf_mlx.data.task import read_task
from mbf_mlx.errors import InputError
from tests.support.encoded import encode, generation_prompt, row, supervised, talk
from tests.support.tiny_tokenizers import STYLES, make_tokenizer

pytest.importorskip("mlx_lm.tokenizer_utils", reason="mlx-lm is not installed: pip install 'mbf-mlx[cpu]'")


@cache
def tokenizer_of(style="bytes", template="chatml", bos=False, ends=("<|im_end|>",)):
    return make_tokenizer(style, template, bos=bos, ends=ends)


@pytest.fixture
def tokenizer():
    """mlx-lm's wrapper around a byte-level BPE with a ChatML template."""
    return tokenizer_of()


@pytest.fixture
def task_of(write_jsonl):
    """Make a task of one row."""
    return lambda **document: read_task(write_jsonl("one.jsonl", [document]))


# ---- one row of each kind


def test_of_a_prompt_and_completion_the_completion_and_its_end_token_are_supervised(tokenizer):
    encoded = encode(row(prompt="Is it good?", completion=" yes"), tokenizer)
    assert supervised(tokenizer, encoded) == ["yes<|im_end|>"]
    assert tokenizer.decode(encoded.tokens) == (
        "<|im_start|>user\nIs it good?<|im_end|>\n<|im_start|>assistant\nyes<|im_end|>"
    )
    assert encoded.tokens.dtype == np.int32 and encoded.supervised.dtype == bool and encoded.cut == 0


def test_white_space_around_a_completion_is_left_out_of_a_chat_and_kept_without_a_template(tokenizer):
    answer = row(prompt="Good?", completion=" \nyes\n ")
    assert supervised(tokenizer, encode(answer, tokenizer)) == ["yes<|im_end|>"]
    assert supervised(tokenizer, encode(answer, tokenizer, template="none")) == [" \nyes\n <|im_end|>"]


def test_without_a_template_prompt_and_completion_stand_as_they_are(tokenizer):
    encoded = encode(row(prompt="Is it good?", completion=" yes"), tokenizer, template="none")
    assert supervised(tokenizer, encoded) == [" yes<|im_end|>"]
    assert tokenizer.decode(encoded.tokens) == "Is it good? yes<|im_end|>"


def test_all_answers_of_a_conversation_are_supervised_and_nothing_else(tokenizer):
    messages = [
        {"role": "system", "content": "Be short."},
        {"role": "user", "content": "Hello"},
        {"role": "assistant", "content": "Hi there"},
        {"role": "user", "content": "Is it good?"},
        {"role": "assistant", "content": "yes"},
    ]
    encoded = encode(row(messages=messages), tokenizer)
    assert supervised(tokenizer, encoded) == ["Hi there<|im_end|>", "yes<|im_end|>"]


def test_text_is_supervised_from_its_second_token_on_and_ends_with_the_end_token(tokenizer):
    encoded = encode(row(text="The train was late."), tokenizer)
    assert encoded.supervised.tolist() == [False] + [True] * (len(encoded.tokens) - 1)
    assert encoded.prompt_length == 1
    assert tokenizer.decode(encoded.tokens) == "The train was late.<|im_end|>"


def test_a_text_of_one_token_teaches_its_end_and_a_text_of_none_is_refused(tokenizer):
    assert supervised(tokenizer, encode(row(text="T"), tokenizer)) == ["<|im_end|>"]
    with pytest.raises(BadRow, match="no supervised token"):
        encode(row(text="<|im_end|>"), tokenizer)


@pytest.mark.parametrize("kind", ["completion", "messages", "text"])
@pytest.mark.parametrize("template", ["chat", "none"])
def test_without_a_mask_everything_but_the_first_token_is_supervised(kind, template, tokenizer):
    rows = {
        "completion": row(prompt="Good?", completion="yes"),
        "messages": talk("Good?", "yes"),
        "text": row(text="Good"),
    }
    if kind == "messages" and template == "none":
        return
    masked, whole = (encode(rows[kind], tokenizer, template=template, mask_prompt=mask) for mask in (True, False))
    assert whole.tokens.tolist() == masked.tokens.tolist()
    assert whole.supervised.tolist() == [False] + [True] * (len(whole.tokens) - 1)


# ---- what the tokens are


@pytest.mark.parametrize("style", STYLES)
def test_the_tokens_of_a_row_are_those_of_its_text_where_no_token_reaches_over_the_seam(style):
    tokenizer = tokenizer_of(style)
    encoded = encode(row(prompt="Is it good?", completion="yes"), tokenizer)
    messages = [{"role": "user", "content": "Is it good?"}, {"role": "assistant", "content": "yes"}]
    whole = tokenizer.encode(tokenizer.apply_chat_template(messages, tokenize=False), add_special_tokens=False)
    assert encoded.tokens.tolist() == whole[: len(encoded.tokens)]
    raw = encode(row(prompt="Is it good?", completion=" yes"), tokenizer, template="none")
    assert raw.tokens[:-1].tolist() == tokenizer.encode("Is it good? yes")


@pytest.mark.parametrize("style", STYLES)
@pytest.mark.parametrize("bos", [False, True])
@pytest.mark.parametrize("template", ["chat", "none"])
def test_the_first_token_of_a_text_stands_there_once(style, bos, template):
    tokenizer = tokenizer_of(style, "llama3", bos)
    begin = tokenizer.bos_token_id
    for one in (row(text="Good"), row(prompt="Good?", completion="yes")):
        tokens = encode(one, tokenizer, template=template).tokens.tolist()
        wanted = 1 if bos or (template == "chat" and one.kind == "completion") else 0
        assert tokens.count(begin) == wanted and tokens[:wanted] == [begin] * wanted
    for one in (row(text="<|im_start|>Good"), row(prompt="<|im_start|>Good?", completion="yes")):
        if one.kind == "text" or template == "none":
            assert encode(one, tokenizer, template=template).tokens.tolist().count(begin) == 1


def test_an_end_token_that_the_row_brings_is_not_doubled(tokenizer):
    end = tokenizer.eos_token_id
    for space in ("", "\n", " \n\n"):
        for one in (row(text=f"Good<|im_end|>{space}"), row(prompt="Good?", completion=f" yes<|im_end|>{space}")):
            tokens = encode(one, tokenizer, template="none").tokens.tolist()
            assert tokens.count(end) == 1 and tokens[-1] == end
    in_chat = encode(row(prompt="Good?", completion=" yes<|im_end|>\n"), tokenizer)
    assert supervised(tokenizer, in_chat) == ["yes<|im_end|>"]


@pytest.mark.parametrize("template", ["chat", "none"])
@pytest.mark.parametrize(
    "answer", ["old<|im_end|> new", "<|im_end|>new", "old<|im_end|><|im_start|>user", "a<|im_end|>.\n"]
)
def test_an_answer_that_goes_on_behind_an_end_token_is_refused(tokenizer, template, answer):
    with pytest.raises(BadRow, match=re.escape("the answer holds <|im_end|>, at which this model's generation stops")):
        encode(row(prompt="Good?", completion=answer), tokenizer, template=template)


def test_every_answer_of_a_conversation_ends_where_generation_stops(tokenizer):
    with pytest.raises(BadRow, match="the answer holds"):
        encode(talk("Hello", "old<|im_end|> new", "Good?", "yes"), tokenizer)
    kept = encode(talk("Hello<|im_end|> you", "old<|im_end|>", "<|im_end|>Good?", "<|head|>yes"), tokenizer)
    assert supervised(tokenizer, kept) == ["old<|im_end|>", "<|head|>yes<|im_end|>"]


def test_an_answer_of_weight_0_stands_in_the_prompt(tokenizer):
    messages = list(talk("hi", "hello", "2+2?", "4").messages)
    messages[1] = {**messages[1], "weight": 0}
    encoded = encode(row(messages=messages), tokenizer)
    assert supervised(tokenizer, encoded) == ["4<|im_end|>"]
    whole = encode(talk("hi", "hello", "2+2?", "4"), tokenizer)
    assert encoded.tokens.tolist() == whole.tokens.tolist()
    with pytest.raises(BadRow, match="weight 0, and --no-mask-prompt learns every token"):
        encode(row(messages=messages), tokenizer, mask_prompt=False)


def test_a_system_text_of_a_completion_is_a_system_message_and_needs_a_template(tokenizer):
    one = row(prompt="2+2?", completion="4", system="Be short.")
    messages = [{"role": role, "content": text} for role, text in (("system", "Be short."), ("user", "2+2?"))]
    encoded = encode(one, tokenizer)
    assert encoded.tokens[: encoded.prompt_length].tolist() == generation_prompt(tokenizer, messages)
    with pytest.raises(BadRow, match='"system" needs a chat template'):
        encode(one, tokenizer, template="none")
    rows = [one, row(prompt="2+2?", completion="4")]
    found = [parts for _, parts in Encoder(tokenizer, DataConfig(template="none")).stream(rows)]
    assert isinstance(found[0], BadRow) and isinstance(found[1], Encoded)


def test_what_the_template_leaves_out_of_rows_is_counted(task_of):
    tools = [{"type": "function", "function": {"name": "add"}}]
    call = {"type": "function", "function": {"name": "add", "arguments": {"a": 1}}}
    messages = [
        {"role": "user", "content": "1 + 2?", "name": "Kim"},
        {"role": "assistant", "content": "Let me see.", "tool_calls": [call]},
        {"role": "tool", "content": "3"},
        {"role": "assistant", "content": "3"},
    ]
    rows, task = [row(messages=messages, tools=tools), talk("Hello", "Hi")], task_of(prompt="a", completion="b")

    def told(tokenizer, rows=rows, template="chat"):
        encoder = Encoder(tokenizer, DataConfig(template=template))
        list(encoder.stream(rows))
        return encoder.warnings(task)

    left_out = ["the chat template leaves out: tools (1 row), name of messages (1 row), tool_calls of messages (1 row)"]
    chatml = make_tokenizer(template="chatml")
    assert told(chatml) == left_out
    assert told(tokenizer_of(template="tools")) == ["the chat template leaves out: name of messages (1 row)"]
    with_tools = [row(prompt="1 + 2?", completion="3", tools=tools)] * 3
    assert told(chatml, with_tools, "none") == ["not read without a chat template: tools (3 rows)"]
    assert told(chatml, [talk("Hello", "Hi")] * 3) == []
    without_tool_turns = "for m in messages if m.role in ('user', 'assistant')"
    chatml._tokenizer.chat_template = chatml._tokenizer.chat_template.replace("for m in messages", without_tool_turns)
    assert "messages of the role tool (1 row)" in told(chatml)[0]


def test_a_text_may_hold_any_end_token(tokenizer):
    text = "<|im_start|>user\nHello<|im_end|>\n<|im_start|>assistant\nHi<|im_end|>\n"
    assert tokenizer.decode(encode(row(text=text), tokenizer).tokens) == text.rstrip()


def test_an_answer_ends_where_generation_stops_also_where_the_template_ends_it_otherwise(task_of):
    tokenizer = make_tokenizer(template="chatml")
    assert Encoder(tokenizer, DataConfig()).warnings(task_of(prompt="a", completion="b")) == []
    tokenizer._tokenizer.eos_token = "<|endoftext|>"
    tokenizer._eos_token_ids = {tokenizer.convert_tokens_to_ids("<|endoftext|>")}
    assert Encoder(tokenizer, DataConfig()).warnings(task_of(prompt="a", completion="b")) == [
        "the chat template ends a turn with <|im_end|>, at which this model's generation does not stop: <|endoftext|> "
        "is learned behind it"
    ]
    assert Encoder(tokenizer, DataConfig()).warnings(task_of(text="a")) == []
    encoded = encode(row(prompt="Good?", completion="yes"), tokenizer)
    assert supervised(tokenizer, encoded) == ["yes<|im_end|><|endoftext|>"]


def test_a_model_without_a_template_gets_raw_prompts_and_says_so(task_of):
    tokenizer = tokenizer_of(template=None)
    assert tokenizer.decode(encode(row(prompt="Good?", completion=" yes"), tokenizer).tokens) == "Good? yes<|im_end|>"
    answers = task_of(prompt="a", completion="b")
    assert Encoder(tokenizer, DataConfig()).warnings(answers) == [
        "the model has no chat template: prompt and completion stand as they are"
    ]
    assert Encoder(tokenizer, DataConfig(template="none")).warnings(answers) == []
    assert Encoder(tokenizer, DataConfig()).warnings(task_of(text="a")) == []


def test_many_rows_get_the_tokens_that_each_gets_alone(tokenizer):
    rows = [talk("Hello", "Hi", f"What is {i}?", f" {i + 1}") for i in range(30)]
    together = Encoder(tokenizer, DataConfig()).all(rows, Path("mail"))
    assert [one.tokens.tolist() for one in together] == [encode(one, tokenizer).tokens.tolist() for one in rows]
    assert [one.row for one in together] == rows


# ---- what does not fit


def test_messages_have_no_raw_form(tokenizer):
    with pytest.raises(BadRow, match=re.escape("messages need a chat template (--template none): expected prompt/")):
        encode(talk("a", "b"), tokenizer, template="none")


def test_one_refused_row_does_not_stop_the_others_and_all_refused_are_named():
    tokenizer = tokenizer_of(template="llama2")
    rows = [replace(talk("a", "b"), line=line) for line in range(1, 5)]
    rows[1] = replace(row(messages=[{"role": role, "content": "a"} for role in ("system", "assistant")]), line=2)
    found = list(Encoder(tokenizer, DataConfig()).stream(rows))
    assert [isinstance(one, Encoded) for _, one in found] == [True, False, True, True]
    with pytest.raises(InputError) as error:
        Encoder(tokenizer, DataConfig()).all(rows, Path("mail"))
    assert str(error.value) == (
        "mail: 1 row does not fit:\n"
        "  task.jsonl:2: the model's chat template refuses the row: only user and assistant roles are supported"
    )


def test_a_tokenizer_without_an_end_token_is_refused():
    tokenizer = make_tokenizer()
    tokenizer._tokenizer.eos_token = None
    tokenizer._eos_token_ids = set()
    with pytest.raises(InputError, match=re.escape("expected a token that ends an answer (eos_token), got none")):
        Encoder(tokenizer, DataConfig())


# ---- what is too long


def test_a_long_prompt_loses_the_left_of_its_text_and_nothing_of_the_template(tokenizer):
    whole = encode(row(prompt="one two three four five six", completion="yes"), tokenizer)
    encoded = encode(row(prompt="one two three four five six", completion="yes"), tokenizer, max_length=28)
    text = tokenizer.decode(encoded.tokens)
    assert len(encoded.tokens) <= 28 and encoded.cut == len(whole.tokens) - len(encoded.tokens) > 0
    assert re.fullmatch(r"<\|im_start\|>user\n(.*)six<\|im_end\|>\n<\|im_start\|>assistant\nyes<\|im_end\|>", text)


def test_of_a_conversation_the_last_question_alone_is_cut(tokenizer):
    long = "one two three four five six seven"
    messages = [
        {"role": "system", "content": "Be short."},
        {"role": "user", "content": "Hello, how are you?"},
        {"role": "assistant", "content": "Hi"},
        {"role": "user", "content": long},
        {"role": "assistant", "content": "yes"},
    ]
    whole = encode(row(messages=messages), tokenizer)
    encoded = encode(row(messages=messages), tokenizer, max_length=len(whole.tokens) - 6)
    left = tokenizer.decode(encoded.tokens).split("user\n")[2].split("<|im_end|>")[0]
    assert long.endswith(left) and 0 < len(left) < len(long)
    messages[3]["content"] = left
    assert encoded.tokens.tolist() == encode(row(messages=messages), tokenizer).tokens.tolist()
    assert supervised(tokenizer, encoded) == ["Hi<|im_end|>", "yes<|im_end|>"]


def test_a_long_text_loses_its_end(tokenizer):
    text = row(text="one two three four five six seven eight nine ten")
    whole, encoded = encode(text, tokenizer), encode(text, tokenizer, max_length=9)
    assert encoded.tokens.tolist() == whole.tokens[:9].tolist()
    assert encoded.cut == len(whole.tokens) - 9


def test_what_does_not_fit_even_without_the_prompt_is_refused_with_the_numbers(tokenizer):
    answer = "a very long answer that has many words"
    length = len(tokenizer.encode(answer)) + 1
    around = len(generation_prompt(tokenizer, [{"role": "user", "content": ""}]))
    with pytest.raises(BadRow) as error:
        encode(row(prompt="one", completion=answer), tokenizer, max_length=24)
    assert str(error.value) == (
        f"{length} tokens of the answer and {around} around the prompt's text do not fit into --max-seq-length 24"
    )
    with pytest.raises(BadRow) as error:
        encode(talk("one", answer, "two", "yes"), tokenizer, max_length=24)
    assert re.fullmatch(
        r"\d+ tokens without the text of the last user message do not fit into --max-seq-length 24", str(error.value)
    )
    with pytest.raises(BadRow, match="do not fit into --max-seq-length 8"):
        encode(
            row(messages=[{"role": "system", "content": answer}, {"role": "assistant", "content": "a"}]),
            tokenizer,
            max_length=8,
        )


words = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0"), max_size=60)
# An answer of special tokens alone says nothing and is refused: Hypothesis takes such texts from our own code.
said = words.filter(lambda text: re.sub(r"<\|\w*\|>", "", text).strip())


def test_an_answer_of_a_special_token_alone_is_refused():
    for turns in (("Hi", "<|im_start|>", "Bye", "0"), ("Hi", "<|im_start|>")):
        with pytest.raises(BadRow, match="no supervised token"):
            encode(talk(*turns), tokenizer_of())


@settings(deadline=None)
@given(prompt=said, completion=said, style=st.sampled_from(STYLES), bos=st.booleans(), length=st.integers(8, 120))
def test_whatever_a_row_says_its_prompt_is_cut_on_the_left_alone(prompt, completion, style, bos, length):
    tokenizer = tokenizer_of(style, "chatml", bos)
    for template in ("chat", "none"):
        one = row(prompt=prompt, completion=completion)
        try:
            encoded = encode(one, tokenizer, template=template, max_length=length)
        except BadRow as error:
            assert "do not fit" in str(error) or "no supervised token" in str(error)
            continue
        assert len(encoded.tokens) <= length and len(encoded.tokens) == len(encoded.supervised)
        assert not encoded.supervised[0] and encoded.supervised[max(1, encoded.prompt_length) :].all()
        whole = encode(one, tokenizer, template=template, max_length=10_000)
        assert encoded.cut == len(whole.tokens) - len(encoded.tokens)
        answer = whole.tokens[whole.prompt_length :].tolist()
        assert encoded.tokens[encoded.prompt_length :].tolist() == answer
        if encoded.cut:
            suffixes = (replace(one, prompt=prompt[i:]) for i in range(1, len(prompt)))
            assert any(
                encode(short, tokenizer, template=template, max_length=10_000).tokens.tolist()
                == encoded.tokens.tolist()
                for short in suffixes
            )


@settings(deadline=None)
@given(prompt=said, completion=said)
def test_whatever_a_row_says_its_tokens_say_the_same(prompt, completion):
    tokenizer = tokenizer_of()
    raw = encode(row(prompt=prompt, completion=completion), tokenizer, template="none")
    assert tokenizer.decode(raw.tokens) == f"{prompt}{completion}<|im_end|>"
    chat = encode(row(prompt=prompt, completion=completion), tokenizer)
    assert supervised(tokenizer, chat) == [f"{completion.strip()}<|im_end|>"]
    assert tokenizer.decode(chat.tokens[: chat.prompt_length]) == (
        f"<|im_start|>user\n{prompt}<|im_end|>\n<|im_start|>assistant\n"
    )


@settings(deadline=None)
@given(contents=st.lists(said, min_size=1, max_size=3), answer=said)
def test_whatever_a_conversation_says_its_answers_are_supervised(contents, answer):
    tokenizer = tokenizer_of()
    turns = [text for content in contents for text in ("Hi", content)]
    encoded = encode(talk(*turns, "Bye", answer), tokenizer)
    found = supervised(tokenizer, encoded)
    assert found[-1] == f"{answer}<|im_end|>" and len(found) == len(contents) + 1
    for text, content in zip(found, contents, strict=False):
        # White space at its beginning may share a token with the line end before it, which is not the answer's.
        assert text.endswith(f"{content.lstrip()}<|im_end|>") and f"{content}<|im_end|>".endswith(text)


# ---- a real tokenizer, real tasks


def test_smollm2_is_asked_as_mlx_lm_asks_it(smollm2, task_data):
    from mlx_lm.utils import load_tokenizer

    tokenizer = load_tokenizer(smollm2)
    for name in ("tasks/langid", "superni/task363_sst2_polarity_classification", "cl_benchmark/TC/agnews"):
        task = read_task(task_data / name)
        rows = task.train[:60]
        encoder = Encoder(tokenizer, DataConfig())
        for one, encoded in zip(rows, encoder.all(rows, task.path), strict=True):
            assert encoder.marked(encoded)[-1] == (f"{one.completion.strip()}<|im_end|>", True)
            prompt = generation_prompt(tokenizer, [{"role": "user", "content": one.prompt}])
            assert encoded.tokens[: encoded.prompt_length].tolist() == prompt
            raw = encode(one, tokenizer, template="none")
            assert raw.tokens[:-1].tolist() == tokenizer.encode(one.prompt + one.completion)
            assert supervised(tokenizer, raw) == [f"{one.completion}<|im_end|>"]
