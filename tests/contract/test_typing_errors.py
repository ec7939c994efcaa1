"""One slip of the finger in any name that is typed at the prompt is answered with the name that was meant."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sftcli.cli.app import app
from sftcli.cli.errors.arguments import usage_error
from sftcli.config.fields import choices, leaf_fields
from sftcli.config.presets import preset_names
from sftcli.config.resolve import parse_set, resolve
from sftcli.config.schema.settings import Settings
from sftcli.errors import SftError
from sftcli.services.runs.folder import find_run
from tests.contract.test_surface import pages

LETTERS = "abcdefghijklmnopqrstuvwxyz0123456789-_."
COMMANDS = pages.commands()
NAMES = [command.name for command in COMMANDS]
FLAGS = [
    (command.name, word)
    for command in COMMANDS
    for parameter in command.parameters
    for word in parameter.spelling.replace("/", ", ").split(", ")
    if word.startswith("--")
]
FLAGS = [(command, word.split(" ")[0]) for command, word in FLAGS]
FIELDS = leaf_fields(Settings)
CHOICES = [(key, word) for key, field in FIELDS.items() for word in choices(field)]
RUNS = ["lr-1e-4", "lr-2e-5", "alpaca-full", "quick-20260101-120000"]


@st.composite
def slips(draw: st.DrawFn, word: str, start: int = 0) -> str:
    """Return ``word`` after one insertion, deletion, replacement or swap of neighbors behind ``start``."""
    at = draw(st.integers(start, len(word) - 1))
    letter = draw(st.sampled_from(LETTERS))
    edits = [word[:at] + letter + word[at:], word[:at] + word[at + 1 :], word[:at] + letter + word[at + 1 :],
             word[:at] + word[at : at + 2][::-1] + word[at + 2 :], word + letter]  # fmt: skip
    return draw(st.sampled_from(edits))


def complaint(*arguments: str) -> str:
    """Return what the program says to wrong arguments: message and hint."""
    try:
        app(list(arguments), prog_name="sft", standalone_mode=False)
    except SftError as error:
        return f"{error.message} {error.hint}"
    except Exception as error:  # noqa: BLE001 - the classes of Typer are private
        told = usage_error(error, "sft")
        assert told is not None
        return f"{told.message} {told.hint}"
    raise AssertionError(f"{arguments} was taken")


@given(st.data())
@settings(deadline=None)
def test_a_command(data: st.DataObject) -> None:
    name = data.draw(st.sampled_from(NAMES))
    slip = data.draw(slips(name))
    if slip and slip not in NAMES and not slip.startswith("-"):
        assert repr(name) in complaint(slip)


@given(st.data())
@settings(deadline=None)
def test_a_flag(data: st.DataObject) -> None:
    command, flag = data.draw(st.sampled_from(FLAGS))
    slip = data.draw(slips(flag, start=2))
    if (command, slip) not in FLAGS and slip not in {"--help", "--"}:
        assert repr(flag) in complaint(command, slip)


@given(st.data())
def test_a_preset(data: st.DataObject) -> None:
    name = data.draw(st.sampled_from(preset_names()))
    slip = data.draw(slips(name))
    if slip not in preset_names():
        with pytest.raises(SftError) as error:
            resolve(preset=slip, config_file=None, overrides=(), environ={})
        assert repr(name) in error.value.message + error.value.hint


@given(st.data())
@settings(deadline=None)
def test_a_settings_key(data: st.DataObject) -> None:
    key = data.draw(st.sampled_from(sorted(FIELDS)))
    slip = data.draw(slips(key))
    if slip not in FIELDS:
        with pytest.raises(SftError) as error:
            resolve(preset=None, config_file=None, overrides=(parse_set(f"{slip}=1"),), environ={})
        assert key.rpartition(".")[2] in error.value.message + error.value.hint


@given(st.data())
@settings(deadline=None)
def test_a_word_of_a_setting_that_is_a_choice(data: st.DataObject) -> None:
    key, word = data.draw(st.sampled_from(CHOICES))
    slip = data.draw(slips(word))
    if slip.strip() and slip not in choices(FIELDS[key]):
        with pytest.raises(SftError) as error:
            resolve(preset=None, config_file=None, overrides=(parse_set(f"{key}={slip}"),), environ={})
        assert repr(word) in error.value.message + error.value.hint


@given(st.data())
def test_a_run(tmp_path_factory: pytest.TempPathFactory, data: st.DataObject) -> None:
    root = tmp_path_factory.getbasetemp() / "typed-runs"
    for name in RUNS:
        (root / name).mkdir(parents=True, exist_ok=True)
        (root / name / "run.json").write_text("{}", encoding="utf-8")
    name = data.draw(st.sampled_from(RUNS))
    slip = data.draw(slips(name))
    if slip not in RUNS:
        with pytest.raises(SftError) as error:
            find_run(slip, root)
        assert repr(name) in error.value.message + error.value.hint
