"""All checks, and which of them are asked for or fit. Needs no torch."""

import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from sftcli.errors import DataError, UsageError
from sftcli.services.evaluate.checks import fields, json_text, label, number, pattern, tool
from sftcli.services.evaluate.checks.check import AskedRow, Check
from sftcli.services.evaluate.checks.fields import fit_fields
from sftcli.services.evaluate.checks.json_text import fit_json
from sftcli.services.evaluate.checks.label import fit_label
from sftcli.services.evaluate.checks.number import fit_number
from sftcli.services.evaluate.checks.pattern import read_pattern
from sftcli.services.evaluate.checks.tool import fit_tool
from sftcli.services.evaluate.checks.user_function import check_function, load_function
from sftcli.suggest import did_you_mean

AUTO, NONE = "auto", "none"
_REGEX = f"{pattern.NAME}:"
_FUNCTION = re.compile(r"(?P<path>.+\.py):(?P<function>[^\W\d]\w*)")


@dataclass(frozen=True, slots=True, kw_only=True)
class Kind:
    """A check that is found from the expected answers. ``parts`` are those of any answers, None where these decide.

    ``fit`` returns the check, or why it does not fit; what is named need fit less well.
    """

    name: str
    fit: Callable[[Sequence[AskedRow], bool], Check | str]
    parts: frozenset[str] | None = frozenset()


# The first that fits is taken: what says most of an answer comes first.
KINDS = (
    Kind(name=tool.NAME, fit=fit_tool, parts=tool.PARTS),
    Kind(name=fields.NAME, fit=fit_fields, parts=None),
    Kind(name=label.NAME, fit=fit_label, parts=frozenset({label.MACRO_F1})),
    Kind(name=json_text.NAME, fit=fit_json),
    Kind(name=number.NAME, fit=fit_number),
)
_BY_NAME = {kind.name: kind for kind in KINDS}


def read_check_names(texts: Sequence[str]) -> tuple[str, ...]:
    """Return the names of ``--check``, one each: commas part them, but not those of a pattern, which goes on to the end.

    Raises:
        UsageError, NotFoundError: There is no such check, or two have one name, or ``auto`` or ``none`` stands with others.
    """
    names = tuple(name for text in texts for name in _parted(text))
    for name in names:
        _require_known(name, alone=len(names) == 1)
    called = [called_by(name) for name in names]
    if repeated := next((name for name in called if called.count(name) > 1), ""):
        raise UsageError(f"--check: two checks are called {repeated!r}", hint="run sft eval once for each")
    return names or (AUTO,)


def _parted(text: str) -> Iterator[str]:
    plain, mark, rest = (
        text.partition(_REGEX) if text.startswith(_REGEX) or f",{_REGEX}" in text else (text, "", "")
    )
    yield from (name.strip() for name in plain.split(",") if name.strip())
    if mark:
        yield mark + rest


def _require_known(name: str, *, alone: bool) -> None:
    if name in (AUTO, NONE):
        if not alone:
            raise UsageError(f"--check {name} stands alone", hint="leave it out, or leave out the others")
    elif name.startswith(_REGEX):
        read_pattern(name.removeprefix(_REGEX))
    elif match := _FUNCTION.fullmatch(name):
        check_function(Path(match["path"]), match["function"])
    elif name not in _BY_NAME:
        known = [AUTO, NONE, *_BY_NAME]
        raise UsageError(
            f"--check {name}: there is no such check",
            hint=did_you_mean(name, known)
            or f"there are {', '.join(known)}, regex:PATTERN and FILE.py:function",
        )


def called_by(name: str) -> str:
    """Return what the numbers of the check with this name are called."""
    match = _FUNCTION.fullmatch(name)
    return match["function"] if match else pattern.NAME if name.startswith(_REGEX) else name


def may_measure(metric: str, names: Sequence[str]) -> bool:
    """Return whether checks of these names could give this number, as far as can be told without the rows."""
    check, _, part = metric.partition(".")
    wanted = _BY_NAME if names == (AUTO,) else {called_by(name): _BY_NAME.get(name) for name in names}
    if check not in wanted:
        return False
    kind = wanted[check]
    parts = kind.parts if kind else frozenset() if check == pattern.NAME else None
    return not part or parts is None or part in parts


def known_numbers(names: Sequence[str]) -> Iterator[str]:
    """Yield the numbers of checks of these names, as far as they are known without the rows."""
    for name in _BY_NAME if names == (AUTO,) else map(called_by, names):
        if name != NONE:
            yield name
        if kind := _BY_NAME.get(name):
            yield from (f"{name}.{part}" for part in sorted(kind.parts or ()))


def find_checks(names: Sequence[str], rows: Sequence[AskedRow]) -> tuple[Check, ...]:
    """Return the checks of ``names`` for these rows; of ``auto`` the first that fits, or none.

    Raises:
        DataError: One that is named does not fit the expected answers.
    """
    if names == (NONE,) or not rows:
        return ()
    if names == (AUTO,):
        fitted = (kind.fit(rows, False) for kind in KINDS)
        return tuple(check for check in fitted if not isinstance(check, str))[:1]
    return tuple(_named(name, rows) for name in names)


def _named(name: str, rows: Sequence[AskedRow]) -> Check:
    if name.startswith(_REGEX):
        return read_pattern(name.removeprefix(_REGEX))
    if match := _FUNCTION.fullmatch(name):
        return load_function(Path(match["path"]), match["function"])
    check = _BY_NAME[name].fit(rows, True)
    if isinstance(check, str):
        raise DataError(
            f"--check {name} does not fit these rows: {check}", hint="leave it out, or name other rows"
        )
    return check


def line_of(check: Check) -> str:
    """Return the line that says which check was found, and why."""
    about = f" ({check.about})" if check.about else ""
    return f"check: {check.name}{about} - {check.found}"
