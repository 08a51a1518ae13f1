"""A model folder's tokenizer as a GGUF vocabulary, so that llama.cpp splits text into the same tokens as we do.

There are two families. Byte-level BPE (`gpt2`: Llama 3, SmolLM, Qwen) splits text by a pattern before it merges. GGUF
names that pattern and does not store it; we find the name from what the pre-tokenizer in tokenizer.json does and never
guess it. SentencePiece BPE (`llama`: Llama 2, Mistral) joins the piece with the best score first; sentencepiece.py
reads it.
"""

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import gguf

from mbf_mlx.errors import InputError
from mbf_mlx.export.gguf.sentencepiece import is_sentencepiece, read_pieces

# Byte-level pre-tokenizers as tokenizer.json writes them. `{contractions}` is either of these two spellings, which
# match the same text.
CONTRACTIONS = ("(?i:'s|'t|'re|'ve|'m|'ll|'d)", "(?:'[sS]|'[tT]|'[rR][eE]|'[vV][eE]|'[mM]|'[lL][lL]|'[dD])")
_WORDS = r"{contractions}|[^\r\n\p{L}\p{N}]?\p{L}+|"
_REST = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
LLAMA3 = _WORDS + r"\p{N}{1,3}" + _REST
QWEN2 = _WORDS + r"\p{N}" + _REST
_CASED = r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+"
_TITLED = r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*"
TEKKEN = _CASED + "|" + _TITLED + r"|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
# "gpt2" is ByteLevel's own pattern (use_regex); "digits" splits off each digit before it.
# (steps, whether whole words are looked up before merging) -> llama.cpp's name for the same
PRE_TOKENIZERS = {
    ((("split", LLAMA3),), True): "llama-bpe",
    ((("split", LLAMA3),), False): "smaug-bpe",  # the same pattern; llama-bpe would look whole words up
    ((("split", QWEN2),), False): "qwen2",
    ((("split", TEKKEN),), True): "tekken",
    ((("gpt2",),), False): "gpt-2",
    ((("digits",), ("gpt2",)), False): "smollm",
}
NOTES = {"tekken": "llama.cpp splits words with combining marks (Hindi, Thai and others) in another way"}
END_TEXTS = set("<|eot_id|> <|im_end|> <|end|> <|endoftext|> <|end_of_text|> <|eom_id|> </s> <end_of_turn>".split())
END_TEXTS |= {"<eos>", "<EOT>"}  # llama.cpp stops at any of these that a vocabulary has
Type = gguf.TokenType


@dataclass
class Vocabulary:
    """The tokenizer of a GGUF file."""

    model: str  # tokenizer.ggml.model: "gpt2" or "llama"
    pre: str  # tokenizer.ggml.pre
    tokens: list[str]
    types: list[int]
    merges: list[str] | None = None
    scores: list[float] | None = None
    special: dict[str, int] = field(default_factory=dict)  # "bos", "eos", "eot", "eom", "unk", "pad" -> id
    add_bos: bool = False
    add_eos: bool = False
    add_space_prefix: bool = False
    chat_template: Any = None
    notes: list[str] = field(default_factory=list)  # where llama.cpp differs from this tokenizer

    def add_to(self, writer: gguf.GGUFWriter) -> None:
        """Add the tokenizer to a file's settings."""
        writer.add_tokenizer_model(self.model)
        writer.add_tokenizer_pre(self.pre)
        writer.add_token_list(self.tokens)
        writer.add_token_types(self.types)
        if self.scores is not None:
            writer.add_token_scores(self.scores)
        if self.merges is not None:
            writer.add_token_merges(self.merges)
        add = {
            "bos": writer.add_bos_token_id,
            "eos": writer.add_eos_token_id,
            "eot": writer.add_eot_token_id,
            "eom": writer.add_eom_token_id,
            "unk": writer.add_unk_token_id,
            "pad": writer.add_pad_token_id,
        }
        for kind, token_id in self.special.items():
            add[kind](token_id)
        writer.add_add_bos_token(self.add_bos)
        writer.add_add_eos_token(self.add_eos)
        writer.add_add_space_prefix(self.add_space_prefix)
        if self.chat_template is not None:
            writer.add_chat_template(self.chat_template)


def read_vocabulary(folder: Path, config: dict[str, Any], carried: str | None = None, raw: bool = False) -> Vocabulary:
    """Return the vocabulary of a model folder.

    Args:
        folder: With tokenizer.json, or the tokenizer.model of a SentencePiece vocabulary.
        config: The folder's config.json. Its vocab_size is the number of tokens; its ids and those of
            generation_config.json replace missing ones.
        carried: The chat template that the export carries in place of the folder's own.
        raw: Whether prompts are raw text, to which the carried template adds nothing.

    Raises:
        InputError: no tokenizer, or one with which llama.cpp would split text in other ways than in training.
    """
    document, settings = read_json(folder / "tokenizer.json"), read_json(folder / "tokenizer_config.json")
    size = config["vocab_size"]
    if is_sentencepiece(folder, document):
        pieces = read_pieces(folder, document, settings)
        vocabulary = Vocabulary("llama", "default", pieces.tokens, pieces.types, scores=pieces.scores)
        scheme = pieces.prefix_scheme
    elif document is None:
        raise InputError(f"{folder}: expected tokenizer.json or tokenizer.model, got neither")
    else:
        vocabulary, scheme = _byte_level(document, folder), "never"
    _add_tokens(vocabulary, _added_tokens(document, settings, folder))
    _fit(vocabulary, size)
    _find_special(vocabulary, settings or {}, {**config, **(read_json(folder / "generation_config.json") or {})})
    _find_added_ends(vocabulary, document, settings or {}, folder)
    own = read_chat_template(folder, settings)
    vocabulary.chat_template = own if carried is None else carried
    # llama.cpp also puts the space after special tokens. Text from a chat template starts with a special token and had
    # no space in training under the "first" scheme; raw text had one at its beginning.
    vocabulary.add_space_prefix = scheme in ("prepend", "always") or (scheme == "first" and (raw or not own))
    if vocabulary.add_space_prefix and scheme != "prepend":
        vocabulary.notes.append("if a text begins with a space, llama.cpp adds another one and this tokenizer does not")
    bos = vocabulary.tokens[vocabulary.special["bos"]] if vocabulary.add_bos else ""
    if vocabulary.chat_template and not any(word in str(vocabulary.chat_template) for word in ("bos_token", bos)):
        vocabulary.notes.append(f"llama.cpp puts {bos} before every text, and the chat template does not")
    return vocabulary


def read_json(path: Path) -> dict[str, Any] | None:
    """Return the JSON object in a file, or None if there is no such file.

    Raises:
        InputError: the file holds something else.
    """
    if not path.is_file():
        return None
    try:
        document = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise InputError(f"{path}: not JSON: {error}") from error
    if not isinstance(document, dict):
        raise InputError(f"{path}: expected a JSON object, got {type(document).__name__}")
    return document


def _byte_level(document: dict[str, Any], folder: Path) -> Vocabulary:
    """Return the vocabulary of a byte-level BPE tokenizer, without its added tokens."""
    model, normalizer = document["model"], document.get("normalizer")
    pre = find_pre_tokenizer(document, folder / "tokenizer.json")
    tokens, types = [""] * (max(model["vocab"].values()) + 1), [int(Type.UNUSED)] * (max(model["vocab"].values()) + 1)
    for token, token_id in model["vocab"].items():
        tokens[token_id], types[token_id] = token, int(Type.NORMAL)
    merges = [merge if isinstance(merge, str) else " ".join(merge) for merge in model["merges"]]
    notes = [NOTES[pre]] if pre in NOTES else []
    if normalizer:
        notes.append(
            "this tokenizer converts text to Unicode's NFC form first, and llama.cpp does not: text whose accents are "
            "separate characters gets other tokens"
        )
    return Vocabulary("gpt2", pre, tokens, types, merges=merges, notes=notes)


def find_pre_tokenizer(document: dict[str, Any], where: Path) -> str:
    """Return llama.cpp's name for what a byte-level tokenizer.json does to text before it merges.

    Raises:
        InputError: llama.cpp has no name for it that we know.
    """
    model, normalizer = document["model"], document.get("normalizer")
    steps = _steps(document.get("pre_tokenizer"))
    plain = not any(model.get(key) for key in ("dropout", "continuing_subword_prefix", "end_of_word_suffix"))
    name = PRE_TOKENIZERS.get((steps, bool(model.get("ignore_merges")))) if steps else None
    if name is None or not plain or normalizer not in (None, {"type": "NFC"}):
        raise InputError(
            f"{where}: expected a pre-tokenizer that llama.cpp also has ({', '.join(PRE_TOKENIZERS.values())}), got\n"
            f"  normalizer {json.dumps(normalizer)}, whole words first: {bool(model.get('ignore_merges'))}\n"
            f"  {json.dumps(document.get('pre_tokenizer'))}\n"
            "with a guessed one, text would become other tokens than the model was trained on, so no GGUF file is "
            "written; export mlx or peft, or gguf-adapter to use with a GGUF file of the base that you trust"
        )
    return name


def _steps(pre_tokenizer: dict[str, Any] | None) -> tuple[tuple[str, ...], ...] | None:
    """Return the steps of a pre-tokenizer in the words of PRE_TOKENIZERS; None if one is unknown."""
    if pre_tokenizer is None:
        return None
    parts = pre_tokenizer["pretokenizers"] if pre_tokenizer["type"] == "Sequence" else [pre_tokenizer]
    steps: list[tuple[str, ...]] = []
    for part in parts:
        match part:
            case {"type": "Digits", "individual_digits": True}:
                steps.append(("digits",))
            case {"type": "Split", "pattern": {"Regex": regex}, "behavior": "Isolated", "invert": False}:
                steps.append(("split", _spelled(regex)))
            case {"type": "ByteLevel", "add_prefix_space": False} if part is parts[-1]:
                # `use_regex` is on if an older file does not say.
                steps += [("gpt2",)] if part.get("use_regex", True) else []
            case _:
                return None
    return tuple(steps) if parts and parts[-1]["type"] == "ByteLevel" else None


def _spelled(regex: str) -> str:
    for contractions in CONTRACTIONS:
        regex = regex.replace(contractions, "{contractions}")
    return regex


def _added_tokens(
    document: dict[str, Any] | None, settings: dict[str, Any] | None, folder: Path
) -> list[tuple[int, str, bool]]:
    """Return (id, text, special) of the tokens that are found in text before it is split."""
    if document is not None:
        return [(token["id"], token["content"], token["special"]) for token in document.get("added_tokens", [])]
    added = {token_id: (text, False) for text, token_id in (read_json(folder / "added_tokens.json") or {}).items()}
    for token_id, token in (settings or {}).get("added_tokens_decoder", {}).items():
        added[int(token_id)] = (token["content"], bool(token.get("special")))
    return [(token_id, text, special) for token_id, (text, special) in sorted(added.items())]


def _add_tokens(vocabulary: Vocabulary, added: list[tuple[int, str, bool]]) -> None:
    for token_id, text, special in added:
        missing = token_id + 1 - len(vocabulary.tokens)
        vocabulary.tokens += [""] * missing
        vocabulary.types += [int(Type.UNUSED)] * missing
        if vocabulary.scores is not None:
            vocabulary.scores += [-1000.0] * missing
            text = text if special else text.replace("\u2581", " ")  # llama.cpp looks for it in the text as typed
        if vocabulary.types[token_id] != Type.UNKNOWN:
            vocabulary.types[token_id] = int(Type.CONTROL if special else Type.USER_DEFINED)
        vocabulary.tokens[token_id] = text


def _fit(vocabulary: Vocabulary, size: int) -> None:
    """Cut or pad the vocabulary to the number of rows of the model's embedding."""
    if len(vocabulary.tokens) > size:
        lost = [text for text in vocabulary.tokens[size:] if text]
        vocabulary.notes.append(f"the model has no embedding for {lost}; the file leaves these tokens out")
    missing = max(size - len(vocabulary.tokens), 0)
    vocabulary.tokens = [*vocabulary.tokens, *[""] * missing][:size]
    vocabulary.types = [*vocabulary.types, *[int(Type.UNUSED)] * missing][:size]
    if vocabulary.scores is not None:
        vocabulary.scores = [*vocabulary.scores, *[-1000.0] * missing][:size]
    # llama.cpp refuses a text that occurs twice, and an empty one is no token.
    vocabulary.tokens = [text or f"[PAD{token_id}]" for token_id, text in enumerate(vocabulary.tokens)]


def _find_special(vocabulary: Vocabulary, settings: dict[str, Any], config: dict[str, Any]) -> None:
    """Find the ids of the special tokens: from the tokenizer's settings, or else from the model's configs."""
    ids = {text: token_id for token_id, text in enumerate(vocabulary.tokens)}
    # A SentencePiece vocabulary without settings has the names of Llama's.
    settings = settings or (
        {} if vocabulary.merges else {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    )
    for kind in ("bos", "eos", "unk", "pad"):
        text = settings.get(f"{kind}_token")
        text = text.get("content") if isinstance(text, dict) else text
        token_id = ids.get(text) if isinstance(text, str) else _first(config.get(f"{kind}_token_id"))
        if token_id is not None and 0 <= token_id < len(vocabulary.tokens):
            vocabulary.special[kind] = token_id
    # A model may have several end tokens; llama.cpp knows most by their text, and two more by their ids.
    ends = config.get("eos_token_id")
    ends = ends if isinstance(ends, list) else [ends] if isinstance(ends, int) else []
    others = [end for end in ends if end != vocabulary.special.get("eos") and end < len(vocabulary.tokens)]
    unknown = [end for end in others if vocabulary.tokens[end] not in END_TEXTS]
    vocabulary.special |= dict(zip(("eot", "eom"), unknown))
    if lost := [vocabulary.tokens[end] for end in unknown[2:]]:
        vocabulary.notes.append(f"llama.cpp goes on where the model ends an answer with {', '.join(lost)}")


def _first(token_id: Any) -> int | None:
    if isinstance(token_id, list):
        token_id = token_id[0] if token_id else None
    return token_id if isinstance(token_id, int) else None


def _find_added_ends(
    vocabulary: Vocabulary, document: dict[str, Any] | None, settings: dict[str, Any], folder: Path
) -> None:
    """Find out whether the tokenizer adds tokens before and after every text."""
    processor = (document or {}).get("post_processor") or {}
    processors = processor.get("processors", [processor] if processor else [])
    templates = [part["single"] for part in processors if part["type"] == "TemplateProcessing"]
    names = [part["SpecialToken"]["id"] if "SpecialToken" in part else None for part in (templates or [[]])[0]]
    text_at = names.index(None) if None in names else 0
    before, after = names[:text_at], names[text_at + 1 :]
    bos, eos = vocabulary.special.get("bos"), vocabulary.special.get("eos")
    expected = {"bos": [vocabulary.tokens[bos]] if bos is not None else [], "eos": []}
    expected["eos"] = [vocabulary.tokens[eos]] if eos is not None else []
    adds = {}
    for kind, found in (("bos", before), ("eos", after)):
        if found and found != expected[kind]:
            raise InputError(
                f"{folder}/tokenizer.json: post_processor: expected {expected[kind]} or nothing as {kind}, got {found}"
                "; a GGUF file cannot express this, and llama.cpp would read other tokens than the model was trained on"
            )
        stated = settings.get(f"add_{kind}_token")
        wanted = stated if isinstance(stated, bool) else bool(found) or (document is None and kind == "bos")
        adds[kind] = wanted and bool(expected[kind])
    if document is not None and (around := _added_around(folder)) is not None:
        # Some classes of transformers follow tokenizer_config.json, others the post-processor: what they do decides.
        adds = {"bos": bos is not None and around[0] == [bos], "eos": eos is not None and around[1] == [eos]}
    vocabulary.add_bos, vocabulary.add_eos = adds["bos"], adds["eos"]


def _added_around(folder: Path) -> tuple[list[int], list[int]] | None:
    """Return the tokens that transformers puts before and behind a text; None where it cannot load the tokenizer."""
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
        bare, whole = tokenizer("a", add_special_tokens=False)["input_ids"], tokenizer("a")["input_ids"]
    except Exception:  # the folder lacks what its class needs, or the tokenizers library raises plain Exception
        return None
    for start in range(len(whole) - len(bare) + 1):
        if whole[start : start + len(bare)] == bare:
            return whole[:start], whole[start + len(bare) :]
    return None


def read_chat_template(folder: Path, settings: dict[str, Any] | None) -> str | list[dict[str, str]] | None:
    """Return the chat template or a list of named ones, if there is any; chat_template.jinja takes precedence."""
    path = folder / "chat_template.jinja"
    if path.is_file():
        return path.read_text(encoding="utf-8")
    template: str | list[dict[str, str]] | None = (settings or {}).get("chat_template")
    return template
