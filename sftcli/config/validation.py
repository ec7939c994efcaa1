"""What validation found, told by place and by what is allowed."""

from collections.abc import Mapping, Sequence

from pydantic.fields import FieldInfo
from pydantic_core import ErrorDetails

from sftcli.config.fields import allowed, choices, element_choices, shown
from sftcli.config.layers import Entry, Fields, Problem
from sftcli.errors import Location, UsageError
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
