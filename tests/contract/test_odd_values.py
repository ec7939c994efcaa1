"""A value of any kind in any place of a row is read, or refused with the row's line: never an error of Python."""

import copy
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.cli.conftest import program
from tests.support.tiny_model import build_tiny_model

_TOOL = {
    "type": "function",
    "function": {
        "name": "weather",
        "description": "Tells it.",
        "parameters": {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]},
    },
}
_CALL = {"id": "c1", "type": "function", "function": {"name": "weather", "arguments": {"city": "Lima"}}}
ROWS: dict[str, dict[str, Any]] = {
    "pairs": {"prompt": "Capital of Peru?", "response": "Lima", "system": "Be short."},
    "alpaca": {"instruction": "Add", "input": "1 2", "output": "3", "history": [["Hi", "Hello"]]},
    "messages": {
        "messages": [
            {"role": "system", "content": "Be short."},
            {"role": "user", "content": [{"type": "text", "text": "Capital of Peru?"}], "name": "me"},
            {"role": "assistant", "content": "Lima", "reasoning_content": "It is known."},
        ]
    },
    "marks": {"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello", "weight": 1, "train": True}]},
    "tools": {
        "messages": [
            {"role": "user", "content": "Weather?"},
            {"role": "assistant", "content": "", "tool_calls": [_CALL]},
            {"role": "tool", "tool_call_id": "c1", "name": "weather", "content": "rain"},
            {"role": "assistant", "content": [{"type": "thinking", "thinking": "Hm."}, {"type": "text", "text": "Rain."}]},
        ],
        "tools": [_TOOL],
        "chat_template_kwargs": {"enable_thinking": True},
    },
    "sharegpt": {"conversations": [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Hello", "loss": True}]},
    "chosen": {"prompt": [{"role": "user", "content": "Hi"}], "completion": [{"role": "assistant", "content": "Hello"}]},
    "tree": {"prompt": {"role": "prompter", "text": "Hi", "replies": [{"role": "assistant", "text": "Hello", "replies": []}]}},
}  # fmt: skip
ODD = ({}, {"a": {}}, [], [[]], [None], None, True, 0, -1.5, 10**400, "", " ", "x" * 5000, ["a", 1])
IGNORED = {"pairs": "system", "alpaca": "history", "messages": "reasoning_content", "tools": "thinking"}
GOOD = 40  # rows before, so that the format of the file is known


def places(value: object, at: tuple[str | int, ...] = ()) -> Iterator[tuple[str | int, ...]]:
    """Yield the place of each value inside of ``value``."""
    inside = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, one in inside:
        yield (*at, key)
        yield from places(one, (*at, key))


def changed(row: dict[str, Any], at: tuple[str | int, ...], value: object) -> dict[str, Any]:
    new = copy.deepcopy(row)
    inner: Any = new
    for key in at[:-1]:
        inner = inner[key]
    inner[at[-1]] = value
    return new


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_tiny_model(tmp_path_factory.mktemp("model") / "tiny")


@pytest.mark.parametrize("form", ROWS)
def test_a_value_of_any_kind_in_any_place_of_a_row_is_no_bug(form, model, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("SFT_CACHE_DIR", str(tmp_path / "cache"))
    row = ROWS[form]
    bad = [changed(row, at, value) for at in places(row) for value in ODD]
    lines = [json.dumps(one) for one in (*[row] * GOOD, *bad)]
    Path("rows.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
    loose = ["--set", "data.max_rejected_fraction=1", "--set", "data.heldout_fraction=0"]
    loose += ["--ignore", IGNORED[form]] if form in IGNORED else []
    code, out, err = program(monkeypatch, capsys)("prepare", "rows.jsonl", "--model", model, *loose, "--json")
    assert code in {0, 65}, (out + err)[-2000:]
    assert "hit a bug" not in err
    if code == 0:
        assert json.loads(out)["audit"]["train"]["kept"] >= 1


@pytest.mark.parametrize("inner", ["\\ud800", "\\u0000"])
@pytest.mark.parametrize("options", [(), ("--ignore", "reasoning_content")])
def test_json_text_inside_of_a_row_is_looked_at_too(inner, options, model, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("SFT_CACHE_DIR", str(tmp_path / "cache"))
    thought = {"reasoning_content": "Hm."} if options else {}
    turns = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello", **thought}]
    call = {"function": {"name": "weather", "arguments": f'{{"city": "{inner}"}}'}}
    bad = [
        {"messages": json.dumps(turns).replace("Hi", inner)},
        {"messages": [turns[0], {"role": "assistant", "content": "", "tool_calls": [call]}]},
        {"messages": turns, "tools": json.dumps([_TOOL]).replace("Tells it.", inner)},
    ]
    lines = [json.dumps(one) for one in (*[{"messages": turns}] * GOOD, *bad)]
    Path("rows.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
    code, out, err = program(monkeypatch, capsys)(
        "prepare", "rows.jsonl", "--model", model, *options, "--json"
    )
    assert code == 0, (out + err)[-2000:]
    assert json.loads(out)["audit"]["train"]["rejected"]["wrong-type"] >= 2
