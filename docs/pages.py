"""Writes the pages that are made from the program itself: commands.md, settings.md, names.md and the man page sft.1.

Run it with ``make docs`` after a flag, a setting or a help text changed; a test compares the pages with the program.
"""

import inspect
import json
import re
import textwrap
from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum
from html import escape
from pathlib import Path
from typing import get_args, get_type_hints

from typer.models import ArgumentInfo, OptionInfo

from sftcli import errors
from sftcli.cli.app import app
from sftcli.config.fields import allowed, leaf_fields
from sftcli.config.foreign_config import ROWS as FOREIGN_ROWS
from sftcli.config.foreign_names import OURS
from sftcli.config.presets import preset_names, read_preset
from sftcli.config.schema.settings import Settings

HERE = Path(__file__).parent


@dataclass(frozen=True, slots=True, kw_only=True)
class Parameter:
    """A flag or argument: how it is written, what it means, what it is by default."""

    spelling: str
    help: str
    default: str
    is_argument: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class Command:
    """A command as its help has it. ``text`` holds paragraphs; ``examples`` are whole command lines."""

    name: str
    text: str
    examples: Sequence[str]
    parameters: Sequence[Parameter]


def commands() -> list[Command]:
    """Return every command, in the order of ``sft --help``."""
    found = []
    for registered in app.registered_commands:
        function = registered.callback
        assert function is not None
        text, _, examples = inspect.cleandoc(function.__doc__ or "").partition("Examples:")
        hints = get_type_hints(function, include_extras=True)
        defaults = inspect.signature(function).parameters
        found.append(
            Command(
                name=registered.name or function.__name__,
                text=" ".join(text.split()),
                examples=[line.strip() for line in examples.splitlines() if line.strip()],
                parameters=[
                    _parameter(name, *get_args(hints[name]), default=defaults[name].default)
                    for name in defaults
                ],
            )
        )
    return found


def _parameter(name: str, kind: object, info: ArgumentInfo | OptionInfo, *, default: object) -> Parameter:
    if isinstance(info, ArgumentInfo):
        return Parameter(
            spelling=info.metavar or name.upper(), help=info.help or "", default="", is_argument=True
        )
    spelling = ", ".join(
        [str(info.default), *(info.param_decls or ())]
    )  # within Annotated, Typer keeps the first one there
    if kind is not bool:
        spelling += f" {info.metavar or _choices(kind)}"
    has_none = default in (None, inspect.Parameter.empty) or kind is bool
    shown = "" if has_none else str(getattr(default, "value", default))
    return Parameter(spelling=spelling, help=info.help or "", default=shown, is_argument=False)


def _choices(kind: object) -> str:
    """Return the words of an enumeration, which may be optional."""
    enums = [part for part in (kind, *get_args(kind)) if isinstance(part, type) and issubclass(part, StrEnum)]
    words = [word.value for enum in enums for word in enum]
    return "|".join(words)


def commands_page() -> str:
    """Return commands.md."""
    parts = [
        "# Commands\n\nGenerated from `sft --help`. All flags are listed here; all settings are in [settings](settings.md).\n"
    ]
    for command in commands():
        parts.append(f"## sft {command.name}\n\n{command.text}\n")
        parts.append("```sh\n" + "\n".join(command.examples) + "\n```\n")
        rows = [
            f"| {_code(p.spelling)} | {_cell(p.help)}{f' Default `{p.default}`.' if p.default else ''} |"
            for p in command.parameters
        ]
        parts += ["| flag | meaning |\n|---|---|\n" + "\n".join(rows) + "\n"] if rows else []
    return "\n".join(parts)


def settings_page() -> str:
    """Return settings.md."""
    parts = [
        "# Settings\n\nGenerated from the schema. Set a key with `--set KEY=VALUE`, in a TOML file (`--config`), or in the environment: "
        "`SFT_` and the key in capitals with `__` for the dot. `sft train --print-config` shows what applies and why.\n"
    ]
    section = ""
    for key, field in leaf_fields(Settings).items():
        head = key.partition(".")[0]
        if head != section:
            section = head
            about = (Settings.model_fields[head].annotation.__doc__ or "").split("\n")[0]
            parts.append(
                f"\n## [{section}]\n\n{about}\n\n| key | default | accepts | meaning |\n|---|---|---|---|"
            )
        parts.append(
            f"| `{key}` | {_value(field.default)} | {_cell(allowed(field))} | {_cell(field.description or '')} |"
        )
    parts.append("\n## Presets\n\n| preset | for |\n|---|---|")
    parts += [f"| `{name}` | {_cell(read_preset(name).description)} |" for name in preset_names()]
    return "\n".join(parts) + "\n"


def _value(default: object) -> str:
    if default is None:
        return "unset"
    if default == ():
        return "none"
    return f"`{_typed(default)}`"


def _typed(value: object) -> str:
    """Return a value as a settings file or ``--set`` takes it."""
    if isinstance(value, tuple):
        return json.dumps(value)
    return str(value).lower() if isinstance(value, bool) else str(getattr(value, "value", value))


def _cell(text: str) -> str:
    return text.replace("|", "\\|")


def _code(text: str) -> str:
    """Return ``text`` as code in a cell. In backticks, only some readers of Markdown take the backslash before a bar away."""
    return f"<code>{escape(text, quote=False).replace('|', '&#124;')}</code>" if "|" in text else f"`{text}`"


def man_page() -> str:
    """Return sft.1, for ``man``."""
    lines = [
        '.TH SFT 1 "" "sft" "User commands"',
        ".SH NAME",
        "sft \\- fine-tune causal language models on instruction-response pairs",
        ".SH SYNOPSIS",
        ".B sft",
        "COMMAND [OPTIONS]",
        ".SH COMMANDS",
    ]
    for command in commands():
        lines += [f".SS sft {command.name}", _roff(command.text)]
        for parameter in command.parameters:
            default = f" Default {parameter.default}." if parameter.default else ""
            lines += [".TP", f".B {_roff(parameter.spelling)}", _roff(parameter.help + default)]
        lines += (
            [".PP", "Examples:", ".nf"] + [f"    {_roff(example)}" for example in command.examples] + [".fi"]
        )
    lines.append(".SH EXIT STATUS")
    for code, meaning in exit_codes():
        lines += [".TP", f".B {code}", _roff(meaning)]
    return "\n".join(lines) + "\n"


def exit_codes() -> list[tuple[int, str]]:
    """Return the exit codes with their meaning, as the docstring of ``sftcli.errors`` tells them."""
    table = re.findall(r"^  \w+Error +(\d+)   (.+)$", errors.__doc__ or "", flags=re.MULTILINE)
    codes = [
        (0, "done"),
        (1, "a bug in this program"),
        (errors.STOPPED_EXIT_CODE, "stopped on request, saved, run again"),
    ]
    return sorted([*codes, *((int(code), meaning) for code, meaning in table)])


def _roff(text: str) -> str:
    safe = text.replace("\\", "\\e").replace("-", "\\-")
    return "\n".join(
        "\\&" + line if line.startswith((".", "'")) else line for line in textwrap.wrap(safe, 100)
    )


def names_page() -> str:
    """Return names.md: what other trainers call it."""
    read: dict[str, list[str]] = {}
    for names, ours, _ in FOREIGN_ROWS:
        for name in names:
            read.setdefault(name, []).append(ours)
    answered = {name: ours for name, ours in OURS.items() if name not in read}
    parts = [
        "# Names of other trainers\n\nGenerated from the program. `sft train --config THEIRS.yaml` reads the keys of the first table, from "
        "configurations of TRL, axolotl, LLaMA-Factory, Unsloth and the Hugging Face Trainer; `--print-config` shows what became of them. "
        "Keys of the second table, and unknown ones, are refused with what to write in their place. As flags of `sft train` all of them are "
        "answered with ours.\n",
        "| theirs | setting here |\n|---|---|",
    ]
    parts += [
        f"| `{name}` | {', '.join(f'`{key}`' for key in ours)} |" for name, ours in sorted(read.items())
    ]
    parts += ["\n| theirs | here |\n|---|---|"]
    parts += [f"| `{name}` | {_cell(ours)} |" for name, ours in sorted(answered.items())]
    return "\n".join(parts) + "\n"


PAGES = {
    "commands.md": commands_page,
    "settings.md": settings_page,
    "names.md": names_page,
    "sft.1": man_page,
}


if __name__ == "__main__":
    for page, make in PAGES.items():
        (HERE / page).write_text(make(), encoding="utf-8")
