"""The table of flags agrees with the schema, and a command gets what the user gave as settings."""

from dataclasses import dataclass
from typing import Annotated, get_origin

import pytest
import typer
from annotated_types import Ge, Gt, Le
from typer.testing import CliRunner

from sftcli.cli.options.flags import FLAGS, AdapterChoice, Flag, Flags
from sftcli.cli.options.groups import command
from sftcli.cli.options.shared import Color, Output
from sftcli.config.fields import choices, element_choices, kinds
from sftcli.config.layers import Override
from sftcli.config.resolve import resolve
from sftcli.config.schema.settings import FIELDS


@pytest.mark.parametrize("flag", FLAGS.values(), ids=lambda flag: flag.name)
def test_the_setting_accepts_what_its_flag_accepts(flag: Flag) -> None:
    field = FIELDS[flag.key]
    # Typer has no open intervals: the setting refuses the value at an open bound, and says so.
    lows = [
        bound.ge if isinstance(bound, Ge) else bound.gt
        for bound in field.metadata
        if isinstance(bound, Ge | Gt)
    ]
    highs = [bound.le for bound in field.metadata if isinstance(bound, Le)]
    if flag.min is not None:
        assert max(lows) <= flag.min
    if flag.max is not None:
        assert min(highs, default=flag.max) >= flag.max
    if flag.checks_words:
        assert choices(field) or element_choices(field)
    if not flag.means:
        kind = type(flag.reads({"TIME": "1h30m", "SHARE": "20%"}[flag.metavar])) if flag.reads else flag.kind
        assert shape(kind) in map(shape, kinds(field))


def shape(kind: object) -> object:
    """Return what values of a type are, to a setting and to a flag alike."""
    if kind is tuple or get_origin(kind) is list:
        return "several"
    return "text" if isinstance(kind, type) and issubclass(kind, str) else kind


@pytest.mark.parametrize("flag", [flag for flag in FLAGS.values() if flag.means], ids=lambda flag: flag.name)
def test_every_word_of_a_flag_stands_for_settings(flag: Flag) -> None:
    words: list[object] = [True] if flag.kind is bool else list(flag.kind)  # type: ignore[call-overload]
    for word in words:
        resolve(preset=None, config_file=None, overrides=[*flag.overrides(word)], environ={})


@pytest.mark.parametrize("value", [None, False, []])
def test_a_flag_that_was_not_given_sets_nothing(value: object) -> None:
    assert not [*FLAGS["--data"].overrides(value)]


@pytest.mark.parametrize(("flag", "value"), [("--seed", 0), ("--temperature", 0.0), ("--run", "")])
def test_zero_and_empty_text_are_given(flag: str, value: object) -> None:
    row = FLAGS[flag]
    assert [*row.overrides(value)] == [Override(key=row.key, value=value, origin=flag)]


def test_the_adapter_that_is_named_beats_lora() -> None:
    given = Flags({FLAGS["--lora"]: True, FLAGS["--adapter"]: AdapterChoice.RSLORA})
    origins = resolve(preset=None, config_file=None, overrides=given.overrides(), environ={}).origins
    assert {origins[key] for key in ("adapter.kind", "adapter.rslora")} == {"--adapter rslora"}


@dataclass(frozen=True, kw_only=True)
class Inner:
    """A group within a group, of which one field has no default."""

    size: Annotated[int, typer.Option("--size")]
    inner: Annotated[Output, "json", "color"]


def test_a_command_gets_groups_of_the_options_that_it_names() -> None:
    seen: list[object] = []
    app = typer.Typer()

    @app.command()
    @command
    def run(*, flags: Annotated[Flags, "--seed", "--lora"], group: Inner, plain: bool = False) -> None:
        seen.extend((flags.overrides(), group, plain))

    words = ["--seed", "3", "--size", "4", "--json", "--plain"]
    assert CliRunner().invoke(app, words).exit_code == 0
    overrides = [Override(key="training.seed", value=3, origin="--seed")]
    output = Output(json=True, color=Color.AUTO)
    assert seen == [overrides, Inner(size=4, inner=output), True]
    assert CliRunner().invoke(app, ["--seed", "3"]).exit_code == 2  # --size is missing
    assert CliRunner().invoke(app, [*words, "--quiet"]).exit_code == 2  # the command does not take it
