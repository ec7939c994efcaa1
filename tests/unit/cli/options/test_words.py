"""What a person types is what the parser gets: settings in two words, and help as a word."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sftcli.cli.options.words import SECTIONS, meant
from sftcli.config.resolve import SECTIONS as OF_SETTINGS

ONE = ["train", "--set", "training.learning_rate=1e-4", "--lora"]


@pytest.mark.parametrize(
    "typed",
    [
        "train --set training.learning_rate=1e-4 --lora",
        "train --set training.learning_rate 1e-4 --lora",
        "train --set training.learning_rate = 1e-4 --lora",
        "train --set training.learning_rate= 1e-4 --lora",
        "train --set training.learning_rate =1e-4 --lora",
    ],
)
def test_a_setting_in_two_words_is_one(typed):
    assert meant(typed.split()) == ONE


@pytest.mark.parametrize(
    ("typed", "words"),
    [
        ("help", "--help"),
        ("help train", "train --help"),
        ("train help", "train --help"),
        ("eval help", "eval --help"),
        ("generate help", "generate help"),
        ("train --set data.b --lora", "train --set data.b --lora"),
        ("train --set", "train --set"),
        ("train --set data.b=1 c", "train --set data.b=1 c"),
        ("generate --set sampling.seed 3 hello", "generate --set sampling.seed=3 hello"),
        ("generate --set sampling.temperature -1", "generate --set sampling.temperature=-1"),
        ("generate -- --set data.b 1", "generate -- --set data.b 1"),
    ],
)
def test_other_words_are_left_as_they_are(typed, words, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert meant(typed.split()) == words.split()


def test_a_file_called_help_is_a_file(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "help").mkdir()
    assert meant(["prepare", "help"]) == ["prepare", "help"]


@given(
    st.lists(st.sampled_from(["train", "--set", "data.b=1", "--data", "x.jsonl", "", "=", "-1"]), max_size=8)
)
def test_words_with_their_equals_signs_are_never_changed(words):
    assert meant(words) == words


def test_sections_are_those_of_the_settings():
    assert set(SECTIONS) == OF_SETTINGS
