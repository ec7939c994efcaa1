"""What can be a path is checked where one enters."""

from pathlib import Path

import pytest

from sftcli.errors import UsageError
from sftcli.paths import as_path


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("x" * 256, "is too long for a path"),
        ("a/" + "\N{LATIN SMALL LETTER A WITH DIAERESIS}" * 128 + "/b", "is too long for a path"),
        ("y/" * 2100, "is too long for a path"),
        ("a\0b", "holds a NUL"),
        ("\udcff", "holds half a character"),
        ("x\ud800", "holds half a character"),
        ("~nosuchuser/x", "names the home of an unknown user"),
    ],
)
def test_what_cannot_be_a_path_is_refused_with_the_reason(text, why):
    with pytest.raises(UsageError, match=why) as caught:
        as_path(text)
    assert caught.value.message.isascii()
    assert len(caught.value.message) < 160


@pytest.mark.parametrize("text", ["", ".", "/", "/proc/x", "a\nb", "x" * 255])
def test_odd_but_possible_paths_stay_as_they_are(text):
    assert as_path(text) == Path(text)


def test_home_is_where_a_shell_finds_it(monkeypatch):
    monkeypatch.setenv("HOME", "/home/me")
    assert as_path("~/rows") == Path("/home/me/rows")
