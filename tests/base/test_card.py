"""What is taken from a base's model card, and what a card that we write says at its top."""

import pytest

from mbf_mlx.base.card import BaseCard, front_matter, public_name, read_card

pytest.importorskip("huggingface_hub", reason="huggingface_hub is not installed")


def read(folder, text, encoding="utf-8"):
    (folder / "README.md").write_bytes(text.encode(encoding))
    return read_card(folder)


@pytest.mark.parametrize(
    ("front", "licence", "original"),
    [
        ("license: mit\nbase_model: org/x", "mit", "org/x"),
        ("license: mit\nbase_model:\n- org/x", "mit", "org/x"),
        ("base_model: [org/x]", None, "org/x"),
        ("base_model: 'org/x'", None, "org/x"),
        ("base_model: org/x  # the one\n# license: gpl\nlicense: mit # really", "mit", "org/x"),
        ("license:\nbase_model:", None, None),
        ("license: ''\nbase_model: []", None, None),
        ("license: no\nbase_model: 3", None, None),
        ("license: llama3.2\nlicense_name: x", "llama3.2", None),
        ("tags:\n- license: gpl\n- base_model: org/no", None, None),
        ("# nothing but a comment", None, None),
    ],
)
@pytest.mark.parametrize("line_end", ["\n", "\r\n"])
def test_licence_and_original_are_found_as_yaml_means_them(tmp_path, front, licence, original, line_end):
    text = f"---\n{front}\n---\n# Card\n\nlicense: gpl\n---\nbase_model: org/no\n---\n"
    assert read(tmp_path, text.replace("\n", line_end)) == BaseCard(licence, original)


@pytest.mark.parametrize("text", ["", "# Card\nlicense: mit\n", "---\nlicense: mit\n", "a\n---\nlicense: mit\n---\n"])
def test_a_card_without_front_matter_says_nothing_and_prints_nothing(tmp_path, text, capfd):
    assert read(tmp_path, text) == BaseCard()
    assert capfd.readouterr() == ("", "")


def test_dashes_inside_a_value_do_not_end_the_front_matter(tmp_path):
    front = 'summary: "a --- b"\ntext: |\n  one\n  --- two\nlicense: mit\nbase_model: org/a---b'
    assert read(tmp_path, f"---\n{front}\n---\n") == BaseCard("mit", "org/a---b")


def test_a_byte_order_mark_does_not_hide_the_front_matter(tmp_path):
    assert read(tmp_path, "---\nlicense: mit\n---\n", "utf-8-sig") == BaseCard("mit")


def test_several_original_models_are_named_and_none_is_taken(tmp_path):
    card = read(tmp_path, "---\nlicense: mit\nbase_model:\n- org/x\n- org/y\n---\n")
    assert (card.licence, card.original) == ("mit", None)
    assert "base_model names several models (org/x, org/y), so none is taken" in card.notes[0]


@pytest.mark.parametrize("path", ["/models/me/llama", "./llama", "C:\\models\\llama"])
def test_a_path_is_no_original_model(tmp_path, path):
    card = read(tmp_path, f"---\nbase_model: '{path}'\n---\n")
    assert card.original is None
    assert "base_model: expected organisation/name" in card.notes[0]


@pytest.mark.parametrize(
    "front", ["license: [mit", "a: b: c", "- a\n- b", "just a text", "1: 2", "a: &a [*b]", "\tx: y"]
)
def test_broken_front_matter_is_said_and_nothing_else_stops(tmp_path, front):
    card = read(tmp_path, f"---\n{front}\n---\n# Card\n")
    assert (card.licence, card.original) == (None, None)
    assert "its front matter cannot be read" in card.notes[0] and "\n" not in card.notes[0]


def test_a_folder_without_a_card_says_nothing(tmp_path):
    assert read_card(tmp_path) == BaseCard()


@pytest.mark.parametrize("licence", ["apache-2.0", "yes", "1.0", 'a "b": c # d', "- x", "été"])
def test_front_matter_that_we_write_is_read_back(tmp_path, licence):
    text = front_matter(license=licence, base_model="org/x", library_name=None, tags=["a", "b"])
    assert "library_name" not in text
    assert read(tmp_path, text + "\n# Card\n") == BaseCard(licence, "org/x")


def test_a_base_is_called_by_its_hub_id_or_its_folders_name_but_never_by_its_path(tmp_path):
    assert public_name(tmp_path / "models" / "llama-1b") == "llama-1b"
    assert public_name(tmp_path / "hub" / "models--org--a--b" / "snapshots" / "0123") == "org/a--b"
