"""What Typer found wrong with the arguments, as one error of ours with the flags or words that were probably meant."""

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
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
_UNKNOWN = "no such option"
_NO_COMMAND = re.compile(r"no such command '(?P<word>.*?)'(?:\. Did you mean.*)?")
_NOT_AUTO = re.compile(r"invalid value for '--resume': (?:Value error, )?'(?P<word>.*)' is not one of 'auto'")
_COMMANDS = {
    "chat": "generate --chat", "infer": "generate", "inference": "generate", "predict": "generate", "serve": "export",
    "merge": "export", "evaluate": "eval", "test": "eval", "score": "eval", "finetune": "train", "fine-tune": "train", "fit": "train",
    "sft": "train", "tokenize": "prepare", "preprocess": "prepare", "list": "runs", "ls": "runs", "status": "show", "log": "show",
    "info": "env", "version": "--version",
}  # fmt: skip
_WITHOUT_FLAG = {("prepare", "--data"): "rows are given without a flag: sft prepare FILE"}
_WITHOUT_FLAG |= {
    (command, flag): f"the model is given without a flag: sft {command} MODEL"
    for command in ("eval", "export")
    for flag in ("--model", "--checkpoint")
}
_WITHOUT_FLAG |= {
    (command, "--run"): f"the run is given without a flag: sft {command} RUN"
    for command in ("resume", "show", "report", "eval", "export")
}
_NO_FLAG = re.compile(r"(?P<head>missing option .*)\. Choose from:\s*(?P<words>.*)", re.DOTALL)
_EXTRA = re.compile(r"got unexpected extra argument\(s\) \((?P<words>.*)\)", re.DOTALL)

_Private = Any  # errors, contexts and parameters of Typer, of which it tells no class


@dataclass(frozen=True, slots=True, kw_only=True)
class _Problem:
    """What is wrong with one argument, and what was probably meant."""

    text: str
    guess: str = ""


def usage_error(error: BaseException, command: str, arguments: Sequence[str] = ()) -> UsageError | None:
    """Return ``error`` as a ``UsageError``, or ``None`` where it is not about arguments.

    Typer's own classes for it are private; its public ``BadParameter`` shares their methods. Typer stops at the first
    argument that is wrong; the others are told with it.

    Args:
        error: What was raised.
        command: The one that was called, for errors that do not know theirs.
        arguments: All that were given, the name of the command first.
    """
    if not callable(getattr(error, "format_message", None)):
        return None
    context: _Private = getattr(error, "ctx", None)
    found = _problem(error)
    problems = {found.text: found}
    if context is not None and (found.text.startswith(_UNKNOWN) or getattr(error, "param", None) is not None):
        for other in (*_unknown_flags(context, arguments), *_bad_values(context, arguments)):
            problems.setdefault(other.text, other)
    advice = f"see `{getattr(context, 'command_path', command)} --help`"
    if len(problems) == 1:
        joint = "" if not found.guess else " " if found.guess.endswith("?") else "; "
        return UsageError(found.text, hint=f"{found.guess}{joint}{advice}")
    lines = [f"  {problem.text}{aside(problem.guess)}" for problem in problems.values()]
    return UsageError("\n".join([f"{len(lines)} problems with the arguments:", *lines]), hint=advice)


def _problem(error: _Private) -> _Problem:
    """Put one error of Typer in our words."""
    message = str(error.format_message()).rstrip(".")
    message = message[:1].lower() + message[1:]  # as all our messages begin
    option = getattr(error, "option_name", "")
    if isinstance(option, str) and option and _UNKNOWN in message:
        return _unknown_flag(option, getattr(error, "ctx", None))
    if found := _NO_COMMAND.fullmatch(message):
        return _unknown_command(found["word"], getattr(error, "ctx", None))
    if found := _NOT_AUTO.fullmatch(message):
        text = f"--resume takes the word auto, not {found['word']!r}"
        go_on = f"to resume a run: sft resume {found['word']}"
        return _Problem(text=text, guess=did_you_mean(found["word"], ["auto"]) or go_on)
    if found := _NOT_A_CHOICE.fullmatch(message):
        word, words = found["word"], found["words"].replace("'", "").split(", ")
        return _Problem(
            text=f"{found['head']}{word!r} is not one of {found['words']}", guess=did_you_mean(word, words)
        )
    if found := _BAD_NUMBER.fullmatch(message):
        return _Problem(text=found["head"] + _IN_WORDS[found["kind"]] + (found["bound"] or ""))
    if found := _NO_FLAG.fullmatch(message):
        return _Problem(text=f"{found['head']}: one of {found['words']}".replace("\n\t", " "))
    if found := _EXTRA.fullmatch(message):
        return _extra_words(found["words"], getattr(error, "ctx", None))
    return _Problem(text=message)


def _extra_words(words: str, context: _Private) -> _Problem:
    text = f"unexpected argument {words!r}"
    if getattr(context, "info_name", "") == "generate":
        return _Problem(text=text, guess="a prompt of several words needs quotes around it")
    takes_none = not any(parameter.param_type_name == "argument" for parameter in _parameters(context))
    if takes_none and "--data" in _flags(context):
        return _Problem(text=text, guess=f"rows are named with --data {words.split()[0]}")
    return _Problem(text=text)


def _unknown_command(word: str, context: _Private) -> _Problem:
    known = list(getattr(getattr(context, "command", None), "commands", ()))
    guess = f"that is `sft {_COMMANDS[word]}`" if word in _COMMANDS else did_you_mean(word, known)
    return _Problem(text=f"there is no command {word!r}", guess=guess)


def _unknown_flag(flag: str, context: _Private) -> _Problem:
    guess = _as_ours(flag, context) or _as_setting(flag, context)
    guess = _WITHOUT_FLAG.get((getattr(context, "info_name", ""), flag), guess)
    if not guess and flag.startswith("--"):
        guess = did_you_mean(flag, _flags(context))
    return _Problem(text=f"{_UNKNOWN}: {flag}", guess=guess)


def _as_ours(flag: str, context: _Private) -> str:
    """Return what a flag of another trainer is called here, or nothing where it is none of theirs."""
    if getattr(context, "info_name", "") != "train":
        return ""
    from sftcli.config.foreign_names import OURS

    ours = OURS.get(flag.removeprefix("--").replace("-", "_"))
    return f"here it is {ours}" if ours else ""


def _as_setting(flag: str, context: _Private) -> str:
    """Return how to give a value to the setting that is called like ``flag``, or nothing where there is none."""
    if "--set" not in _flags(context):
        return ""
    from sftcli.config.schema.settings import FIELDS

    name = flag.removeprefix("--").replace("-", "_")
    return next(
        (f"it is a setting: --set {key}=VALUE" for key in FIELDS if key.rpartition(".")[2] == name), ""
    )


def _unknown_flags(context: _Private, arguments: Sequence[str]) -> Iterator[_Problem]:
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
            yield _unknown_flag(flag, context)
        takes_value = not equals and not takes_value and flag in values


def _bad_values(context: _Private, arguments: Sequence[str]) -> Iterator[_Problem]:
    """Yield what is wrong with the values among ``arguments``, in the order in which they were given."""
    context.ignore_unknown_options = True  # else reading them again would stop where it stopped before
    try:
        values, _, given = context.command.make_parser(context).parse_args(args=list(arguments[1:]))
    except Exception:  # noqa: BLE001 - such as a flag without its value, which is told already
        return
    for parameter in dict.fromkeys(given):
        try:
            parameter.handle_parse_result(context, values, [])
        except Exception as error:  # noqa: BLE001 - the classes of Typer are private
            if callable(getattr(error, "format_message", None)):
                yield _problem(error)


def _parameters(context: _Private) -> Sequence[Any]:
    parameters: Sequence[Any] = getattr(getattr(context, "command", None), "params", ())
    return parameters


def _flags(context: _Private) -> Iterator[str]:
    """Yield the long flags that the command of ``context`` knows."""
    yield "--help"
    for parameter in _parameters(context):
        for flag in (*parameter.opts, *parameter.secondary_opts):
            if flag.startswith("--"):
                yield flag
