"""The static site: every page stands in its navigation, and is Markdown that GitHub and the site read alike."""

import re
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest

REPO = Path(__file__).parents[2]
CONFIG = tomllib.loads((REPO / "docs" / "zensical.toml").read_text("utf-8"))["project"]
COPIED = re.search(r"^SITE_PAGES = (.+)$", (REPO / "Makefile").read_text("utf-8"), re.MULTILINE)
assert COPIED is not None
PAGES = sorted(path for pattern in COPIED[1].split() for path in REPO.glob(pattern) if path.suffix == ".md")


def in_navigation(entries: list[dict[str, object]]) -> Iterator[str]:
    for entry in entries:
        for target in entry.values():
            if isinstance(target, list):
                yield from in_navigation(target)
            else:
                yield str(target)


def test_navigation_has_every_page_once_and_begins_with_the_readme():
    found = list(in_navigation(CONFIG["nav"]))
    assert found[0] == "README.md"
    assert sorted(found) == sorted(str(page.relative_to(REPO)) for page in PAGES)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(REPO)))
def test_page_is_read_alike_by_github_and_the_site(page):
    text = re.sub(r"^```.*?^```", "", page.read_text("utf-8"), flags=re.MULTILINE | re.DOTALL)
    # Python's Markdown keeps the backslash, and makes no list without an empty line in front of it.
    assert re.findall(r"`[^`\n|]*\\\|[^`\n]*`", text) == []
    assert re.findall(r"^(?![-*|] |\d+\. |  ).+\n(?:[-*] |1\. ).+$", text, re.MULTILINE) == []
