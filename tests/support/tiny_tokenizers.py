"""Small tokenizers and chat templates that behave like those of the models people use, made here."""

import json

from tests.support.tiny_llama import TEXT

# What each template is like, and why it is here.
TEMPLATES = {
    # a role and a line end before a text, an end token and a line end after it
    "chatml": (
        "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    ),
    # writes the first token itself, trims texts, puts nothing after the end token
    "llama3": (
        "{{ bos_token }}{% for m in messages %}<|head|>{{ m.role }}<|/head|>\n\n{{ m.content | trim }}<|im_end|>"
        "{% endfor %}{% if add_generation_prompt %}<|head|>assistant<|/head|>\n\n{% endif %}"
    ),
    # asks for an answer with nothing; the answer brings its own spaces; refuses a system message
    "llama2": (
        "{% for m in messages %}{% if m.role == 'user' %}{{ bos_token }}[INST] {{ m.content | trim }} [/INST]"
        "{% elif m.role == 'assistant' %} {{ m.content | trim }} {{ eos_token }}"
        "{% else %}{{ raise_exception('only user and assistant roles are supported') }}{% endif %}{% endfor %}"
    ),
    # ends a turn with one token and a conversation with another
    "phi": (
        "{% for m in messages %}<|head|>{{ m.role }}<|/head|>\n{{ m.content }}<|im_end|>\n{% endfor %}"
        "{% if add_generation_prompt %}<|head|>assistant<|/head|>\n{% else %}<|endoftext|>{% endif %}"
    ),
    # writes an empty thought before the last answer, and leaves thoughts out of earlier ones
    "thinks when it ends": (
        "{% for m in messages %}<|im_start|>{{ m.role }}\n{% if m.role == 'assistant' and loop.last %}"
        "<think>\n\n</think>\n\n{% endif %}{{ m.content.split('</think>')[-1].lstrip('\n') }}<|im_end|>\n{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    ),
    # opens a thought where it asks for an answer, and shows no thoughts of answers that were given
    "thinks when it begins": (
        "{% for m in messages %}<|head|>{{ m.role }}<|/head|>{{ m.content.split('</think>')[-1] }}"
        "{% if m.role == 'assistant' %}<|im_end|>{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}<|head|>assistant<|/head|><think>\n{% endif %}"
    ),
    # has no token that ends a turn
    "words": (
        "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}{% if add_generation_prompt %}assistant: "
        "{% endif %}"
    ),
    # calls of tools instead of a text
    "tools": (
        "{% if tools %}<|im_start|>tools\n{{ tools | tojson }}<|im_end|>\n{% endif %}"
        "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}{% for call in m.tool_calls %}<call>"
        "{{ call.function.arguments | tojson }}</call>{% endfor %}<|im_end|>\n{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    ),
}
SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|head|>", "<|/head|>"]
STYLES = ("bytes", "sentencepiece", "sentencepiece once", "bytes trimmed")
# As Llama 3's tokenizer splits a text: a word with the space or sign before it, signs with the line ends after them.
WORDS = r"[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"


def make_tokenizer(style="bytes", template="chatml", *, bos=False, ends=("<|im_end|>",), special=()):
    """Return mlx-lm's wrapper around a BPE of 400 tokens.

    Args:
        style: "bytes", as SmolLM2's; "bytes trimmed", as Llama 3's, where one token may hold a full stop and line ends,
        and
            tokens are placed without the space before them; "sentencepiece", which puts a space before every piece
            that it is given, as Llama 2's; "sentencepiece once", which puts it before the first piece of a text alone.
        template: A name of TEMPLATES, or None.
        bos: Put <|im_start|> before every text, as Llama's tokenizers do.
        ends: Tokens at which generation stops, the first one the tokenizer's own end token.
        special: Special tokens besides SPECIAL.
    """
    from mlx_lm.tokenizer_utils import TokenizerWrapper
    from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast

    space, special = "▁", [*SPECIAL, *special]
    options = {"vocab_size": 400, "show_progress": False}
    texts = TEXT.splitlines()
    if style in ("bytes", "bytes trimmed"):
        inner = Tokenizer(models.BPE())
        inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        if style == "bytes trimmed":
            splits = pre_tokenizers.Split(Regex(WORDS), "isolated")
            inner.pre_tokenizer = pre_tokenizers.Sequence([splits, pre_tokenizers.ByteLevel(False, use_regex=False)])
            inner.post_processor = processors.ByteLevel(trim_offsets=True)
            texts = [TEXT.replace("\n", "\n\n"), "    if a:\n        b()\n" * 3, " yes no Hi It." * 9]
        inner.decoder = decoders.ByteLevel()
        alphabet = pre_tokenizers.ByteLevel.alphabet()
        trainer = trainers.BpeTrainer(special_tokens=special, initial_alphabet=alphabet, **options)
    else:
        inner = Tokenizer(models.BPE(byte_fallback=True, unk_token=SPECIAL[0], fuse_unk=True))
        if style == "sentencepiece":
            inner.normalizer = normalizers.Sequence([normalizers.Prepend(space), normalizers.Replace(" ", space)])
        else:
            inner.pre_tokenizer = pre_tokenizers.Metaspace(space, prepend_scheme="first", split=False)
        inner.decoder = decoders.Sequence([decoders.Replace(space, " "), decoders.ByteFallback(), decoders.Fuse()])
        trainer = trainers.BpeTrainer(
            special_tokens=[*special, *(f"<0x{byte:02X}>" for byte in range(256))], **{**options, "vocab_size": 600}
        )
    inner.train_from_iterator(texts, trainer)
    # The bytes of a character that has no token are tokens like any other, not special ones.
    document = json.loads(inner.to_str())
    document["added_tokens"] = [token for token in document["added_tokens"] if token["content"] in special]
    inner = Tokenizer.from_str(json.dumps(document))
    if bos:
        first = processors.TemplateProcessing(
            "<|im_start|> $A", None, [("<|im_start|>", special.index("<|im_start|>"))]
        )
        inner.post_processor = processors.Sequence([inner.post_processor, first]) if style == "bytes trimmed" else first
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=inner,
        bos_token="<|im_start|>",
        eos_token=ends[0],
        clean_up_tokenization_spaces=False,
        additional_special_tokens=special,
    )
    tokenizer.chat_template = TEMPLATES.get(template)
    return TokenizerWrapper(tokenizer, eos_token_ids=tokenizer.convert_tokens_to_ids(list(ends)))
