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


def test_every_fault_of_a_run_has_a_row_or_a_reason_why_it_has_none():
    page = (ROOT / "docs" / "reliability.md").read_text(encoding="utf-8")
    promised, _, missing = page.partition("## Not promised yet")
    rows = set(re.findall(r"^\| ([FS]\d\d?) \|", promised, flags=re.MULTILINE))
    reasons = set(re.findall(r"F\d\d", missing))
    # Crash and storage, stop requests, resume, numbers and memory; network and cache; hostile input; security.
    faults = {f"F{n:02d}" for n in (*range(1, 40), *range(65, 73), *range(81, 85))} | {
        f"S{n}" for n in range(1, 15)
    }
    assert faults - rows - reasons == set()
    assert len(faults - rows) <= 5
