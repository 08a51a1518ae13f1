"""SentencePiece vocabularies (Llama 2, Mistral) for GGUF: every piece with its score and type.

llama.cpp repeatedly joins the two neighbours whose joined piece has the best score. A `tokenizer.model` holds these
scores; if a folder has only tokenizer.json, the order of its merges is the order of the scores.
"""

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gguf

from mbf_mlx.errors import InputError, MissingPackageError

SPACE = "\u2581"  # a space inside a piece
BYTE = re.compile(r"<0x[0-9A-F]{2}>$")
Type = gguf.TokenType


@dataclass(frozen=True)
class Pieces:
    """The pieces of a vocabulary by id."""

    tokens: list[str]
    scores: list[float]
    types: list[int]
    prefix_scheme: str  # when text gets a space before it: "prepend", "always" (unless it has one), "first", "never"


def is_sentencepiece(folder: Path, document: dict[str, Any] | None) -> bool:
    """Return whether a folder's tokenizer is of this kind: a BPE that falls back to bytes."""
    if document is None:
        return (folder / "tokenizer.model").is_file()
    model = document.get("model", {})
    return model.get("type") == "BPE" and bool(model.get("byte_fallback"))


def read_pieces(folder: Path, document: dict[str, Any] | None, settings: dict[str, Any] | None) -> Pieces:
    """Return the pieces of a folder's vocabulary, without tokens that were added later.

    Args:
        folder: With tokenizer.model, tokenizer.json or both.
        document: The contents of tokenizer.json, if there is one.
        settings: The contents of tokenizer_config.json, if there is one.

    Raises:
        InputError: a tokenizer with which llama.cpp would split text in other ways than the model was trained on.
    """
    scheme = _prefix_scheme(document, settings or {}, folder)
    if not (folder / "tokenizer.model").is_file():
        assert document is not None
        return _from_merges(document["model"], scheme, folder)
    pieces = _from_model(folder / "tokenizer.model", scheme)
    if document is not None:
        _compare(pieces, document["model"]["vocab"], folder)
    return pieces


def _prefix_scheme(document: dict[str, Any] | None, settings: dict[str, Any], folder: Path) -> str:
    """Return when the tokenizer puts a space before text.

    transformers builds a `LlamaTokenizer` from the settings and ignores what tokenizer.json says about this.
    """
    if document is None or str(settings.get("tokenizer_class", "")).startswith("LlamaTokenizer"):
        if settings.get("add_prefix_space") is False:
            return "never"
        return "always" if settings.get("legacy") else "first"
    normalizer, pre_tokenizer = document.get("normalizer"), document.get("pre_tokenizer")
    steps = [_step(step) for step in _parts(normalizer, "normalizers") + _parts(pre_tokenizer, "pretokenizers")]
    known = {
        ("prepend", "replace"): "prepend",
        ("replace",): "never",
        ("always",): "always",
        ("first",): "first",
        ("never",): "never",
    }
    scheme = known.get(tuple(steps))
    if scheme is None:
        raise InputError(
            f"{folder}/tokenizer.json: expected text to be split as SentencePiece does, got\n  {normalizer}\n"
            f"  {pre_tokenizer}\nllama.cpp cannot do that, so no GGUF file is written; export mlx or peft"
        )
    return scheme


def _parts(step: dict[str, Any] | None, key: str) -> list[dict[str, Any]]:
    return [] if step is None else step[key] if step["type"] == "Sequence" else [step]


def _step(step: dict[str, Any]) -> str:
    match step:
        case {"type": "Prepend", "prepend": "\u2581"}:
            return "prepend"
        case {"type": "Replace", "pattern": {"String": " "}, "content": "\u2581"}:
            return "replace"
        case {"type": "Metaspace", "replacement": "\u2581", "prepend_scheme": str(scheme), "split": False}:
            return scheme
    return "unknown"


def _from_model(path: Path, scheme: str) -> Pieces:
    try:
        from google.protobuf.message import DecodeError
        from sentencepiece import sentencepiece_model_pb2
    except ImportError as error:
        message = f"{path}: reading it needs packages ({error.name} is missing): pip install sentencepiece protobuf"
        raise MissingPackageError(message) from None
    model = sentencepiece_model_pb2.ModelProto()
    try:
        model.ParseFromString(path.read_bytes())
    except DecodeError as error:
        raise InputError(f"{path}: expected a SentencePiece model: {error}") from error
    text = model.normalizer_spec
    wrong = {
        "a unigram model": model.trainer_spec.model_type != model.trainer_spec.BPE,
        f"text normalized by {text.name!r}": bool(text.precompiled_charsmap or text.normalization_rule_tsv),
        "repeated spaces squeezed into one": text.remove_extra_whitespaces,
    }
    if any(wrong.values()) or not model.pieces:
        found = ", ".join(what for what, holds in wrong.items() if holds) or "no pieces"
        raise InputError(
            f"{path}: expected a SentencePiece model of type BPE that leaves text as it is, got {found}; llama.cpp "
            "would split text into other tokens than the model was trained on, so no GGUF file is written; export mlx "
            "or peft"
        )
    # SentencePiece and GGUF number the types alike.
    tokens = [p.piece.replace(SPACE, " ") if p.type == Type.USER_DEFINED else p.piece for p in model.pieces]
    return Pieces(tokens, [p.score for p in model.pieces], [int(p.type) for p in model.pieces], scheme)


def _from_merges(model: dict[str, Any], scheme: str, folder: Path) -> Pieces:
    vocab = model["vocab"]
    tokens = [""] * (max(vocab.values()) + 1)
    for text, token_id in vocab.items():
        tokens[token_id] = text
    merges = [tuple(merge.split(" ")) if isinstance(merge, str) else tuple(merge) for merge in model["merges"]]
    ranks: dict[str, int] = {}
    for left, right in merges:
        ranks.setdefault(left + right, len(ranks))
    _check_merges(vocab, set(merges), ranks, folder)
    types = [int(Type.BYTE if BYTE.match(text) else Type.NORMAL if text else Type.UNUSED) for text in tokens]
    if model.get("unk_token") in vocab:
        types[vocab[model["unk_token"]]] = int(Type.UNKNOWN)
    # No merge makes single characters, nor tokens into which text is never merged.
    return Pieces(tokens, [-float(ranks.get(text, len(ranks))) for text in tokens], types, scheme)


def _check_merges(vocab: dict[str, int], merges: set[tuple[str, ...]], ranks: dict[str, int], folder: Path) -> None:
    """Check that any two pieces that make a merged piece can be joined, as SentencePiece does."""
    for text in ranks:
        for cut in range(1, len(text)):
            pair = (text[:cut], text[cut:])
            if pair not in merges and pair[0] in vocab and pair[1] in vocab:
                raise InputError(
                    f"{folder}/tokenizer.json: its merges are not those of a SentencePiece vocabulary: {pair[0]!r} and "
                    f"{pair[1]!r} are never joined; put the model's own tokenizer.model beside it"
                )


def _compare(pieces: Pieces, vocab: dict[str, int], folder: Path) -> None:
    for text, token_id in vocab.items():
        ours = pieces.tokens[token_id].replace(" ", SPACE) if token_id < len(pieces.tokens) else text
        if ours != text:
            raise InputError(
                f"{folder}: tokenizer.model and tokenizer.json are of different vocabularies: token {token_id} is "
                f"{ours!r} and {text!r}; remove the one that does not belong to the model"
            )
