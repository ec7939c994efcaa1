"""Which check is found for real instruction files: the golden file has a line for each."""

import json
from itertools import islice
from pathlib import Path

import pytest

from sftcli.config.schema.data import TrainOn
from sftcli.data.conversations.convert import to_conversations
from sftcli.data.conversations.detect import detect_schema
from sftcli.data.conversations.messages import Conversation
from sftcli.data.reading.records import read_records
from sftcli.data.reading.source import parse_source
from sftcli.services.evaluate.checks.check import AskedRow
from sftcli.services.evaluate.checks.table import find_checks, line_of
from tests.support.golden import assert_golden

SHARED = Path(__file__).parents[6] / "shared" / "data"
MOST_ROWS = 200


def last_answer(row: Conversation) -> str:
    """Return the last answer as a template in the manner of Hermes writes it."""
    last = row.messages[-1]
    calls = json.loads(last.tool_calls) if last.tool_calls else []
    return last.content + "".join(
        f"\n<tool_call>\n{json.dumps(call['function'])}\n</tool_call>" for call in calls
    )


def found_in(path: Path) -> str:
    read = list(islice(read_records(parse_source(str(path)), seed=0), MOST_ROWS))
    schema = detect_schema(read)
    made = [row for record in read for row in to_conversations(record, schema, train_on=TrainOn.LAST)]
    rows = [
        AskedRow(origin=str(row.origin), expected=last_answer(row).strip())
        for row in made
        if isinstance(row, Conversation)
    ]
    checks = find_checks(("auto",), rows)
    return line_of(checks[0]) if checks else "nothing"


@pytest.mark.skipif(not SHARED.is_dir(), reason="the shared data files are not here")
def test_the_check_that_is_found_for_each_real_file():
    files = sorted(
        file
        for file in SHARED.glob("*/*")
        if file.suffix in {".json", ".jsonl", ".parquet"} and file.parent.name != "text"
    )
    quick = sorted((Path(__file__).parents[5] / "presets/quick").glob("*.jsonl"))
    lines = [f"{file.parent.name}/{file.name}: {found_in(file)}" for file in (*files, *quick)]
    assert_golden("checks/found.txt", "\n".join(lines) + "\n")
