"""The page about faults claims nothing without a test."""

import re
from pathlib import Path

ROOT = Path(__file__).parents[2]


def test_every_test_that_the_page_names_exists():
    page = (ROOT / "docs" / "reliability.md").read_text(encoding="utf-8")
    source = "\n".join(path.read_text(encoding="utf-8") for path in (ROOT / "tests").rglob("test_*.py"))
    known = set(re.findall(r"def (test_\w+)\(", source))
    named = re.findall(r"`(test_\w+)`", page)
    assert len(named) > 60
    assert set(named) - known == set()


def test_every_row_of_a_table_names_a_test():
    page = (ROOT / "docs" / "reliability.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| ([FS]\d\d?) \|(.*)$", page, flags=re.MULTILINE)
    assert len(rows) > 40
    assert [number for number, row in rows if "`test_" not in row] == []
