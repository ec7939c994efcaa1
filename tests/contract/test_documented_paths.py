"""Files that the documentation names are where it says."""

import re
from pathlib import Path

import pytest

REPO = Path(__file__).parents[2]
PAGES = sorted(
    [
        *REPO.glob("*.md"),
        *REPO.glob("docs/*.md"),
        *REPO.glob("benchmarks/**/*.md"),
        *REPO.glob("tests/**/*.md"),
    ]
)
PACKAGES = {path.name for path in (REPO / "sftcli").iterdir() if path.is_dir()}
HISTORY = {"CHANGELOG.md"}
PATH = re.compile(r"`((?:sftcli/)?[a-z_]+(?:/[a-z_]+)*(?:/|\.py|/[a-z_-]+\.(?:toml|txt|jsonl|sh|yaml)))`")


def named(page: Path) -> list[str]:
    """Return the modules and folders of the package that a page names."""
    found = PATH.findall(page.read_text(encoding="utf-8"))
    parts = [(path, path.removeprefix("sftcli/").split("/")[0]) for path in found]
    return [
        path
        for path, first in parts
        if path.startswith("sftcli/") or first in PACKAGES or first in {"tests", "docs", "examples"}
    ]


@pytest.mark.parametrize(
    "page", [page for page in PAGES if page.name not in HISTORY], ids=lambda page: page.name
)
def test_module_paths_in_pages_exist(page):
    missing = [
        path for path in named(page) if not ((REPO / path).exists() or (REPO / "sftcli" / path).exists())
    ]
    assert missing == []


def test_the_design_page_names_modules():
    assert len(named(REPO / "docs" / "design.md")) > 20
