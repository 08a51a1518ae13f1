"""The vocabulary of a GGUF file as the tokenizer files that mlx-lm and transformers read.

There are two kinds of vocabulary: byte-level BPE ("gpt2": tokens, merges and the name of a pre-tokenizer) and
SentencePiece BPE ("llama": tokens with scores). A pre-tokenizer that is not listed here is refused: a wrong one would
still give tokens, but not those that the model was trained on.
"""

import importlib.util
import json
from pathlib import Path
from typing import Any, NamedTuple

from mbf_mlx.device.backend import install_hint
from mbf_mlx.errors import InputError, MissingPackageError
from mbf_mlx.files.documents import first_repeated

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = 1, 2, 3, 4, 5, 6  # tokenizer.ggml.token_type
# Tokens that end an answer in the chat formats of Llama-family models; a file names only one `eos`.
END_TOKENS = ("<|eot_id|>", "<|eom_id|>", "<|end_of_text|>", "<|im_end|>", "<|endoftext|>", "</s>")
_WORDS = r"[^\r\n\p{L}\p{N}]?\p{L}+"
_REST = r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_CONTRACTIONS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"


MAX_PIECE = 512  # letters of a SentencePiece token; every place in one may be a merge; SentencePiece itself makes 16


class _Pre(NamedTuple):
    """How a byte-level BPE splits text before its merges."""

    pattern: str | None = None  # a regular expression; None is GPT-2's
    digits: bool = False  # split off every digit first
    ignore_merges: bool = False  # a piece that is a token is never split further
    add_bos: bool = False  # texts begin with `bos`, if the file does not say
    nfc: bool = False  # Unicode's composed form first


_LLAMA3 = _Pre(rf"{_CONTRACTIONS}|{_WORDS}|\p{{N}}{{1,3}}|{_REST}", ignore_merges=True, add_bos=True)
PRE_TOKENIZERS = {
    "gpt-2": _Pre(),
    "smollm": _Pre(digits=True),
    "llama-bpe": _LLAMA3,
    "llama3": _LLAMA3,
    "llama-v3": _LLAMA3,
    "qwen2": _Pre(rf"{_CONTRACTIONS}|{_WORDS}|\p{{N}}|{_REST}", nfc=True),
}


class Vocabulary(NamedTuple):
    """The vocabulary of a GGUF file."""

    where: Path
    tokens: list[str]
    types: list[int]
    settings: dict[str, Any]

    def special(self, name: str) -> int | None:
        """Return the id of `bos`, `eos` and so on; None if the file names none."""
        token = self.settings.get(f"tokenizer.ggml.{name}_token_id")
        if token is not None and not (isinstance(token, int) and 0 <= token < len(self.tokens)):
            raise InputError(
                f"{self.where}: tokenizer.ggml.{name}_token_id: expected 0 to {len(self.tokens) - 1}, got {token!r}"
            )
        return token

    def ends(self) -> list[int]:
        """Return the ids that end an answer; the file's own `eos` comes first."""
        named = [self.special(name) for name in ("eos", "eot", "eom")]
        known = [place for place, text in enumerate(self.tokens) if self.types[place] == CONTROL and text in END_TOKENS]
        return list(dict.fromkeys([token for token in named if token is not None] + known))


def read_vocabulary(settings: dict[str, Any], where: Path) -> Vocabulary:
    """Return the checked vocabulary of a GGUF file, without the padding at its end.

    Raises:
        InputError: no vocabulary, or one that contradicts itself.
    """
    tokens = settings.get("tokenizer.ggml.tokens")
    if not isinstance(tokens, list) or not tokens or not isinstance(tokens[0], str):
        raise InputError(f"{where}: tokenizer.ggml.tokens: expected a list of tokens; the file has no tokenizer")
    types = [int(kind) for kind in settings.get("tokenizer.ggml.token_type", [NORMAL] * len(tokens))]
    if len(types) != len(tokens):
        raise InputError(f"{where}: expected a type for each of {len(tokens)} tokens, got {len(types)}")
    used = len(tokens)
    while used and types[used - 1] == UNUSED:
        used -= 1
    if (twice := first_repeated(tokens[:used])) is not None:
        raise InputError(f"{where}: tokenizer.ggml.tokens: {twice!r} is there twice")
    return Vocabulary(where, tokens[:used], types[:used], settings)


def write_tokenizer(vocabulary: Vocabulary, folder: Path, context: int) -> None:
    """Write tokenizer.json, tokenizer_config.json and generation_config.json.

    Args:
        vocabulary: The model's vocabulary.
        folder: The folder to write into.
        context: The model's context length, in tokens.

    Raises:
        InputError: an unknown kind of vocabulary or pre-tokenizer.
    """
    if importlib.util.find_spec("tokenizers") is None:
        raise MissingPackageError(f"building a tokenizer needs the package tokenizers; {install_hint()}")
    kind = vocabulary.settings.get("tokenizer.ggml.model")
    builders = {"gpt2": _byte_level, "llama": _sentencepiece}
    if kind not in builders:
        raise InputError(
            f"{vocabulary.where}: tokenizer.ggml.model: expected gpt2 (byte-level BPE) or llama (SentencePiece), "
            f"got {kind!r}\nhint: use the model's original folder, with its own tokenizer files"
        )
    tokenizer, add_bos = builders[kind](vocabulary)
    _add_special_tokens(tokenizer, vocabulary, add_bos)
    tokenizer.save(str(folder / "tokenizer.json"))
    names = {"bos": "bos_token", "eos": "eos_token", "unknown": "unk_token", "padding": "pad_token"}
    ids = {key: vocabulary.special(name) for name, key in names.items()}
    config: dict[str, Any] = {key: vocabulary.tokens[token] for key, token in ids.items() if token is not None}
    config |= {"clean_up_tokenization_spaces": False, "tokenizer_class": "PreTrainedTokenizerFast"}
    config["model_max_length"] = context
    if isinstance(template := vocabulary.settings.get("tokenizer.chat_template"), str):
        config["chat_template"] = template
    _write_json(folder / "tokenizer_config.json", config)
    ends = vocabulary.ends()
    generation: dict[str, Any] = {f"{key}_id": token for key, token in ids.items() if key in ("bos_token", "pad_token")}
    generation["eos_token_id"] = ends if len(ends) > 1 else next(iter(ends), None)
    _write_json(
        folder / "generation_config.json", {key: found for key, found in generation.items() if found is not None}
    )


def _write_json(path: Path, document: dict[str, Any]) -> None:
    path.write_text(json.dumps(document, indent=2, ensure_ascii=False, sort_keys=True) + "\n", encoding="utf-8")


def _byte_level(vocabulary: Vocabulary) -> tuple[Any, bool]:
    """Return a byte-level BPE without special tokens, and whether texts begin with `bos` if the file does not say."""
    from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers

    where, name = vocabulary.where, vocabulary.settings.get("tokenizer.ggml.pre", "default")
    if name not in PRE_TOKENIZERS:
        raise InputError(
            f"{where}: tokenizer.ggml.pre: expected one of {', '.join(PRE_TOKENIZERS)}, got {name!r}\n"
            "hint: use the model's original folder, with its own tokenizer files"
        )
    pre = PRE_TOKENIZERS[name]
    ids = {text: place for place, text in enumerate(vocabulary.tokens)}
    merges = []
    for line in vocabulary.settings.get("tokenizer.ggml.merges", []):
        left, _, right = line.partition(" ") if isinstance(line, str) else ("", "", "")
        if left not in ids or right not in ids or left + right not in ids:
            raise InputError(f"{where}: tokenizer.ggml.merges: {line!r} is no pair of tokens that make a third")
        merges.append((left, right))
    if not merges:
        raise InputError(f"{where}: tokenizer.ggml.merges: missing; a byte-level BPE cannot split text without them")
    tokenizer = Tokenizer(models.BPE(vocab=ids, merges=merges, ignore_merges=pre.ignore_merges))
    if pre.nfc:
        tokenizer.normalizer = normalizers.NFC()
    steps: list[Any] = [pre_tokenizers.Digits(individual_digits=True)] if pre.digits else []
    if pre.pattern:
        steps.append(pre_tokenizers.Split(Regex(pre.pattern), behavior="isolated"))
    steps.append(pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=pre.pattern is None))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(steps)
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer, pre.add_bos


def _sentencepiece(vocabulary: Vocabulary) -> tuple[Any, bool]:
    """Return a SentencePiece BPE without special tokens, and True: texts begin with `bos` if the file does not say."""
    from tokenizers import Tokenizer, decoders, models, normalizers

    where, settings = vocabulary.where, vocabulary.settings
    if settings.get("tokenizer.ggml.remove_extra_whitespaces"):
        raise InputError(f"{where}: its tokenizer drops repeated spaces, which no Llama does; we cannot convert it")
    unknown = next((place for place, kind in enumerate(vocabulary.types) if kind == UNKNOWN), None)
    if unknown is None or vocabulary.types.count(BYTE) not in (0, 256):
        raise InputError(
            f"{where}: expected an unknown token and 256 or no byte tokens in its SentencePiece vocabulary"
        )
    tokenizer = Tokenizer(
        models.BPE(
            vocab={text: place for place, text in enumerate(vocabulary.tokens)},
            merges=_merges_of_scores(vocabulary),
            unk_token=vocabulary.tokens[unknown],
            fuse_unk=True,
            byte_fallback=BYTE in vocabulary.types,
        )
    )
    prefix = settings.get("tokenizer.ggml.add_space_prefix", True)
    spaces = normalizers.Replace(" ", "▁")
    tokenizer.normalizer = (
        normalizers.Sequence([normalizers.Prepend("▁"), spaces]) if prefix else normalizers.Sequence([spaces])
    )
    back = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    tokenizer.decoder = decoders.Sequence(back + ([decoders.Strip(" ", 1, 0)] if prefix else []))
    return tokenizer, True


def _merges_of_scores(vocabulary: Vocabulary) -> list[tuple[str, str]]:
    """Return BPE merges, in order, that join what SentencePiece joins: the pair whose union has the highest score."""
    scores = vocabulary.settings.get("tokenizer.ggml.scores")
    if scores is None or len(scores) < len(vocabulary.tokens):
        raise InputError(f"{vocabulary.where}: tokenizer.ggml.scores: expected a score for each token")
    ids = {
        text: place for place, text in enumerate(vocabulary.tokens) if vocabulary.types[place] in (NORMAL, USER_DEFINED)
    }
    lengths = {len(text) for text in ids}
    if max(lengths, default=0) > MAX_PIECE:
        raise InputError(
            f"{vocabulary.where}: tokenizer.ggml.tokens: expected tokens of at most {MAX_PIECE} letters, got one of"
            f" {max(lengths):,}"
        )
    merges = []
    for text, place in ids.items():
        for cut in range(1, len(text)):
            if cut not in lengths or len(text) - cut not in lengths:
                continue
            left, right = ids.get(text[:cut]), ids.get(text[cut:])
            if left is not None and right is not None:
                merges.append((-float(scores[place]), place, left, right))
    merges.sort()
    return [(vocabulary.tokens[left], vocabulary.tokens[right]) for _, _, left, right in merges]


def _add_special_tokens(tokenizer: Any, vocabulary: Vocabulary, add_bos: bool) -> None:
    from tokenizers import AddedToken, processors

    for place, (text, kind) in enumerate(zip(vocabulary.tokens, vocabulary.types, strict=True)):
        if kind in (CONTROL, UNKNOWN):
            tokenizer.add_special_tokens([AddedToken(text, normalized=False, special=True)])
        elif kind == USER_DEFINED:
            tokenizer.add_tokens([AddedToken(text, normalized=False, special=False)])
        if kind in (CONTROL, UNKNOWN, USER_DEFINED) and tokenizer.token_to_id(text) != place:
            raise InputError(f"{vocabulary.where}: token {text!r} has the same text as another one")
    ends = []
    for name, default in (("bos", add_bos), ("eos", False)):
        token = vocabulary.special(name)
        wanted = vocabulary.settings.get(f"tokenizer.ggml.add_{name}_token", default)
        ends.append((vocabulary.tokens[token], token) if wanted and token is not None else None)
    if any(ends):
        bos, eos = ends
        single = ([bos[0]] if bos else []) + ["$A"] + ([eos[0]] if eos else [])
        pair = [piece.replace("$A", "$B") for piece in single]
        tokenizer.post_processor = processors.TemplateProcessing(
            single=single, pair=single + [f"{piece}:1" for piece in pair], special_tokens=[end for end in ends if end]
        )
