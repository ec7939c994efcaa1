"""Commands that texts of the program name, read by the real command line: each is one that can be typed as it stands."""

import ast
import re
import shlex
from collections.abc import Iterator
from pathlib import Path

from typer.main import get_command

from sftcli.cli.app import app
from sftcli.config.fields import leaf_fields
from sftcli.config.schema.settings import Settings

FIELDS = leaf_fields(Settings)
COMMANDS = get_command(app).commands  # type: ignore[attr-defined]
FLAGS = {flag for command in COMMANDS.values() for parameter in command.params for flag in parameter.opts}
VALUE = "1"  # stands for what is filled in: a number, a name, more flags
# A command begins a text, or stands behind one of these, and reaches as far as one of those.
_BEGIN = r"(?:^|: |`|\(| or | and |, )sft ([a-z][a-z-]*)(?![a-z-]*:)"
_END = re.compile(
    r"[;`)\n]|, | or | and |\. |\.$|: |$| \(| in place| to resume| which | takes | lists | first\b| on the "
)
_PLACEHOLDER = re.compile(r"\b[A-Z]{1,}\b(?![a-z])")
_SECTIONS = "|".join(sorted({key.partition(".")[0] for key in FIELDS}))
_FILES = (
    ".toml",
    ".log",
    ".json",
    ".safetensors",
    ".gguf",
    ".py",
    ".generate",
    ".embed_tokens",
    ".token_embed",
)


def texts_of(source: Path) -> Iterator[tuple[int, str]]:
    """Yield every text in a module but its docstrings with its line; what is filled in is ``VALUE``."""
    tree = ast.parse(source.read_text(encoding="utf-8"))
    skipped = {
        id(part)
        for node in ast.walk(tree)
        for part in (
            [node.value]
            if isinstance(node, ast.Expr)
            else node.values
            if isinstance(node, ast.JoinedStr)
            else []
        )
    }
    for node in ast.walk(tree):
        if isinstance(node, ast.JoinedStr):
            yield (
                node.lineno,
                "".join(str(part.value) if isinstance(part, ast.Constant) else VALUE for part in node.values),
            )
        elif isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in skipped:
            yield node.lineno, node.value


def commands_in(text: str) -> Iterator[tuple[str, list[str]]]:
    """Yield name and words of each command in ``text``."""
    for found in re.finditer(_BEGIN, text):
        rest = text[found.end() :]
        if rest.startswith("`") and found[1] in COMMANDS:
            continue  # speaks of the command
        end = _END.search(rest)
        words = _PLACEHOLDER.sub(VALUE, rest[: end.start() if end else None])
        try:
            yield found[1], shlex.split(words)
        except ValueError:
            yield found[1], words.split()


def faults_in(text: str) -> Iterator[str]:
    """Yield what cannot be typed as ``text`` names it: commands with their flags, settings by their keys."""
    for name, words in commands_in(text):
        if fault := _refusal(name, words):
            yield f"sft {shlex.join([name, *words])}: {fault}"
    yield from (
        f"no setting {key}"
        for key in re.findall(rf"(?<![\w./-])(?:{_SECTIONS})\.[a-z_][a-z_0-9]*\b(?!\()", text)
        if key not in FIELDS and not key.endswith(_FILES)
    )


def _refusal(name: str, words: list[str]) -> str:
    if name not in COMMANDS:
        return "there is no such command"
    if "--help" in words:  # would print it
        return ""
    try:
        COMMANDS[name].make_context(name, list(words))
    except Exception as error:  # noqa: BLE001 - click's errors; the module that has them is Typer's own
        if "unexpected extra argument" in str(error) and words[-1] == VALUE:
            return _refusal(name, words[:-1])  # stands for flags
        return str(error)
    return ""
