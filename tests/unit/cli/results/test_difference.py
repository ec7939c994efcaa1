"""The screen of ``sft diff``."""

import io

from rich.console import Console

from sftcli.cli.results.difference import draw_difference
from sftcli.services.diff.answers import Moved
from sftcli.services.diff.compare import Difference, HeldoutLosses
from sftcli.services.diff.rows import ChangedRow, MovedRow, RowChanges
from sftcli.services.diff.settings import ChangedFact, ChangedSetting
from sftcli.services.report.measures import compare_scores
from tests.support.golden import assert_golden

SCORES = (
    {"loss": 0.612, "match_fraction": 0.71, "rows": 120, "answered": 100},
    {"loss": 0.584, "match_fraction": 0.74, "rows": 120, "answered": 100},
)
FOUND = Difference(
    before="first",
    after="second",
    rows=RowChanges(
        same=1180,
        added=tuple(f"rows.jsonl:{line}" for line in range(1201, 1221)),
        gone=("rows.jsonl:17",),
        changed=(
            ChangedRow(before="rows.jsonl:40", after="rows.jsonl:39", part="answer"),
            ChangedRow(before="rows.jsonl:77", after="rows.jsonl:77", part="prompt"),
        ),
        moved=(MovedRow(origin="rows.jsonl:3", before="heldout", after="train"),),
    ),
    settings=(
        ChangedSetting(
            key="training.learning_rate",
            before=2e-5,
            after=1e-4,
            before_from="preset gpu",
            after_from="--set",
        ),
        ChangedSetting(
            key="data.max_tokens", before=512, after=None, before_from="default", after_from="my.toml:4"
        ),
    ),
    facts=(ChangedFact(name="torch", before="2.9.0", after="2.10.0"),),
    heldout=HeldoutLosses(before=0.612, after=0.584, before_rows=120, after_rows=120, same_rows=True),
    measures=tuple(compare_scores(*SCORES, rows=120)),
    answers=(
        Moved(
            measure="exact match",
            rows=100,
            became_right=("rows.jsonl:12", "rows.jsonl:80"),
            became_wrong=("rows.jsonl:9\x1b[31m",),
            p_value=1.0,
        ),
    ),
    notes=(),
)


def drawn(found: Difference, columns: int) -> str:
    stream = io.StringIO()
    draw_difference(found, Console(file=stream, width=columns, markup=False, highlight=False, no_color=True))
    return stream.getvalue()


def test_screen_is_what_a_person_read_and_found_good():
    screen = drawn(FOUND, 80)
    assert max(map(len, screen.splitlines())) <= 80
    assert_golden("views/diff-80.txt", screen)
