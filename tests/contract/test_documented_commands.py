"""Every ``sft`` command line in the README, the pages and the examples is one that the program takes."""

import ast
import importlib
import re
import shlex
import tomllib
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
    REPO / "CONTRIBUTING.md",
    *sorted((REPO / "docs").glob("*.md")),
    *sorted((REPO / "examples").glob("**/*.sh")),
]
MARKDOWN = [page for page in PAGES if page.suffix == ".md"]
FIELDS = leaf_fields(Settings)
COMMAND = re.compile(r"(?:^|[\s`(;])(sft(?:cli)? (?:[a-z]+\b|--)[^`\n]*)")
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
    if command.count("'") % 2:  # the line is itself within quotes, as behind `bash -c`
        command = command.rstrip("'")
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
    parser = commands[name].make_parser(commands[name].context_class(commands[name], info_name=name))
    takes_value = {
        flag
        for parameter in commands[name].params
        for flag in parameter.opts
        if flag.startswith("-") and not getattr(parameter, "is_flag", False)
    }
    given = [word for word in words if word not in {"--help", "-h", "$@"}]
    is_flag_alone = bool(given) and given[-1] in takes_value  # prose that names a flag and no value
    _, extra, _ = parser.parse_args(args=[*given, "VALUE"] if is_flag_alone else given)
    assert extra == [], f"{page}: sft {name} takes no {extra[0]}"
    for index, word in enumerate(words):
        flag = word.partition("=")[0]
        if flag.startswith("-") and flag != "-":
            assert flag in known | {"--help", "-h"}, f"{page}: sft {name} has no {flag}"
        following = words[index + 1] if index + 1 < len(words) else ""
        if flag == "--set" and "$" not in following:
            assert following.partition("=")[0] in FIELDS, f"{page}: no setting {following}"
        if flag == "--preset" and following.isascii() and following.islower():
            assert following in preset_names(), f"{page}: no preset {following}"


def blocks(kind: str) -> list[tuple[str, str]]:
    """Return page and text of the code blocks that name ``kind`` as their language."""
    fences = re.compile(rf"^```{kind}\n(.*?)^```", re.MULTILINE | re.DOTALL)
    return [(page.name, block) for page in MARKDOWN for block in fences.findall(page.read_text("utf-8"))]


@pytest.mark.parametrize("page", MARKDOWN, ids=lambda page: page.name)
def test_every_code_block_is_of_a_kind_that_is_checked_here(page: Path) -> None:
    marks = re.findall(r"^```(.*)$", page.read_text("utf-8"), re.MULTILINE)
    assert len(marks) % 2 == 0
    assert set(marks[::2]) <= {"", "sh", "python", "toml", "yaml", "json", "jinja"}
    assert set(marks[1::2]) <= {""}


@pytest.mark.parametrize(("page", "block"), blocks("python"))
def test_python_blocks_compile_and_import_what_is_there(page: str, block: str) -> None:
    tree = ast.parse(block, filename=page)
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("sftcli"):
            module = importlib.import_module(node.module or "")
            assert [name.name for name in node.names if not hasattr(module, name.name)] == []


@pytest.mark.parametrize(("page", "block"), blocks("toml"))
def test_toml_blocks_are_toml(page: str, block: str) -> None:
    assert tomllib.loads(block), page


@pytest.mark.parametrize("page", MARKDOWN, ids=lambda page: page.name)
def test_links_lead_somewhere(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    targets = re.findall(r"\]\(([^)#\s]+)[^)]*\)|src=\"([^\"]+)\"", text)
    local = [target for pair in targets for target in pair if target and "://" not in target]
    assert [target for target in local if not (page.parent / target).exists()] == []
