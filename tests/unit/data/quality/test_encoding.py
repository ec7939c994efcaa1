import pytest
from hypothesis import given
from hypothesis import strategies as st

from sftcli.data.example import RowFlag
from sftcli.data.quality.encoding import find_trouble


@pytest.mark.parametrize(
    "text",
    [
        "plain\ttext\r\nof lines",
        "“Grüße” — aus Köln…",
        "CAFÉ»",
        "âge 5",
        "naïve Ã la",
        "東京の駅",
        "🎉 👩‍👩‍👧",
        "Привет",
        "£5 °C",
    ],
)
def test_good_text_is_left_alone(text: str):
    assert find_trouble([text, "more"]) == frozenset()


def test_the_replacement_character_is_noticed():
    assert find_trouble(["fine", "caf\ufffd"]) == {RowFlag.UNREADABLE}


@pytest.mark.parametrize("encoding", ["latin-1", "cp1252"])
@pytest.mark.parametrize("text", ["café", "Grüße", "it…s", "—", "🎉", "£5", "“so"])
def test_utf8_that_was_read_in_another_encoding_is_noticed(text: str, encoding: str):
    assert find_trouble([text.encode().decode(encoding)]) == {RowFlag.MISREAD}


@pytest.mark.parametrize("character", ["\x00", "\x08", "\x0b", "\x1b", "\x7f", "\x85", "\x9b"])
@pytest.mark.parametrize("rest", ["plain", "東京"])
def test_control_characters_are_noticed(character: str, rest: str):
    assert find_trouble([rest + character]) == {RowFlag.CONTROL_CHARACTER}


@given(st.text(st.characters(min_codepoint=32, max_codepoint=126) | st.sampled_from("\t\n\r")))
def test_printable_ascii_is_never_in_trouble(text: str):
    assert find_trouble([text]) == frozenset()
