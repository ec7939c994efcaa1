"""The published surface: commands, flags, defaults, settings and exit codes are as the pages say, and move only on purpose."""

import importlib.util
import re
from pathlib import Path

import pytest

from sftcli import errors
from sftcli.config.resolve import resolve
from sftcli.config.schema.settings import Settings

REPO = Path(__file__).parents[2]
specification = importlib.util.spec_from_file_location("pages", REPO / "docs" / "pages.py")
assert specification is not None
assert specification.loader is not None
pages = importlib.util.module_from_spec(specification)
specification.loader.exec_module(pages)


@pytest.mark.parametrize("page", pages.PAGES)
def test_pages_are_what_the_program_says(page):
    written = (REPO / "docs" / page).read_text(encoding="utf-8")
    assert written == pages.PAGES[page](), "run `make docs`, and say in CHANGELOG.md what moved"


@pytest.mark.parametrize("page", pages.PAGES)
def test_generated_pages_hold_nothing_of_python_that_nobody_can_type(page):
    # Names in double backticks, classes, objects, tuples and enumerations; `None`, `True` and `False` as values.
    python = r"(?<!`)``(?!`)|<class|<function|<object| at 0x|inspect\.|\('|\',\)|Choice\.|StrEnum|`(?:None|True|False)`|Default (?:None|True|False)\b"
    assert re.findall(python, pages.PAGES[page]()) == []


def test_every_default_on_the_settings_page_can_be_typed_after_set():
    table = re.findall(r"^\| `([\w.]+)` \| `([^`]+)` \|", pages.settings_page(), re.MULTILINE)
    typed = resolve(
        preset=None,
        config_file=None,
        overrides=[],
        environ={},
        sets=[f"{key}={default}" for key, default in table],
    ).settings
    assert len(table) > 50
    assert typed == Settings()


@pytest.mark.parametrize("command", pages.commands(), ids=lambda command: command.name)
def test_every_command_has_examples_that_use_its_own_flags(command):
    flags = {
        word
        for parameter in command.parameters
        for word in re.findall(r"--?[a-z][a-z-]*", parameter.spelling)
    }
    assert command.examples
    for example in command.examples:
        assert example.startswith(f"sft {command.name}")
        assert set(re.findall(r"(?<=\s)--?[a-z][a-z-]*", example)) <= flags


def test_the_page_about_runs_lists_every_exit_code():
    page = (REPO / "docs" / "runs.md").read_text(encoding="utf-8")
    table = page[page.index("## Exit codes") :].split("\n## ")[0]
    told = {
        int(code) for row in re.findall(r"^\| ([\d, ]+) \|", table, re.MULTILINE) for code in row.split(",")
    }
    kinds = [
        kind for kind in vars(errors).values() if isinstance(kind, type) and issubclass(kind, errors.SftError)
    ]
    assert {kind.exit_code for kind in kinds} <= told
    assert {code for code, _ in pages.exit_codes()} <= told


def test_readme_has_the_numbers_of_the_page_about_model_families():
    page = (REPO / "docs" / "models.md").read_text(encoding="utf-8")
    tried, works = re.search(r"builds (\d+) tiny", page), re.search(r"^(\d+) train;", page, re.MULTILINE)
    assert tried is not None
    assert works is not None
    readme = " ".join((REPO / "README.md").read_text(encoding="utf-8").split())
    assert f"{works[1]} of {tried[1]} that were tried work" in readme
