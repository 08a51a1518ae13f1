"""ROUGE-L: English as the published package has it, and every other script by its words or characters."""

import pytest
from rouge_score.rouge_scorer import RougeScorer

from mbf_mlx.learning.rouge import RougeL

SENTENCES = {
    "Russian": "Модель помнит всё, чему её учили раньше.",
    "Chinese": "模型记得以前学过的一切。",
    "Japanese": "モデルは以前に学んだことをすべて覚えています。",
    "Korean": "모델은 이전에 배운 모든 것을 기억합니다.",
    "Thai": "แบบจำลองจำทุกสิ่งที่เรียนมาก่อนได้",
    "Arabic": "يتذكر النموذج كل ما تعلمه من قبل.",
    "Hindi": "मॉडल को वह सब याद है जो उसने पहले सीखा था।",
    "French": "Où êtes-vous allé cet été ?",
    "signs": "→ ✓ ✗",
    "emoji": "👍🏽",
    "ASCII signs": "!!! ???",
    "Greek": "Το τρένο άργησε είκοσι λεπτά.",  # noqa: RUF001
    "Vietnamese": "Chuyến tàu đến muộn hai mươi phút.",
    "Polish": "Żółć gęślą jaźń źdźbło.",
    "Chinese with code": "使用 pip install numpy",
}


@pytest.mark.parametrize("script", SENTENCES)
def test_a_sentence_learned_by_heart_scores_100_percent_in_every_script(script):
    assert RougeL()(SENTENCES[script], [SENTENCES[script]]) == 1.0


@pytest.mark.parametrize("script", SENTENCES)
def test_an_answer_in_another_language_scores_nothing(script):
    assert RougeL()("somewhere else", [SENTENCES[script]]) == 0.0


@pytest.mark.parametrize(
    ("right", "answer", "expected"),
    [
        # words: 4 of 4 are in a row of 4, of an answer of 5
        ("Мы учим новую модель", "Мы учим новую большую модель", 2 * 4 / 9),
        # characters: 今天 and 好 of 5 against 5
        ("今天天气好", "今天很好啊", 2 * 3 / 10),
        # one word of Thai is several characters; marks belong to their character
        ("กำ", "กำ", 1.0),
        # a letter and its accent are one letter, composed or not; case does not count
        ("CAFÉ noir", "cafe\u0301 noir", 1.0),
        # English words in another script's answer are stemmed as English ones are
        ("Слово learned", "слово learning", 1.0),
    ],
)
def test_words_and_characters_are_compared_in_their_order(right, answer, expected):
    assert RougeL()(answer, [right]) == pytest.approx(expected)


def test_english_scores_are_those_of_the_published_package():
    published = RougeScorer(["rougeL"], use_stemmer=True)
    pairs = [
        ("The cats were sitting on the mat.", "A cat sat on the mats"),
        ("learned 3 tasks in a row", "it learns 3 tasks, in one row"),
        ("yes", "no"),
        ("plain words", "слово plain"),
        ("A naïve guest of the hotel paid for the café in cash yesterday evening.", "A naive guest paid the cafe"),
        ("It costs 3.50 € (or £3), “roughly”.", "It costs 3.5 pounds"),
        ("snake_case and CamelCase", "snake case, camelcase"),
    ]
    for right, answer in pairs:
        assert RougeL()(answer, [right]) == published.score(right, answer)["rougeL"].fmeasure


def test_the_best_of_several_right_answers_counts():
    assert RougeL()("да", ["нет", "да"]) == 1.0
    assert RougeL()("the trains", ["the red train"]) == pytest.approx(2 * 1 * (2 / 3) / (1 + 2 / 3))  # stemmed
    assert RougeL()("boats", ["a boat", "the red train"]) == pytest.approx(2 * 1 * (1 / 2) / (1 + 1 / 2))
