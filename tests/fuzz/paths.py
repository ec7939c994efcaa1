"""Names that are no path, or an odd one, for each option and argument of each command that takes a text, and for each such setting."""

import shlex
from collections.abc import Iterator

import typer

from sftcli.cli.app import app
from sftcli.config.schema.settings import FIELDS
from tests.fuzz.own import ASK, TRAIN, make_runs
from tests.fuzz.targets import Target

ODD = (
    "x" * 256,
    "y/" * 2100,
    "\udcff",
    "half\ud800",
    "~nosuchuser/x",
    "rows.jsonl/x",
    "/proc/x",
    "/proc",
    "/dev/null",
    "",
    ".",
    "/",
    "a\nb",
    "\N{SNOWMAN} 'a' $b;*",
    "-",
)
_NEW = f"{TRAIN} --model model --max-steps 1 --run third"
# What each command is given beside the odd text, its options and its arguments; nothing for one that needs neither.
_REST = {
    "train": (_NEW.removeprefix("train "), ()),
    "try": ("--model model --max-rows 2", ("rows.jsonl",)),
    "prepare": ("--model model", ("rows.jsonl",)),
    "resume": ("-q", ("half",)),
    "eval": ("-q --no-base --max-rows 2", ("first",)),
    "generate": (ASK.removeprefix("generate "), ("Hi",)),
    "export": ("-q --to hf --out out", ("first",)),
    "report": ("-q", ("first",)),
    "show": ("", ("first",)),
    "diff": ("", ("first", "half")),
    "push": ("", ("first", "me/model")),
}


def path_commands() -> Iterator[tuple[Target, str]]:
    """Yield a target for each place that takes a text, with a command line for each odd one there."""
    for name, command in _commands(typer.main.get_command(app)):
        options, arguments = _REST.get(name, ("", ()))
        for place, parameter in enumerate(_texts(command)):
            for odd in ODD:
                if parameter.param_type_name == "option":
                    words = [f"{max(parameter.opts, key=len)}={odd}", *arguments]
                else:
                    words = [*arguments[:place], odd, *arguments[place + 1 :]]
                yield _target(f"{name} {parameter.name}"), f"{name} {options} {shlex.join(words)}"
    for key in _text_settings():
        for odd in ODD:
            yield _target(f"set {key}"), f"{_NEW} {shlex.join(['--set', f'{key}={odd}'])}"


def _target(name: str) -> Target:
    return Target(name=name, make=make_runs, file="rows.jsonl", commands=())


def _commands(
    group: typer.core.TyperGroup, before: str = ""
) -> Iterator[tuple[str, typer.core.TyperCommand]]:
    for name, command in group.commands.items():
        if isinstance(command, typer.core.TyperGroup):
            yield from _commands(command, f"{before}{name} ")
        else:
            yield f"{before}{name}", command


def _texts(command: typer.core.TyperCommand) -> list[typer.core.TyperOption]:
    """Return the parameters of ``command`` that take a value, arguments first."""
    found = [one for one in command.params if not getattr(one, "is_flag", False) and one.name != "help"]
    return sorted(found, key=lambda one: one.param_type_name == "option")


def _text_settings() -> list[str]:
    return [key for key, field in FIELDS.items() if "str" in str(field.annotation)]
