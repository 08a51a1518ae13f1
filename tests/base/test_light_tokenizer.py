"""The tokenizer without transformers gives what transformers' tokenizer of the same files gives."""

import json
import shutil

import pytest

from mbf_mlx.data.tokenizer_pieces import PieceTokenizer
from tests.conftest import import_mlx
from tests.support.mixed_text import mixed_rows

import_mlx()

from mlx_lm.utils import load_tokenizer as load_full  # noqa: E402

from mbf_mlx.base.apply_template import bound_template  # noqa: E402
from mbf_mlx.base.light_tokenizer import LightTokenizer  # noqa: E402
from mbf_mlx.base.load import load_tokenizer  # noqa: E402
from mbf_mlx.base.renderer import Refused  # noqa: E402
from tests.support.tiny_tokenizers import TEMPLATES, make_tokenizer  # noqa: E402

TALKS = [
    [{"role": "user", "content": "Where does the invoice go?"}],
    [{"role": "system", "content": " Be brief. "}, {"role": "user", "content": "ünï {{ x }} <|im_end|> '\"\n"}],
    [{"role": "user", "content": ""}, {"role": "assistant", "content": "a"}, {"role": "user", "content": "\u2028é"}],
]


@pytest.fixture(scope="module", params=["smollm2", "tiny_llama", "first token", "trimmed"])
def pair(request, tmp_path_factory, tiny_llama):
    """The light tokenizer of a folder, and transformers' of the same."""
    if request.param in ("smollm2", "tiny_llama"):
        folder = request.getfixturevalue(request.param)
    else:  # as Llama 3's: a token before every text, and tokens placed without the space before them
        folder = tmp_path_factory.mktemp("light") / "model"
        shutil.copytree(tiny_llama, folder)
        made = make_tokenizer("bytes" if request.param == "first token" else "bytes trimmed", "llama3", bos=True)
        made._tokenizer.backend_tokenizer.save(str(folder / "tokenizer.json"))
        settings = {"bos_token": "<|im_start|>", "eos_token": "<|im_end|>", "chat_template": TEMPLATES["llama3"]}
        settings |= {"tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": True}
        (folder / "tokenizer_config.json").write_text(json.dumps(settings))
        rows = {"vocab_size": len(made._tokenizer)}
        config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps(config | rows))
    light = _light(folder)
    full = load_full(folder, {"trust_remote_code": False}, eos_token_ids=list(light.eos_token_ids))
    bound_template(full)
    return light, full


def _light(folder):
    from mbf_mlx.base import load

    light = load._light(folder, json.loads((folder / "config.json").read_text()).get("eos_token_id"))
    assert isinstance(light._tokenizer, LightTokenizer), folder
    return light


def test_every_text_has_the_same_tokens_and_places(pair):
    light, full = (each._tokenizer for each in pair)
    texts = [*mixed_rows(), "", " ", *(f"a{mark}b {mark} " for mark in light.get_vocab() if mark.startswith("<"))]
    for special in (True, False):
        options = {"add_special_tokens": special, "return_offsets_mapping": True}
        ours, theirs = light(texts, **options), full(texts, **options)
        for name in ("input_ids", "offset_mapping", "attention_mask"):
            assert ours[name] == theirs[name], name
        assert [light.encode(text, add_special_tokens=special) for text in texts[:99]] == theirs["input_ids"][:99]
    assert light("a b")["input_ids"] == full("a b")["input_ids"]
    for tokens in full(texts)["input_ids"]:
        assert light.decode(tokens) == full.decode(tokens)
        assert light.decode(tokens, skip_special_tokens=True) == full.decode(tokens, skip_special_tokens=True)


def test_names_numbers_and_marks_are_the_same(pair):
    light, full = pair
    for name in ("bos_token", "eos_token", "unk_token", "pad_token", "sep_token"):
        assert getattr(light, name) == getattr(full, name), name
        assert getattr(light, f"{name}_id") == getattr(full, f"{name}_id"), name
    for name in ("special_tokens_map", "chat_template", "has_chat_template", "eos_token_ids", "has_tool_calling"):
        assert getattr(light, name) == getattr(full, name), name
    assert light.get_vocab() == full.get_vocab() and len(light) == len(full)
    both = [{number: repr(token) for number, token in each.added_tokens_decoder.items()} for each in pair]
    assert both[0] == both[1]
    assert light.convert_ids_to_tokens([0, 5, 290]) == full.convert_ids_to_tokens([0, 5, 290])
    assert light.convert_tokens_to_ids("a") == full.convert_tokens_to_ids("a")  # asked of transformers


def test_pieces_are_the_same(pair):
    light, full = (PieceTokenizer(each) for each in pair)
    texts = mixed_rows(rows=200)
    assert light.begin == full.begin and light.ends == full.ends
    for way in ("plain", "begun", "continued", "placed"):
        assert getattr(light, way)(texts) == getattr(full, way)(texts), way


def test_streamed_text_is_the_same(pair):
    texts = mixed_rows(rows=50)
    seen = []
    for tokenizer in pair:
        said = []
        for text in texts:
            streaming = tokenizer.detokenizer
            for token in tokenizer.encode(text):
                streaming.add_token(token)
                said.append(streaming.last_segment)
            streaming.finalize()
            said.append(streaming.last_segment)
        seen.append(said)
    assert seen[0] == seen[1]


@pytest.mark.parametrize("template", [None, *TEMPLATES.values()], ids=["own", *TEMPLATES])
def test_conversations_are_rendered_the_same(pair, template):
    for given in (*TALKS, TALKS):
        for options in ({}, {"add_generation_prompt": True}, {"tokenize": False}):
            said = []
            for tokenizer in pair:
                try:
                    said.append(tokenizer.apply_chat_template(given, chat_template=template, **options))
                except Refused as error:
                    said.append(str(error))
            assert said[0] == said[1]


def test_what_it_cannot_is_asked_of_transformers(pair):
    tools = [{"type": "function", "function": {"name": "f", "parameters": {}}}]
    talk = [{"role": "user", "content": "a", "name": "x"}]
    for asked in ({"tools": tools}, {"tools": []}, {"custom": 3}):
        ours, theirs = (each.apply_chat_template(talk, chat_template=TEMPLATES["tools"], **asked) for each in pair)
        assert ours == theirs, asked


CHANGES = {
    "another kind of model": ("config.json", {"model_type": "qwen2"}),
    "a class that builds its own": ("tokenizer_config.json", {"tokenizer_class": "LlamaTokenizer"}),
    "no class": ("tokenizer_config.json", {"tokenizer_class": None}),
    "a setting that we do not know": ("tokenizer_config.json", {"split_special_tokens": True}),
    "several templates": ("tokenizer_config.json", {"chat_template": [{"name": "default", "template": "a"}]}),
    "a special token that is not in tokenizer.json": ("tokenizer_config.json", {"pad_token": "<pad>"}),
    "a special token that is an ordinary one": ("tokenizer_config.json", {"pad_token": "a"}),
    "an added token with other marks": (
        "tokenizer_config.json",
        {"added_tokens_decoder": {"0": {"content": "<|endoftext|>", "lstrip": True}}},
    ),
    "a template that calls tools": ("tokenizer_config.json", {"chat_template": "<tool_call> tool_call.name"}),
    "added tokens in a file": ("added_tokens.json", {"<new>": 3}),
    "special tokens in a file": ("special_tokens_map.json", {"eos_token": "<|endoftext|>"}),
}


@pytest.mark.parametrize("what", CHANGES)
def test_other_folders_are_left_to_transformers(what, tiny_llama, tmp_path):
    from mbf_mlx.base import load

    name, change = CHANGES[what]
    copy = tmp_path / "model"
    shutil.copytree(tiny_llama, copy)
    path = copy / name
    path.write_text(json.dumps((json.loads(path.read_text()) if path.exists() else {}) | change))
    assert load._light(copy, None) is None


@pytest.mark.parametrize("setting", ["truncation", "padding"])
def test_a_tokenizer_that_cuts_or_pads_is_left_to_transformers(setting, tiny_llama, tmp_path):
    from tokenizers import Tokenizer

    from mbf_mlx.base import load

    copy = tmp_path / "model"
    shutil.copytree(tiny_llama, copy)
    tokenizer = Tokenizer.from_file(str(copy / "tokenizer.json"))
    tokenizer.enable_truncation(20) if setting == "truncation" else tokenizer.enable_padding()
    tokenizer.save(str(copy / "tokenizer.json"))
    assert load._light(copy, None) is None


def test_a_template_beside_the_settings_is_the_one_used(tiny_llama, tmp_path):
    copy = tmp_path / "model"
    shutil.copytree(tiny_llama, copy)
    (copy / "chat_template.jinja").write_text("{{ messages[0].content }}!")
    tokenizer = load_tokenizer(copy)
    assert isinstance(tokenizer._tokenizer, LightTokenizer)
    assert tokenizer.apply_chat_template(TALKS[0], tokenize=False) == "Where does the invoice go?!"
