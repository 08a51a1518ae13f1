"""Tokenizers as GGUF vocabularies: identified by what they do, every token in its place, refused where unknown."""

import json

import pytest

from mbf_mlx.base.gguf.reader import read_gguf
from mbf_mlx.base.gguf.tokenizer import PRE_TOKENIZERS as IMPORTED
from mbf_mlx.base.gguf.tokenizer import read_vocabulary as read_imported
from mbf_mlx.base.gguf.tokenizer import write_tokenizer
from mbf_mlx.errors import InputError
from mbf_mlx.export.gguf import vocabulary as gguf_vocab
from mbf_mlx.export.gguf.vocabulary import find_pre_tokenizer, read_vocabulary
from tests.support.tiny_llama import write_tiny_llama
from tests.support.vocabularies import (
    BYTE_LEVEL,
    DIGITS,
    LLAMA3,
    PIECES,
    PLAIN_BYTES,
    QWEN2,
    change,
    sequence,
    split,
    train_bpe,
    train_sentencepiece,
    write_vocabulary,
)

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = 1, 2, 3, 4, 5, 6


@pytest.mark.parametrize(
    ("pre_tokenizer", "more", "name"),
    [
        (sequence(split(LLAMA3), PLAIN_BYTES), {"ignore_merges": True}, "llama-bpe"),
        (sequence(split(LLAMA3), PLAIN_BYTES), {}, "smaug-bpe"),
        (sequence(split(QWEN2), PLAIN_BYTES), {"normalizer": {"type": "NFC"}}, "qwen2"),
        (sequence(split(gguf_vocab.TEKKEN), PLAIN_BYTES), {"ignore_merges": True}, "tekken"),
        (BYTE_LEVEL, {}, "gpt-2"),
        (sequence(BYTE_LEVEL), {}, "gpt-2"),
        (sequence(DIGITS, BYTE_LEVEL), {}, "smollm"),
    ],
)
def test_a_pre_tokenizer_is_known_by_what_it_does(tmp_path, pre_tokenizer, more, name):
    document = train_bpe(tmp_path, pre_tokenizer, **more)
    assert find_pre_tokenizer(document, tmp_path) == name


def test_both_spellings_of_the_contractions_are_one_pre_tokenizer(tmp_path):
    spelled_out = gguf_vocab.LLAMA3.replace("{contractions}", gguf_vocab.CONTRACTIONS[1])
    document = train_bpe(tmp_path, sequence(split(spelled_out), PLAIN_BYTES), ignore_merges=True)
    assert find_pre_tokenizer(document, tmp_path) == "llama-bpe"


@pytest.mark.parametrize(
    ("pre_tokenizer", "more"),
    [
        (sequence(split(LLAMA3.replace("{1,3}", "{1,2}")), PLAIN_BYTES), {"ignore_merges": True}),
        (sequence(split(QWEN2), PLAIN_BYTES), {"ignore_merges": True}),
        (sequence(split(LLAMA3, behavior="MergedWithNext"), PLAIN_BYTES), {"ignore_merges": True}),
        (sequence(DIGITS, DIGITS, BYTE_LEVEL), {}),
        ({**BYTE_LEVEL, "add_prefix_space": True}, {}),
        (sequence(split(LLAMA3), BYTE_LEVEL), {"ignore_merges": True}),
        (BYTE_LEVEL, {"normalizer": {"type": "Lowercase"}}),
        (sequence({"type": "Digits", "individual_digits": False}, BYTE_LEVEL), {}),
    ],
)
def test_a_pre_tokenizer_that_llama_cpp_lacks_is_refused_and_not_guessed(tmp_path, pre_tokenizer, more):
    train_bpe(tmp_path, pre_tokenizer, **more)
    with pytest.raises(InputError, match="expected a pre-tokenizer that llama.cpp also has .*llama-bpe.*smollm"):
        read_vocabulary(tmp_path, {"vocab_size": 400})


@pytest.mark.parametrize("name", IMPORTED)
def test_what_is_imported_under_a_name_is_exported_under_one_that_means_the_same(tmp_path, name):
    train_bpe(tmp_path / "first")
    vocabulary = read_vocabulary(tmp_path / "first", {"vocab_size": 400})
    vocabulary.pre = name
    file = read_gguf(write_vocabulary(vocabulary, tmp_path / "v.gguf"))
    write_tokenizer(read_imported(file.settings, file.path), tmp_path, 512)
    again = read_vocabulary(tmp_path, {"vocab_size": 400})
    assert again.pre == {"llama3": "llama-bpe", "llama-v3": "llama-bpe"}.get(name, name)


def test_a_vocabulary_survives_the_way_into_a_gguf_file_and_back(tmp_path):
    train_bpe(tmp_path / "first", sequence(DIGITS, BYTE_LEVEL))
    change(tmp_path / "first", "tokenizer_config.json", chat_template="{{ messages }}", pad_token="<|im_end|>")
    before = read_vocabulary(tmp_path / "first", {"vocab_size": 400})
    file = read_gguf(write_vocabulary(before, tmp_path / "v.gguf"))
    write_tokenizer(read_imported(file.settings, file.path), tmp_path, 512)
    assert read_vocabulary(tmp_path, {"vocab_size": 400}) == before


def test_every_token_has_its_type_and_missing_ones_are_padding(tmp_path):
    document = train_bpe(tmp_path)
    added = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False}
    tool = {"id": 403, "content": "<tool>", "special": False, **added}
    change(tmp_path, added_tokens=[*document["added_tokens"], tool])
    vocabulary = read_vocabulary(tmp_path, {"vocab_size": 410})
    assert vocabulary.types[:4] == [CONTROL, CONTROL, CONTROL, NORMAL]
    assert (vocabulary.tokens[403], vocabulary.types[403]) == ("<tool>", USER_DEFINED)
    assert vocabulary.tokens[400:403] == ["[PAD400]", "[PAD401]", "[PAD402]"]
    assert vocabulary.types[400:403] + vocabulary.types[404:] == [UNUSED] * 9
    assert len(vocabulary.tokens) == len(vocabulary.types) == len(set(vocabulary.tokens)) == 410
    assert vocabulary.merges == [" ".join(merge) for merge in document["model"]["merges"]]


def test_tokens_without_an_embedding_are_left_out_with_a_word(tmp_path):
    train_bpe(tmp_path)
    vocabulary = read_vocabulary(tmp_path, {"vocab_size": 399})
    assert len(vocabulary.tokens) == len(vocabulary.types) == 399
    assert "no embedding for" in vocabulary.notes[0]


def test_special_ids_come_from_the_tokenizer_then_from_the_configs(tmp_path):
    train_bpe(tmp_path)
    change(tmp_path, "tokenizer_config.json", eos_token={"content": "<|im_end|>"}, bos_token=None)
    vocabulary = read_vocabulary(tmp_path, {"vocab_size": 400, "bos_token_id": 1, "pad_token_id": 0})
    assert vocabulary.special == {"bos": 1, "eos": 2, "unk": 0, "pad": 0}


def test_a_second_end_token_is_named_unless_llama_cpp_knows_its_text(tmp_path):
    train_bpe(tmp_path)
    assert "eot" not in read_vocabulary(tmp_path, {"vocab_size": 400, "eos_token_id": [2, 0]}).special
    change(tmp_path, "generation_config.json", eos_token_id=[2, 1])
    assert read_vocabulary(tmp_path, {"vocab_size": 400, "eos_token_id": 2}).special["eot"] == 1


def test_a_token_before_every_text_is_taken_over_and_any_other_is_refused(tmp_path):
    train_bpe(tmp_path)

    def before(token):
        text, specials = {"Sequence": {"id": "A", "type_id": 0}}, {token: {"id": token, "ids": [1], "tokens": [token]}}
        single = [{"SpecialToken": {"id": token, "type_id": 0}}, text]
        template = {"type": "TemplateProcessing", "single": single, "pair": [], "special_tokens": specials}
        change(tmp_path, post_processor={"type": "Sequence", "processors": [PLAIN_BYTES, template]})
        return read_vocabulary(tmp_path, {"vocab_size": 400})

    assert not read_vocabulary(tmp_path, {"vocab_size": 400}).add_bos
    assert before("<|im_start|>").add_bos
    change(tmp_path, "tokenizer_config.json", chat_template="{{ messages[0].content }}")
    assert before("<|im_start|>").notes == [
        "llama.cpp puts <|im_start|> before every text, and the chat template does not"
    ]
    change(tmp_path, "tokenizer_config.json", chat_template="{{ bos_token }}{{ messages[0].content }}")
    assert before("<|im_start|>").notes == []
    with pytest.raises(
        InputError, match="post_processor: expected .*<.im_start.>.* or nothing as bos, got .*endoftext"
    ):
        before("<|endoftext|>")


def test_the_template_file_goes_before_the_one_in_the_settings(tmp_path):
    train_bpe(tmp_path)
    change(tmp_path, "tokenizer_config.json", chat_template="old")
    assert read_vocabulary(tmp_path, {"vocab_size": 400}).chat_template == "old"
    (tmp_path / "chat_template.jinja").write_text("new")
    assert read_vocabulary(tmp_path, {"vocab_size": 400}).chat_template == "new"


def test_a_sentencepiece_model_keeps_its_pieces_scores_and_types(tmp_path):
    model = train_sentencepiece(tmp_path, user_defined_symbols=["<sep>", "▁tool"])
    vocabulary = read_vocabulary(tmp_path, {"vocab_size": PIECES + 3})
    assert (vocabulary.model, vocabulary.pre, vocabulary.merges) == ("llama", "default", None)
    pieces = [model.id_to_piece(token_id) for token_id in range(PIECES)]
    own = [token.replace("\u2581", " ") if token == "▁tool" else token for token in pieces]
    assert vocabulary.tokens == [*own, *(f"[PAD{PIECES + i}]" for i in range(3))]
    assert vocabulary.scores[:PIECES] == [model.get_score(token_id) for token_id in range(PIECES)]
    assert vocabulary.types[:5] == [UNKNOWN, CONTROL, CONTROL, USER_DEFINED, USER_DEFINED]
    assert vocabulary.types.count(BYTE) == 256
    assert vocabulary.types[-3:] == [UNUSED] * 3
    assert vocabulary.special == {"bos": 1, "eos": 2, "unk": 0}
    assert vocabulary.add_bos and vocabulary.add_space_prefix


def test_the_order_of_merges_gives_the_same_scores_as_the_sentencepiece_model(tmp_path):
    train_sentencepiece(tmp_path / "sp")
    before = read_vocabulary(tmp_path / "sp", {"vocab_size": PIECES})
    file = read_gguf(write_vocabulary(before, tmp_path / "v.gguf"))
    write_tokenizer(read_imported(file.settings, file.path), tmp_path, 512)
    after = read_vocabulary(tmp_path, {"vocab_size": PIECES})
    assert (after.tokens, after.types, after.special) == (before.tokens, before.types, before.special)
    merged = [i for i, text in enumerate(after.tokens) if after.types[i] == NORMAL and len(text) > 1]
    by_score = sorted(merged, key=lambda i: -before.scores[i])
    assert len(merged) > 500 and by_score == sorted(merged, key=lambda i: -after.scores[i])


@pytest.mark.parametrize(
    ("settings", "template", "prefix"),
    [
        ({"legacy": True}, "{{ x }}", True),
        ({"legacy": False}, "{{ x }}", False),
        ({"legacy": False}, None, True),
        ({"legacy": True, "add_prefix_space": False}, None, False),
    ],
)
def test_the_space_before_text_is_that_of_the_training(tmp_path, settings, template, prefix):
    train_sentencepiece(tmp_path)
    change(tmp_path, "tokenizer_config.json", tokenizer_class="LlamaTokenizer", chat_template=template, **settings)
    assert read_vocabulary(tmp_path, {"vocab_size": PIECES}).add_space_prefix is prefix


@pytest.mark.parametrize(
    ("changes", "found"),
    [
        ({"model_type": "unigram"}, "a unigram model"),
        ({"normalization_rule_name": "nmt_nfkc"}, "text normalized by 'nmt_nfkc'"),
        ({"remove_extra_whitespaces": True}, "repeated spaces squeezed into one"),
    ],
)
def test_a_sentencepiece_model_that_llama_cpp_reads_otherwise_is_refused(tmp_path, changes, found):
    train_sentencepiece(tmp_path, **changes)
    with pytest.raises(InputError, match=f"of type BPE that leaves text as it is, got .*{found}"):
        read_vocabulary(tmp_path, {"vocab_size": PIECES})


def test_merges_that_are_no_sentencepiece_order_are_refused(tmp_path):
    vocab = {"<unk>": 0, "a": 1, "b": 2, "c": 3, "ab": 4, "bc": 5, "abc": 6}
    model = {"type": "BPE", "vocab": vocab, "merges": ["a b", "b c", "ab c"], "byte_fallback": True}
    normalizer = {"type": "Replace", "pattern": {"String": " "}, "content": "▁"}
    change(tmp_path, model={**model, "unk_token": "<unk>"}, normalizer=normalizer)
    with pytest.raises(
        InputError, match="'a' and 'bc' are never joined; put the model's own tokenizer.model beside it"
    ):
        read_vocabulary(tmp_path, {"vocab_size": 7})
    change(tmp_path, model={**model, "merges": ["a b", "b c", "ab c", "a bc"]})
    assert read_vocabulary(tmp_path, {"vocab_size": 7}).scores == [-3, -3, -3, -3, 0, -1, -2]


def test_two_tokenizers_of_different_vocabularies_are_refused(tmp_path):
    train_sentencepiece(tmp_path)
    change(tmp_path, model={"type": "BPE", "vocab": {"<unk>": 0, "other": 1}, "merges": [], "byte_fallback": True})
    change(tmp_path, normalizer={"type": "Replace", "pattern": {"String": " "}, "content": "▁"})
    with pytest.raises(InputError, match="are of different vocabularies: token 1 is '<s>' and 'other'"):
        read_vocabulary(tmp_path, {"vocab_size": PIECES})


def test_a_folder_without_a_tokenizer_is_refused(tmp_path):
    with pytest.raises(InputError, match="expected tokenizer.json or tokenizer.model, got neither"):
        read_vocabulary(tmp_path, {"vocab_size": 10})
    (tmp_path / "tokenizer.json").write_text("{")
    with pytest.raises(InputError, match="tokenizer.json: not JSON"):
        read_vocabulary(tmp_path, {"vocab_size": 10})


@pytest.mark.parametrize("stated", [True, False, None])
@pytest.mark.parametrize("single", ["<s> $A", "$A", "<s> $A </s>"])
def test_the_tokens_around_a_text_are_those_that_transformers_puts_there(tmp_path, stated, single):
    """Where add_bos_token and the post-processor disagree, one of them is not what happens."""
    from tokenizers import Tokenizer, processors
    from transformers import AutoTokenizer

    folder = write_tiny_llama(tmp_path / "base")
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    marks = {"<s>": "<|im_start|>", "</s>": "<|im_end|>"}
    text = single.replace("</s>", marks["</s>"]).replace("<s>", marks["<s>"])
    special = [(mark, tokenizer.token_to_id(mark)) for mark in marks.values()]
    tokenizer.post_processor = processors.TemplateProcessing(single=text, special_tokens=special)
    tokenizer.save(str(folder / "tokenizer.json"))
    place = folder / "tokenizer_config.json"
    settings = json.loads(place.read_text()) | ({} if stated is None else {"add_bos_token": stated})
    place.write_text(json.dumps(settings))
    whole = AutoTokenizer.from_pretrained(folder)("red")["input_ids"]
    vocabulary = read_vocabulary(folder, json.loads((folder / "config.json").read_text()))
    assert vocabulary.add_bos == (whole[0] == special[0][1])
    assert vocabulary.add_eos == (whole[-1] == special[1][1])


def test_llama_cpp_is_told_of_two_more_end_tokens_and_the_user_of_others(tmp_path):
    folder = write_tiny_llama(tmp_path / "base")
    config = json.loads((folder / "config.json").read_text()) | {"eos_token_id": [2, 40, 41, 42]}
    vocabulary = read_vocabulary(folder, config)
    assert (vocabulary.special["eos"], vocabulary.special["eot"], vocabulary.special["eom"]) == (2, 40, 41)
    assert vocabulary.notes == [f"llama.cpp goes on where the model ends an answer with {vocabulary.tokens[42]}"]
