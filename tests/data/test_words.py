from mbf_mlx.data.words import is_english, words_of


def test_words_are_found_in_every_script():
    assert words_of("Don't STOP, 3.5!") == ["don", "t", "stop", "3", "5"]
    assert words_of("Поезд опоздал") == ["поезд", "опоздал"]
    assert words_of("火车abc晚点") == ["火", "车", "abc", "晚", "点"]
    assert len(words_of("इंतज़ार है")) == 2
    assert words_of("cafe\u0301") == words_of("café") == ["café"]
    assert words_of("… 👍 —") == []


def test_english_may_hold_a_few_foreign_words():
    assert is_english("The café on the corner is open, isn't it?") and is_english("42") and is_english("")
    assert not is_english("Поезд") and not is_english("使用 pip install")
