"""A line that is typed at the prompt of a chat, and the keys that end it."""

import builtins
from collections.abc import Iterator

import pytest

from sftcli.cli.session.chat import _typed
from sftcli.cli.session.signals import CommandStopped


def type_keys(monkeypatch: pytest.MonkeyPatch, keys: Iterator[str | BaseException]) -> None:
    def read(prompt: str) -> str:
        key = next(keys)
        if isinstance(key, BaseException):
            raise key
        return key

    monkeypatch.setattr(builtins, "input", read)


def test_ctrl_c_keeps_a_half_typed_line_once(monkeypatch, capsys):
    put: list[str] = []
    type_keys(monkeypatch, iter([KeyboardInterrupt(), "half a line"]))
    assert _typed(lambda: "half a li", put.append) == "half a line"
    assert [text for text in put if text] == ["half a li"]
    assert capsys.readouterr().err == "\nthe line stays; Ctrl-C again leaves the chat\n"


@pytest.mark.parametrize("typed", ["", "half a li"])
def test_what_follows_a_chat_that_is_left_begins_on_a_line_of_its_own(monkeypatch, capsys, typed):
    type_keys(monkeypatch, iter([KeyboardInterrupt(), KeyboardInterrupt()]))
    with pytest.raises(CommandStopped):
        _typed(lambda: typed, lambda _: None)
    assert capsys.readouterr().err.endswith("\n")
    type_keys(monkeypatch, iter([EOFError()]))
    assert _typed(lambda: typed, lambda _: None) is None
    assert capsys.readouterr().err == "\n"
