"""Every ``sft`` command line in the README, the pages and the examples is one that the program takes."""

import re
import shlex
from collections.abc import Iterator
from pathlib import Path

import pytest
from typer.main import get_command

from sftcli.cli.app import app
from sftcli.config.fields import leaf_fields
from sftcli.config.presets import preset_names
from sftcli.config.schema.settings import Settings

REPO = Path(__file__).parents[2]
PAGES = [
    REPO / "README.md",
    *sorted((REPO / "docs").glob("*.md")),
    *sorted((REPO / "examples").glob("*.sh")),
]
FIELDS = leaf_fields(Settings)
COMMAND = re.compile(r"(?:^|[\s`(;])(sft (?:[a-z]+\b|--)[^`\n]*)")
ENDS = {"&&", "||", "|", ">", "2>", "&", ";", ")", "then", "do"}


def written_commands(text: str) -> Iterator[str]:
    """Yield the command lines of code blocks and of inline code."""
    text = text.replace("\\\n", " ")
    for block in re.findall(r"^```(?:sh|bash|console)?\n(.*?)^```", text, flags=re.MULTILINE | re.DOTALL):
        for line in block.splitlines():
            yield from (found.strip() for found in COMMAND.findall(line))
    prose = re.sub(r"^```.*?^```", "", text, flags=re.MULTILINE | re.DOTALL)
    yield from (inline for inline in re.findall(r"`(sft [^`\n]+)`", prose) if "..." not in inline)


def script_commands(text: str) -> Iterator[str]:
    lines = (line for line in text.replace("\\\n", " ").splitlines() if not line.lstrip().startswith("#"))
    for line in lines:
        yield from (found.strip() for found in re.findall(r"(?:^|[\s(])(sft [a-z]+ .*)", line))


def all_commands() -> list[tuple[str, str]]:
    found = []
    for page in PAGES:
        read = script_commands if page.suffix == ".sh" else written_commands
        found += [(page.name, command) for command in read(page.read_text(encoding="utf-8"))]
    return found


def words_of(command: str) -> list[str]:
    """Return the words of the first command of a line, without its comment."""
    reader = shlex.shlex(command, posix=True, punctuation_chars=True)
    reader.whitespace_split, words = True, []
    for word in reader:
        if word in ENDS:
            break
        words.append(word)
    return words


@pytest.mark.parametrize(("page", "command"), all_commands())
def test_flags_and_settings_exist(page: str, command: str) -> None:
    commands = get_command(app).commands  # type: ignore[attr-defined]
    name, *words = words_of(command)[1:]
    if name.startswith("-"):
        assert name in {"--help", "--version", "--install-completion", "--show-completion", "--json"}
        return
    assert name in commands
    known = {
        flag for parameter in commands[name].params for flag in parameter.opts + parameter.secondary_opts
    }
    for index, word in enumerate(words):
        flag = word.partition("=")[0]
        if flag.startswith("-") and flag != "-":
            assert flag in known | {"--help", "-h"}, f"{page}: sft {name} has no {flag}"
        following = words[index + 1] if index + 1 < len(words) else ""
        if flag == "--set" and "$" not in following:
            assert following.partition("=")[0] in FIELDS, f"{page}: no setting {following}"
        if flag == "--preset" and following.isascii() and following.islower():
            assert following in preset_names(), f"{page}: no preset {following}"


@pytest.mark.parametrize(
    "page",
    [*(page for page in PAGES if page.suffix == ".md"), REPO / "CONTRIBUTING.md"],
    ids=lambda page: page.name,
)
def test_links_lead_somewhere(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    targets = re.findall(r"\]\(([^)#\s]+)[^)]*\)|src=\"([^\"]+)\"", text)
    local = [target for pair in targets for target in pair if target and "://" not in target]
    assert [target for target in local if not (page.parent / target).exists()] == []
