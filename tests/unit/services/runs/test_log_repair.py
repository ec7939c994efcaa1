"""Files of lines that were cut at any byte, inside a character too, are read up to their last whole line."""

import json
from pathlib import Path

import pytest

from sftcli import storage
from sftcli.errors import MismatchError, StorageError
from sftcli.services.generate.answerer import Completion
from sftcli.services.generate.file import Journal, as_line
from sftcli.services.report.html import write_report
from sftcli.services.runs.event_log import end_torn_line, lines_up_to, read_lines
from tests.support.faulty_disk import FullDisk

LINES = [
    {"event": "Notice", "text": "läufe/ä"},
    {"event": "StepDone", "step": 1},
    {"event": "Notice", "text": "日本語 🙂"},
    {"event": "StepDone", "step": 2},
    {"event": "FitEnded", "step": 2},
]
ANSWER = {
    "text": "grüße 🙂",
    "model": "m",
    "finish": "stop",
    "prompt_tokens": 3,
    "new_tokens": 2,
    "logprob": -0.5,
    "confidence": 0.8,
}


def encoded(values: list[dict[str, object]]) -> bytes:
    return b"".join(json.dumps(value, ensure_ascii=False).encode() + b"\n" for value in values)


def test_log_that_is_cut_at_any_byte_keeps_its_whole_lines(tmp_path):
    whole, path = encoded(LINES), tmp_path / "events.jsonl"
    for cut in range(len(whole) + 1):
        path.write_bytes(whole[:cut])
        lines = read_lines(path)
        count = whole[:cut].count(b"\n")
        assert [event for _, event in lines.found] == LINES[:count]
        assert bool(lines.message(path)) == (cut > 0 and not whole[:cut].endswith(b"\n"))
        assert end_torn_line(path) == lines.message(path)
        assert path.read_bytes() == encoded(LINES[:count])
        kept = [json.loads(line) for line in lines_up_to(lines, 1)]
        assert kept == [line for line in LINES[:count] if line.get("step", 0) < 2]


def test_lines_that_are_not_objects_are_counted_and_left_out(tmp_path):
    path = tmp_path / "events.jsonl"
    path.write_bytes(
        b"[]\n{\n\xff\n"
        + b"[" * 100_000
        + b"\n"
        + encoded(LINES[:2])
        + b'{"a": 1}\n{"event": {"value": "StepDone"}}\n'
    )
    lines = read_lines(path)
    assert (len(lines.found), lines.damaged) == (4, 4)
    assert len(list(lines_up_to(lines, 9))) == 3  # what is no event is none


def test_answers_that_were_cut_at_any_byte_are_answered_again(tmp_path):
    path, sizes = tmp_path / ".out.partial", (1, 3, 1)
    journal = Journal(path, "print", sizes)
    for prompt in range(3):
        journal.add((0, prompt, 0), Completion(**ANSWER, seconds=1.0))
    journal.close()
    whole = path.read_bytes()
    begin = whole.index(b"\n") + 1
    for cut in range(begin, len(whole) + 1):
        path.write_bytes(whole[:cut])
        again = Journal(path, "print", sizes)
        again.close()
        assert list(again.done) == [(0, prompt, 0) for prompt in range(whole[:cut].count(b"\n") - 1)]
        assert path.read_bytes() == whole[: whole[:cut].rfind(b"\n") + 1]
    for cut in range(1, begin):
        path.write_bytes(whole[:cut])
        with pytest.raises(MismatchError):
            Journal(path, "print", sizes)
        assert path.read_bytes() == whole[:cut]


@pytest.mark.parametrize(
    "line", [b"[]", b'{"key": [0, 7, 0], "completion": {}}', b'{"key": "x"}', b"\xff", b"{}"]
)
def test_line_that_answers_nothing_that_was_asked_is_left_out(tmp_path, line):
    path = tmp_path / ".out.partial"
    path.write_bytes(encoded([{"answers": "print"}]) + line + b"\n")
    journal = Journal(path, "print", (1, 3, 1))
    journal.close()
    assert journal.done == {}


def test_file_that_is_no_journal_is_refused_and_left_as_it_is(tmp_path):
    path = tmp_path / ".out.partial"
    path.write_bytes(b"[]\n")
    with pytest.raises(MismatchError):
        Journal(path, "print", (1, 3, 1))
    assert path.read_bytes() == b"[]\n"


def test_half_a_character_of_a_row_can_be_written():
    assert json.loads(as_line({"a": "\ud83d", "b": "ä"}).encode()) == {"a": "\ud83d", "b": "ä"}
    assert "ä" in as_line({"b": "ä"})


def test_report_on_a_full_disk_is_74_and_leaves_nothing(tmp_path: Path, monkeypatch):
    monkeypatch.setattr(storage, "disk", FullDisk(tmp_path))
    with pytest.raises(StorageError, match="is full"):
        write_report([], tmp_path / "r.html")
    assert list(tmp_path.iterdir()) == []
