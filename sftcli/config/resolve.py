"""From presets, files, environment and command line to one set of validated settings that knows its origins.

Precedence, the last wins: defaults, preset, ``--config`` file, environment, flags and ``--set``.
"""

from collections.abc import Container, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import tomli_w
from pydantic import ValidationError
from pydantic.fields import FieldInfo
from pydantic_core import ErrorDetails

from sftcli.config.auto import described, is_open, value_of
from sftcli.config.fields import allowed, choices, element_choices, shown, value_from_text
from sftcli.config.interplay import settle
from sftcli.config.layers import (
    Entry,
    Fields,
    Layer,
    Override,
    Problem,
    document_layer,
    environment_layer,
    override_layer,
    sections_of,
    winning,
)
from sftcli.config.presets import preset_names, read_preset
from sftcli.config.schema.settings import FIELDS, Settings
from sftcli.errors import Location, NotFoundError, UsageError
from sftcli.suggest import aside, did_you_mean

_MAX_PROBLEMS = 5  # listed in one message
_VALUE_ERROR = "Value error, "  # what pydantic writes before the text of a ValueError


def wrong_value(error: ErrorDetails, key: str, entry: Entry, field: FieldInfo) -> Problem:
    """Describe a value that ``field`` does not accept, or one element of it."""
    name = key + "".join(f"[{part}]" for part in error["loc"][2:])
    value: object = error["input"]
    if error["type"] == "value_error":
        text = f"{entry.where}: {name} {error['msg'].removeprefix(_VALUE_ERROR)}"
        return Problem(text=text, location=entry.location)
    if error["type"] == "string_unicode":
        return Problem(
            text=f"{entry.where}: {name} is {shown(value)}, which is not UTF-8", location=entry.location
        )
    words = choices(field) if name == key else element_choices(field)
    if name == key:
        expected = allowed(field)
    else:
        expected = f"one of {', '.join(words)}" if words else "text that is not empty"
    suggestion = aside(did_you_mean(value, words)) if isinstance(value, str) and value else ""
    text = f"{entry.where}: {name} is {shown(value)} but must be {expected}{suggestion}"
    return Problem(text=text, location=entry.location)


def conflict(error: ErrorDetails, winners: Mapping[str, Entry], fields: Fields) -> Problem:
    """Describe values that do not go together, with the origin of each key that the validator's message names."""
    section = ".".join(str(part) for part in error["loc"])
    message = error["msg"].removeprefix(_VALUE_ERROR)
    words = {f"{section}.{word.strip('(),.;:')}" for word in message.split()}
    named = [key for key in fields if key in words]
    origins = [f"{key} is from {winners[key].origin}" for key in named if key in winners]
    places = [winners[key].location for key in named if key in winners]
    return Problem(
        text="; ".join([f"{section}: {message}", *origins]),
        location=places[-1] if places else Location(key=section),
    )


def usage_error(problems: Sequence[Problem]) -> UsageError:
    """Return one error for all ``problems``, of which there is at least one."""
    hint = " ".join(dict.fromkeys(problem.hint for problem in problems if problem.hint))
    first = problems[0]
    if len(problems) == 1:
        return UsageError(first.text, hint=hint, location=first.location)
    lines = [f"{len(problems)} problems with the settings:"]
    lines += [f"  {problem.text}" for problem in problems[:_MAX_PROBLEMS]]
    if len(problems) > _MAX_PROBLEMS:
        lines.append(f"  and {len(problems) - _MAX_PROBLEMS} more")
    return UsageError("\n".join(lines), hint=hint, location=first.location)


# Keys that a person has to type each time: no file, preset or variable of somebody else's can say them.
TYPED_KEYS = frozenset({"model.trust_remote_code"})
SECTIONS = sections_of(FIELDS)
DEFAULT_ORIGIN = "default"
SET_ORIGIN = "--set"


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """One settings key as ``--print-config`` shows it; an unset value is ``None``."""

    key: str
    value: object
    origin: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Resolved:
    """Validated settings, and for every key where its value was set.

    An origin is ``default``, ``auto: follows from the number of rows``, ``preset quick``, ``my.toml:12``, an environment variable, a flag or ``--set``; or
    ``limited by`` or ``goes with`` one of them, for an inherited value that was changed to fit.
    """

    settings: Settings
    origins: Mapping[str, str]
    notices: Sequence[str] = ()  # what a person should know about the sources
    model_keys: Mapping[str, object] = field(default_factory=dict)  # what a pipeline says about its model

    def rows(self) -> Iterator[Row]:
        """Yield every key once, in the order of the schema."""
        for key in FIELDS:
            yield Row(key=key, value=value_of(self.settings, key), origin=self.origins[key])


def parse_set(text: str) -> Override:
    """Read the argument of ``--set``, such as ``training.learning_rate=1e-4``.

    The value is read as TOML and, where it is none, as plain text; ``none`` unsets an optional key.

    Raises:
        UsageError: There is no ``=``. Whether the key exists is for ``resolve`` to say.
    """
    key, equals, value = text.partition("=")
    key = key.strip()
    if not equals or not key:
        raise UsageError(
            f"--set {text!r} has no key and value",
            hint="Write it as --set KEY=VALUE, such as --set training.learning_rate=1e-4.",
            location=Location(key=SET_ORIGIN),
        )
    return Override(key=key, value=value_from_text(FIELDS.get(key), value), origin=SET_ORIGIN)


def resolve(
    *,
    preset: str | None,
    config_file: Path | None,
    overrides: Sequence[Override],
    environ: Mapping[str, str],
    sets: Sequence[str] = (),
    last: Sequence[Override] = (),
) -> Resolved:
    """Merge all sources and validate the result; ``sets`` are arguments of ``--set``, which win over ``overrides``.

    ``last`` is what follows from the values of all these, and wins over them.

    Raises:
        UsageError: Anything is wrong; all of it is listed in the message.
        NotFoundError: There is no ``config_file``.
    """
    reading = _Reading()
    if preset is not None:
        reading.add_preset(preset)
    if config_file is not None:
        set_keys = {text.partition("=")[0].strip() for text in sets}
        reading.add_file(config_file, set_keys | {override.key for override in overrides})
    reading.add_environment(environ)
    reading.refuse_typed_keys()
    reading.add_command_line(overrides, sets)
    reading.add(*override_layer(last, FIELDS))
    layers = settle(reading.layers, FIELDS)
    winners = winning(layers)
    settings = _validated(layers, winners, reading.problems)
    if reading.problems or settings is None:
        raise usage_error(reading.problems)
    origins = {key: _origin(key, winners, settings) for key in FIELDS}
    return Resolved(
        settings=settings, origins=origins, notices=reading.notices, model_keys=reading.model_keys
    )


@dataclass(slots=True)
class _Reading:
    """What was read of the sources so far, and all that is wrong with it."""

    layers: list[Layer] = field(default_factory=list)
    problems: list[Problem] = field(default_factory=list)
    notices: list[str] = field(default_factory=list)
    model_keys: Mapping[str, object] = field(default_factory=dict)

    def add(self, layer: Layer, problems: Sequence[Problem]) -> None:
        self.layers.append(layer)
        self.problems += problems

    @contextmanager
    def refusals(self) -> Iterator[None]:
        """Keep an error of the block for the end, where it is told with all others."""
        try:
            yield
        except UsageError as error:
            self.problems.append(Problem(text=error.message, location=error.location, hint=error.hint))

    def add_preset(self, name: str) -> None:
        with self.refusals():
            for link in read_preset(name).chain:
                self.add(*document_layer(link.document, FIELDS, preset=link.name))

    def add_file(self, path: Path, typed: Container[str]) -> None:
        from sftcli.config.config_file import (
            read_config,  # and with it what reads YAML and other trainers' keys
        )

        with self.refusals():
            _refuse_preset_as_file(path)
            found = read_config(path, SECTIONS, typed)
            self.notices += found.notices
            self.model_keys = found.model_keys
            self.add(*document_layer(found.document, FIELDS))

    def add_environment(self, environ: Mapping[str, str]) -> None:
        self.add(*environment_layer(environ, FIELDS))

    def refuse_typed_keys(self) -> None:
        """Refuse the keys that a person has to type, in what was read before the command line."""
        self.problems += [
            Problem(
                text=f"{entry.where}: {key} can be set on the command line only",
                location=entry.location,
                hint="For a model whose code you have read: --trust-remote-code --set model.revision=COMMIT.",
            )
            for layer in self.layers
            for key, entry in layer.entries.items()
            if key in TYPED_KEYS and entry.value is not False
        ]

    def add_command_line(self, overrides: Sequence[Override], sets: Sequence[str]) -> None:
        typed, unreadable = list(overrides), _Reading()
        for text in sets:
            with unreadable.refusals():
                typed.append(parse_set(text))
        self.add(*override_layer(typed, FIELDS))
        self.problems += unreadable.problems


def _refuse_preset_as_file(config_file: Path) -> None:
    name = str(config_file)
    if name in preset_names() and not config_file.exists():
        raise NotFoundError(
            f"{name}: no such file", hint=f"For the preset: --preset {name}.", location=Location(file=name)
        )


def _origin(key: str, winners: Mapping[str, Entry], settings: Settings) -> str:
    if is_open(settings, key):
        return described(settings, key)
    return winners[key].origin if key in winners else DEFAULT_ORIGIN


def _validated(
    layers: Sequence[Layer], winners: Mapping[str, Entry], problems: list[Problem]
) -> Settings | None:
    """Return the settings, or ``None`` with ``problems`` extended."""
    try:
        return Settings.of_layers(layers)
    except ValidationError as invalid:
        for error in invalid.errors(include_url=False):
            key = ".".join(str(part) for part in error["loc"][:2])
            if key in FIELDS:
                problems.append(wrong_value(error, key, winners[key], FIELDS[key]))
            elif not problems:  # a misspelled key may be all that makes two others contradict each other
                problems.append(conflict(error, winners, FIELDS))
        return None


def to_toml(settings: Settings, origins: Mapping[str, str] | None = None) -> str:
    """Write settings as a file that gives equal settings when it is read by ``--config`` alone; ``TYPED_KEYS`` stay out.

    Args:
        settings: What to write; keys that are unset are left out, which is the same.
        origins: Where each value was set, written behind it as a comment.
    """
    lines: list[str] = []
    for section, values in settings.model_dump(mode="json", exclude_none=True).items():
        lines += ["", f"[{section}]"]
        for name, value in values.items():
            if f"{section}.{name}" in TYPED_KEYS:
                continue
            comment = f"  # {shown_origin(origins[f'{section}.{name}'])}" if origins else ""
            lines.append(tomli_w.dumps({name: value}).rstrip("\n") + comment)
    return "\n".join(lines[1:]) + "\n"


def shown_origin(origin: str) -> str:
    """Return ``origin`` as it can stand in a comment: a file's name may hold line breaks."""
    return "".join(char if char.isprintable() else "?" for char in origin)
