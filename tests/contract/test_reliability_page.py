"""The pages about faults and security claim nothing without a test, and no limit that is another one in the program."""

import importlib
import re
from pathlib import Path

ROOT = Path(__file__).parents[2]
PAGES = ("reliability.md", "security.md")


def pages() -> str:
    return "\n".join((ROOT / "docs" / name).read_text(encoding="utf-8") for name in PAGES)


def test_every_test_that_the_pages_name_exists():
    source = "\n".join(path.read_text(encoding="utf-8") for path in (ROOT / "tests").rglob("test_*.py"))
    known = set(re.findall(r"def (test_\w+)\(", source))
    named = re.findall(r"`(test_\w+)`", pages())
    assert len(named) > 60
    assert set(named) - known == set()


def test_every_row_of_a_table_names_a_test():
    rows = re.findall(r"^\| ([FS]\d\d?) \|(.*)$", pages(), flags=re.MULTILINE)
    assert len(rows) > 40
    assert [number for number, row in rows if "`test_" not in row] == []


def test_every_fault_of_a_run_has_a_row_or_a_reason_why_it_has_none():
    promised = pages()
    missing = (
        (ROOT / "docs" / "reliability.md").read_text(encoding="utf-8").partition("## Not promised yet")[2]
    )
    rows = set(re.findall(r"^\| ([FS]\d\d?) \|", promised, flags=re.MULTILINE))
    reasons = set(re.findall(r"F\d\d", missing))
    # Crash and storage, stop requests, resume, numbers and memory; network and cache; hostile input; security.
    faults = {f"F{n:02d}" for n in (*range(1, 40), *range(65, 73), *range(81, 85))} | {
        f"S{n}" for n in range(1, 15)
    }
    assert faults - rows - reasons == set()
    assert len(faults - rows) <= 5


def test_every_limit_on_the_page_is_that_of_the_program():
    page = (ROOT / "docs" / "security.md").read_text(encoding="utf-8")
    found = re.findall(
        r"^\|[^|]*\| ([\d,.]+) ?(MB|GB|s|)[^|]*\| `([\w.]+)\.(\w+)` \|$", page, flags=re.MULTILINE
    )
    assert len(found) >= 10
    units = {"MB": 1 << 20, "GB": 1 << 30, "s": 1, "": 1}
    for number, unit, module, name in found:
        value = getattr(importlib.import_module(f"sftcli.{module}"), name)
        assert value == float(number.replace(",", "")) * units[unit], f"{module}.{name}"
