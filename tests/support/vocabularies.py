"""Real tokenizers of both kinds, trained on a few lines, in a model folder or a GGUF file."""

import json

import gguf
import numpy as np

from mbf_mlx.export.gguf import vocabulary as gguf_vocab
from tests.support.mixed_text import mixed_rows
from tests.support.tiny_llama import TEXT

LLAMA3 = gguf_vocab.LLAMA3.replace("{contractions}", gguf_vocab.CONTRACTIONS[0])
QWEN2 = gguf_vocab.QWEN2.replace("{contractions}", gguf_vocab.CONTRACTIONS[0])
BYTE_LEVEL = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
PLAIN_BYTES = {**BYTE_LEVEL, "use_regex": False}
PIECES = 1300  # of SentencePiece vocabularies
DIGITS = {"type": "Digits", "individual_digits": True}


def split(regex, **changes):
    return {"type": "Split", "pattern": {"Regex": regex}, "behavior": "Isolated", "invert": False, **changes}


def sequence(*steps):
    return {"type": "Sequence", "pretokenizers": list(steps)}


def train_bpe(folder, pre_tokenizer=BYTE_LEVEL, *, normalizer=None, ignore_merges=False, size=400, text=TEXT):
    """Write tokenizer.json of a real byte-level BPE with a given pre-tokenizer; return it as JSON."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE(ignore_merges=ignore_merges))
    tokenizer.decoder = decoders.ByteLevel()
    frame = json.loads(tokenizer.to_str())
    frame["pre_tokenizer"], frame["normalizer"] = pre_tokenizer, normalizer
    tokenizer = Tokenizer.from_str(json.dumps(frame))
    trainer = trainers.BpeTrainer(
        vocab_size=size,
        special_tokens=["<|endoftext|>", "<|im_start|>", "<|im_end|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(text.splitlines(keepends=True), trainer)
    folder.mkdir(exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(
        json.dumps({"bos_token": "<|im_start|>", "eos_token": "<|im_end|>", "unk_token": "<|endoftext|>"})
    )
    return json.loads((folder / "tokenizer.json").read_text())


def change(folder, name="tokenizer.json", **changes):
    path = folder / name
    document = json.loads(path.read_text()) if path.exists() else {}
    path.write_text(json.dumps({**document, **changes}))


def train_sentencepiece(folder, **changes):
    """Write tokenizer.model of a real SentencePiece BPE, as Llama 2's is made."""
    import sentencepiece

    settings = {
        "model_type": "bpe",
        "byte_fallback": True,
        "normalization_rule_name": "identity",
        "remove_extra_whitespaces": False,
        "character_coverage": 1.0,
        "split_digits": True,
        "allow_whitespace_only_pieces": True,
        **changes,
    }
    folder.mkdir(exist_ok=True)
    rows = [line for row in mixed_rows(seed=3) if row.isascii() for line in row.splitlines() if line]
    with open(folder / "tokenizer.model", "wb") as file:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter([*TEXT.splitlines(), *rows]),
            model_writer=file,
            vocab_size=PIECES,
            minloglevel=2,
            **settings,
        )
    return sentencepiece.SentencePieceProcessor(model_file=str(folder / "tokenizer.model"))


def write_vocabulary(vocabulary, path):
    """Write a GGUF file that holds a vocabulary and one tensor of no meaning."""
    writer = gguf.GGUFWriter(path, "llama")
    vocabulary.add_to(writer)
    writer.add_tensor("output_norm.weight", np.zeros(32, np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path
