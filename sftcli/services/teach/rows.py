"""Answers to rows: which one of each prompt is kept, and what a row says of where it is from."""

import hashlib
import json
from collections.abc import Sequence

from sftcli.config.schema.data import TrainOn
from sftcli.data.conversations.convert import to_conversations
from sftcli.data.conversations.detect import detect_schema, parse_renames
from sftcli.data.conversations.keys.dropped_keys import parse_ignored
from sftcli.data.conversations.keys.meaning import UnreadError
from sftcli.data.conversations.messages import Conversation, Message
from sftcli.data.conversations.turns import tool_list
from sftcli.data.reading.record import Origin, RawRecord
from sftcli.errors import DataError, UsageError
from sftcli.events import EventSink, Notice
from sftcli.figures import share_of
from sftcli.services.evaluate.checks.check import AskedRow, Check, behind_thought
from sftcli.services.evaluate.checks.table import AUTO, NONE, find_checks, line_of
from sftcli.services.generate.file import Given, as_line
from sftcli.services.generate.prompt_file import PromptRow
from sftcli.services.teach.request import Keep, TeachRequest


class TaughtRows:
    """Makes rows of answers. What does not fit is told before anything is asked.

    Args:
        request: What is kept.
        prompts: All that are asked.
        emit: Is told which check was found.

    Raises:
        DataError: A check does not fit, or none was named and none is found.
    """

    def __init__(self, request: TeachRequest, prompts: Sequence[PromptRow], emit: EventSink) -> None:
        self._request, self._prompts, self._emit = request, prompts, emit
        self._asked: list[AskedRow] = []
        self._checks: tuple[Check, ...] = ()
        if request.keep is Keep.CHECK:
            self._asked = _asked_rows(request, prompts)
            self._checks = _checks(request, self._asked)
            for check in self._checks:
                emit(Notice(text=line_of(check)))
                check.grade(
                    self._asked[0].expected, self._asked[0]
                )  # what fails does so before anything is asked

    def lines(self, teacher: str, given: Sequence[Sequence[Given]]) -> list[str]:
        """Return a line for each prompt of which an answer is kept; ``given`` has all answers to each.

        Raises:
            DataError: None is, which a check of another kind may change: the answers are there.
        """
        found = []
        for place, (prompt, answers) in enumerate(zip(self._prompts, given, strict=True)):
            kept = next((one for one in answers if self._is_kept(place, one)), None)
            if kept is not None:
                found.append(as_line(self._row(prompt, teacher, kept)))
        what = "an answer that passes" if self._checks else "an answer that ended by itself"
        if not found:
            raise DataError(
                f"none of {len(given)} prompts has {what}, so that there is no row",
                hint="the answers are kept: run the same command with another --check, or with --keep ended",
            )
        self._emit(Notice(text=f"{share_of(len(found), len(given))} prompts have {what}, and are rows"))
        return found

    def _is_kept(self, place: int, given: Given) -> bool:
        answer = given.completion
        if answer.finish != "stop" or not answer.text.strip():
            return False
        said = behind_thought(answer.text)
        return all(check.grade(said, self._asked[place]).score == 1 for check in self._checks)

    def _row(self, prompt: PromptRow, teacher: str, given: Given) -> dict[str, object]:
        turns = [_turn(message) for message in prompt.messages]
        shown = [turn for turn in turns if self._request.with_system or turn["role"] != "system"]
        return {
            "messages": [*shown, {"role": "assistant", "content": given.completion.text}],
            "teacher": teacher,
            "prompt_sha256": hashlib.sha256(json.dumps(turns, sort_keys=True).encode()).hexdigest(),
            "date": given.date,
            "line": prompt.line,
        }


def _turn(message: Message) -> dict[str, str]:
    return {"role": message.role, "content": message.content}


def _checks(request: TeachRequest, asked: Sequence[AskedRow]) -> tuple[Check, ...]:
    names = request.check_names
    if names == (NONE,):
        raise UsageError(
            "--keep check needs a check", hint="leave --check none out, or keep what ended: --keep ended"
        )
    expected = [row for row in asked if row.expected]
    if names == (AUTO,) and len(expected) < len(asked):
        raise DataError(
            f"{len(asked) - len(expected)} of {len(asked)} prompts have no answer to compare with, so that no check is found",
            hint="name one that looks at an answer alone: --check json, regex:PATTERN or FILE.py:function",
        )
    checks = find_checks(names, asked)
    if not checks:
        raise DataError("no check fits these answers", hint="name one: --check FILE.py:function")
    return checks


def _asked_rows(request: TeachRequest, prompts: Sequence[PromptRow]) -> list[AskedRow]:
    """Return the prompts as checks see them, with the answer that a row has already."""
    records = [
        RawRecord(fields=prompt.row, origin=Origin(path=str(request.file), line=prompt.line))
        for prompt in prompts
    ]
    answers = _answers(request, records)
    return [
        AskedRow(
            origin=str(record.origin),
            expected=answer,
            prompt="\n".join(message.content for message in prompt.messages),
            fields=record.fields,
            tools=tool_list(record.fields),
        )
        for prompt, record, answer in zip(prompts, records, answers, strict=True)
    ]


def _answers(request: TeachRequest, records: Sequence[RawRecord]) -> list[str]:
    """Return the last answer of each row; "" of rows that have none."""
    try:
        schema = detect_schema(
            records, renames=parse_renames(request.renames), dropped=frozenset(parse_ignored(request.ignored))
        )
    except (DataError, UsageError):
        return [""] * len(records)

    def answer(record: RawRecord) -> str:
        try:
            row = to_conversations(record, schema, train_on=TrainOn.ALL)[0]
        except (UnreadError, DataError):
            return ""
        return row.messages[-1].content.strip() if isinstance(row, Conversation) else ""

    return [answer(record) for record in records]
