"""What Typer found wrong with the arguments, as an error of ours with the flag or word that was probably meant."""

import re
from collections.abc import Iterator

from sftcli.errors import UsageError
from sftcli.suggest import did_you_mean

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


def usage_error(error: BaseException, command: str) -> UsageError | None:
    """Return ``error`` as a ``UsageError``, or ``None`` where it is not about arguments.

    Typer's own classes for it are private; its public ``BadParameter`` shares their methods. ``command`` is the one that was
    called, for errors that do not know theirs.
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
    elif found := _NOT_A_CHOICE.fullmatch(message):
        word, words = found["word"], found["words"].replace("'", "").split(", ")
        message = f"{found['head']}{word!r} is not one of {found['words']}"
        guess = did_you_mean(word, words)
    elif found := _BAD_NUMBER.fullmatch(message):
        message = found["head"] + _IN_WORDS[found["kind"]] + (found["bound"] or "")
    advice = f"see `{getattr(context, 'command_path', command)} --help`"
    return UsageError(message, hint=f"{guess} {advice}".lstrip())


def _flags(context: object) -> Iterator[str]:
    """Yield the long flags that the command of ``context`` knows."""
    yield "--help"
    for parameter in getattr(getattr(context, "command", None), "params", ()):
        for flag in (*parameter.opts, *parameter.secondary_opts):
            if flag.startswith("--"):
                yield flag
