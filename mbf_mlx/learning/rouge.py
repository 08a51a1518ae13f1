"""ROUGE-L for every script: English as published, other texts by words and characters that Unicode knows.

The published tokenizer keeps a to z and 0 to 9 alone. To it a Russian sentence is empty, and scores 0 against itself.
"""

from collections.abc import Iterable
from functools import cached_property

from rouge_score.rouge_scorer import RougeScorer
from rouge_score.tokenizers import DefaultTokenizer

from mbf_mlx.data.words import is_english, words_of


class RougeL:
    """The ROUGE-L F-measure of an answer against the best of the right answers, with stemming as published suites do.

    A right answer in English is compared as published. Any other is compared by words of Unicode, and by characters
    where a script puts no spaces between words; its English words are stemmed, too. A right answer without letters and
    digits is compared by its signs.

    Source: Lin, ROUGE: A Package for Automatic Evaluation of Summaries, 2004; the package rouge-score.
    """

    def __call__(self, answer: str, rights: Iterable[str]) -> float:
        """Return the measure, in [0, 1]."""
        return max(self._measure(right, answer) for right in rights)

    def _measure(self, right: str, answer: str) -> float:
        scorer = self._published if words_of(right) and is_english(right) else self._unicode
        return float(scorer.score(right, answer)["rougeL"].fmeasure)

    @cached_property
    def _published(self) -> RougeScorer:
        return RougeScorer(["rougeL"], use_stemmer=True)

    @cached_property
    def _unicode(self) -> RougeScorer:
        return RougeScorer(["rougeL"], tokenizer=_UnicodeTokenizer())


class _UnicodeTokenizer:
    """A tokenizer of rouge-score's: words of letters, digits and their marks; characters of scripts without spaces."""

    def __init__(self) -> None:
        self._english = DefaultTokenizer(use_stemmer=True)

    def tokenize(self, text: str) -> list[str]:
        """Return the tokens of a text."""
        found = words_of(text) or [letter for letter in text if not letter.isspace()]
        return [self._english.tokenize(word)[0] if word.isascii() and word.isalnum() else word for word in found]
