"""What Typer found wrong with the arguments, as an error of ours with the flag or word that was probably meant."""

import re
from collections.abc import Iterator, Sequence
from typing import Any

from sftcli.errors import UsageError
from sftcli.suggest import aside, did_you_mean

_NOT_A_CHOICE = re.compile(r"(?P<head>.*: )(?:Value error, )?'(?P<word>.*)' is not one of (?P<words>'.*')")

_BAD_NUMBER = re.compile(
    r"(?P<head>.*: )Input should be (?P<kind>a valid integer|a valid number|greater than or equal to|less than or equal to)"
    r"(?P<bound> \S+$)?(?:, .*)?"
)
_IN_WORDS = {
    "a valid integer": "must be a whole number",
    "a valid number": "must be a number",
    "greater than or equal to": "must be at least",
    "less than or equal to": "must be at most",
}


def usage_error(error: BaseException, command: str, arguments: Sequence[str] = ()) -> UsageError | None:
    """Return ``error`` as a ``UsageError``, or ``None`` where it is not about arguments.

    Typer's own classes for it are private; its public ``BadParameter`` shares their methods. ``command`` is the one that was
    called, for errors that do not know theirs. Typer stops at the first flag that it does not know; the others among
    ``arguments`` are told with it.
    """
    tell = getattr(error, "format_message", None)
    if not callable(tell):
        return None
    context: object = getattr(error, "ctx", None)
    message, guess = str(tell()).rstrip("."), ""
    option = getattr(error, "option_name", "")
    if isinstance(option, str) and option and "No such option" in message:
        message = f"No such option: {option}"
        guess = did_you_mean(option, _flags(context)) if option.startswith("--") else ""
        others = [flag for flag in _unknown(context, arguments) if flag != option]
        if others:
            lines = [f"  {flag}{aside(did_you_mean(flag, _flags(context)))}" for flag in (option, *others)]
            message, guess = "\n".join(["No such options:", *lines]), ""
    elif found := _NOT_A_CHOICE.fullmatch(message):
        word, words = found["word"], found["words"].replace("'", "").split(", ")
        message = f"{found['head']}{word!r} is not one of {found['words']}"
        guess = did_you_mean(word, words)
    elif found := _BAD_NUMBER.fullmatch(message):
        message = found["head"] + _IN_WORDS[found["kind"]] + (found["bound"] or "")
    advice = f"see `{getattr(context, 'command_path', command)} --help`"
    return UsageError(message, hint=f"{guess} {advice}".lstrip())


def _unknown(context: object, arguments: Sequence[str]) -> Iterator[str]:
    """Yield the words among ``arguments`` that look like long flags and that the command of ``context`` does not know."""
    known, takes_value = set(_flags(context)), False
    values = {
        flag
        for parameter in _parameters(context)
        if not getattr(parameter, "is_flag", False)
        for flag in parameter.opts
    }
    for word in arguments:
        if word == "--":
            return
        flag, equals, _ = word.partition("=")
        if word.startswith("--") and not takes_value and flag not in known:
            yield flag
        takes_value = not equals and not takes_value and flag in values


def _parameters(context: object) -> Sequence[Any]:
    parameters: Sequence[Any] = getattr(getattr(context, "command", None), "params", ())
    return parameters


def _flags(context: object) -> Iterator[str]:
    """Yield the long flags that the command of ``context`` knows."""
    yield "--help"
    for parameter in _parameters(context):
        for flag in (*parameter.opts, *parameter.secondary_opts):
            if flag.startswith("--"):
                yield flag
