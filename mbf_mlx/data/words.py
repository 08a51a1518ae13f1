"""The words of a text in any script, to count and to compare answers."""

import unicodedata

import regex

from mbf_mlx.data.row import reference_text
from mbf_mlx.data.task import Task

# Scripts that put no space between words: each character, with its marks, counts as one.
_UNSPACED = r"[\p{Han}\p{Hiragana}\p{Katakana}\p{Thai}\p{Lao}\p{Khmer}\p{Myanmar}\p{Tibetan}]"
_WORD = regex.compile(rf"{_UNSPACED}\p{{M}}*|(?:(?!{_UNSPACED})[\p{{L}}\p{{M}}\p{{N}}])+")
_MARK = regex.compile(r"[^\w\s]")
SHORT_ANSWER_WORDS = 8  # words and marks of the longest answer that is scored by exact match; some 16 tokens
FOREIGN_SHARE = 4  # in English, at most one word in this many has other letters than a to z: café, naïve


def words_of(text: str) -> list[str]:
    """Return the words of a text in lower case, without the marks between them."""
    return list(_WORD.findall(unicodedata.normalize("NFKC", text).casefold()))


def is_english(text: str) -> bool:
    """Return whether the words of a text are written as English words are, with a to z and digits."""
    words = words_of(text)
    return FOREIGN_SHARE * sum(not word.isascii() for word in words) <= len(words)


def metric_by_words(task: Task) -> str:
    """Return the metric that fits a task's test rows, by its words: there is no tokenizer in a plain install.

    A task of texts is scored by its loss, one of short answers by exact match, any other by ROUGE-L.
    """
    if not len(task.test) or task.test[0].kind == "text":
        return "loss"
    answers = (reference_text(row) for row in task.test)
    longest = max(len(words_of(answer)) + len(_MARK.findall(answer)) for answer in answers)
    return "exact_match" if longest <= SHORT_ANSWER_WORDS else "rouge_l"
