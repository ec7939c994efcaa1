"""Files of fixes: what is no fix is refused with its file and line, and what they change does not depend on how they are written."""

import json
from dataclasses import replace

import pytest

from sftcli.data.conversations.fixes import FixingRows, read_fixes
from sftcli.data.conversations.fixes_done import FixesDone
from sftcli.data.conversations.heldout_split import row_key, source_key
from sftcli.data.conversations.messages import Conversation, Message, TokenRow
from sftcli.data.reading.record import Origin
from sftcli.errors import DataError, NotFoundError

HASH, OTHER = "0" * 32, "1" * 32


def conversation(*texts: str, line: int = 1) -> Conversation:
    roles = ("user", "assistant") * len(texts)
    return Conversation(
        messages=tuple(
            Message(role=role, content=text, trained=role == "assistant")
            for role, text in zip(roles, texts, strict=False)
        ),
        origin=Origin(path="rows.jsonl", line=line),
    )


def written(path, *lines: object) -> str:
    path.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    return str(path)


@pytest.mark.parametrize(
    ("line", "told"),
    [
        ({"row": HASH}, "fix is missing"),
        ({"row": HASH, "fix": "delete"}, "fix is \"delete\""),
        ({"row": "abc", "fix": "keep"}, "no hash of a row"),
        ({"row": 3, "fix": "keep"}, "row is 3, and not text"),
        ({"row": HASH, "fix": "replace"}, '"answer" is needed'),
        ({"row": HASH, "fix": "replace", "answer": "  "}, '"answer" is needed'),
        ({"row": HASH, "fix": "keep", "answer": "a"}, '"answer" does nothing with "keep"'),
        ({"row": HASH, "fix": "keep", "anwser": "a"}, '"anwser" is no key of a fix'),
        ({"row": OTHER, "fix": "keep"}, "line 1 is about the same row"),
        ([1], "list"),
    ],
)  # fmt: skip
def test_what_is_no_fix_is_refused_with_its_line(tmp_path, line, told):
    name = written(tmp_path / "fixes.jsonl", {"row": OTHER, "fix": "leave-out"}, line)
    with pytest.raises(DataError) as error:
        read_fixes(name)
    assert told in error.value.message
    assert error.value.message.startswith(f"{name}:2")
    assert (error.value.location.file, error.value.location.line) == (name, 2)


def test_what_is_no_json_is_refused_with_its_line_and_an_absent_file_by_name(tmp_path):
    path = tmp_path / "fixes.jsonl"
    path.write_text('{"row": "' + HASH + '", "fix": "keep"}\n{nonsense\n', encoding="utf-8")
    with pytest.raises(DataError, match=r"fixes\.jsonl:2"):
        read_fixes(str(path))
    with pytest.raises(NotFoundError, match=r"absent\.jsonl"):
        read_fixes(str(tmp_path / "absent.jsonl"))


def test_their_content_is_what_they_change(tmp_path):
    first = {"row": HASH, "fix": "replace", "answer": "a", "place": "rows.jsonl:1"}
    second = {"row": OTHER, "fix": "keep"}
    one = read_fixes(written(tmp_path / "one.jsonl", first, second)).content
    assert (
        read_fixes(written(tmp_path / "two.jsonl", second, {**first, "place": "rows.jsonl:9"})).content == one
    )
    assert read_fixes(written(tmp_path / "three.jsonl", second, {**first, "answer": "b"})).content != one
    assert read_fixes(written(tmp_path / "none.jsonl")).by_row == {}


def test_rows_are_found_wherever_they_stand_and_their_last_answer_is_replaced(tmp_path):
    rows = [
        conversation("q", "a", "r", "b", line=5),
        conversation("x", "y", line=6),
        conversation("k", "l", line=7),
    ]
    keys = [row_key(row).hex() for row in rows]
    name = written(
        tmp_path / "fixes.jsonl",
        {"row": keys[0], "fix": "replace", "answer": "new", "place": "rows.jsonl:1"},
        {"row": keys[1], "fix": "leave-out"},
        {"row": keys[2], "fix": "keep"},
        {"row": HASH, "fix": "leave-out", "place": "/data/rows.jsonl:4"},
    )
    fixing, places = FixingRows(read_fixes(name)), []
    found = list(fixing.apply(rows, places.append))
    assert [message.content for message in found[0].messages] == ["q", "a", "r", "new"]
    assert found[0].row == keys[0]
    assert found[1:] == rows[2:]
    assert places == ["rows.jsonl:6"]
    done = fixing.done(["/data/rows.jsonl"], is_whole=True)
    assert done == FixesDone(left_out=1, replaced=1, kept=1, missing=1, changed=("rows.jsonl",))
    assert (
        done.in_words() == "1 row left out, 1 answer replaced, 1 kept, 1 no longer found (rows.jsonl changed)"
    )
    assert fixing.done(["/data/rows.jsonl"], is_whole=False).changed == ()  # it may just not have been read


def test_rows_that_differ_in_what_they_think_or_in_their_template_variables_are_told_apart(tmp_path):
    plain = conversation("q", "a")
    answer = plain.messages[-1]
    thinking, other = (
        replace(plain, messages=(plain.messages[0], replace(answer, thinking=text)))
        for text in ("well, two.", "well, three.")
    )
    rows = [plain, thinking, other, replace(plain, variables='{"mode": "short"}')]
    for row in rows:
        name = written(tmp_path / "fixes.jsonl", {"row": source_key(row).hex(), "fix": "leave-out"})
        left = list(FixingRows(read_fixes(name)).apply(rows, str))
        assert left == [one for one in rows if one is not row]
    spaced = replace(thinking, messages=(plain.messages[0], replace(answer, thinking="Well,  two. ")))
    assert source_key(spaced) == source_key(thinking)
    assert source_key(plain) == row_key(plain)


def test_an_answer_that_no_text_can_replace_is_refused_with_the_line_of_the_fix(tmp_path):
    tokens = TokenRow(
        input_ids=(1, 2), loss_mask=(False, True), origin=Origin(path="t", line=1), num_trained_turns=1
    )
    call = conversation("q", "a")
    call = Conversation(
        messages=(call.messages[0], Message(role="assistant", content="", trained=True, tool_calls="[]")),
        origin=call.origin,
    )
    for row in (tokens, call):
        fix = {"row": row_key(row).hex(), "fix": "replace", "answer": "a"}
        name = written(tmp_path / "fixes.jsonl", fix)
        with pytest.raises(DataError, match=r"fixes\.jsonl:1: "):
            list(FixingRows(read_fixes(name)).apply([row], print))
