"""The words of a text in any script, to count and to compare answers."""

import unicodedata

import regex

# Scripts that put no space between words: each character, with its marks, counts as one.
_UNSPACED = r"[\p{Han}\p{Hiragana}\p{Katakana}\p{Thai}\p{Lao}\p{Khmer}\p{Myanmar}\p{Tibetan}]"
_WORD = regex.compile(rf"{_UNSPACED}\p{{M}}*|(?:(?!{_UNSPACED})[\p{{L}}\p{{M}}\p{{N}}])+")
FOREIGN_SHARE = 4  # in English, at most one word in this many has other letters than a to z: café, naïve


def words_of(text: str) -> list[str]:
    """Return the words of a text in lower case, without the marks between them."""
    return list(_WORD.findall(unicodedata.normalize("NFKC", text).casefold()))


def is_english(text: str) -> bool:
    """Return whether the words of a text are written as English words are, with a to z and digits."""
    words = words_of(text)
    return FOREIGN_SHARE * sum(not word.isascii() for word in words) <= len(words)
