"""Metric limits, which end a command with 3. Invalid ones are reported before anything is measured."""

import math
import operator
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, fields
from typing import get_args

from sftcli.errors import DataError, ThresholdError, UsageError
from sftcli.extras import require_package
from sftcli.services.evaluate.checks import tool
from sftcli.services.evaluate.checks.check import Check
from sftcli.services.evaluate.checks.table import known_numbers, may_measure
from sftcli.services.report.score import Score
from sftcli.suggest import did_you_mean

SCORE_NUMBERS = frozenset(
    field.name
    for field in fields(Score)
    if {int, float} & {field.type, *get_args(field.type)} and field.name != "sources"
) | {"perplexity", "match_fraction", "cut_fraction"}
FORGETTING = "forgetting"  # nats per token that general text is worse by
SCHEMA_NUMBER = f"{tool.NAME}.{tool.SCHEMA}"
_PACKAGES = {"rouge_l": ("rouge_score", "rouge-score"), "chrf": ("sacrebleu", "sacrebleu")}


@dataclass(frozen=True, slots=True, kw_only=True)
class Limit:
    """A metric by name, and its upper or lower limit."""

    metric: str
    value: float
    word: str  # above or under
    is_broken: Callable[[float, float], bool]
    text: str  # as the user wrote it

    def fault_of(self, number: float) -> str:
        """Return in words how ``number`` breaks it; "" where it does not."""
        if self.is_broken(number, self.value) or math.isnan(number):
            return f"{self.metric} is {number:.6g}, {self.word} {self.value:g}"
        return ""


def read_limits(above: Sequence[str], under: Sequence[str]) -> tuple[Limit, ...]:
    """Read limits, each ``METRIC=VALUE``.

    Raises:
        UsageError: One cannot be read.
    """
    return tuple(
        _read_limit(text, word, is_broken)
        for texts, word, is_broken in ((above, "above", operator.gt), (under, "under", operator.lt))
        for text in texts
    )


def _read_limit(text: str, word: str, is_broken: Callable[[float, float], bool]) -> Limit:
    metric, _, value = text.partition("=")
    flag = f"--fail-{word}"
    try:
        number = float(value)
    except ValueError:
        number = math.nan
    if not math.isfinite(number):  # nothing is above or under NaN
        raise UsageError(f"{flag} {text}: expected METRIC=VALUE", hint=f"such as {flag} loss=1.5")
    return Limit(metric=metric, value=number, word=word, is_broken=is_broken, text=f"{flag} {text}")


def require_measurable(limits: Iterable[Limit], checks: Sequence[str]) -> None:
    """Make sure that a held-out evaluation with ``checks``, by name, may measure the metrics of ``limits``.

    Raises:
        UsageError: There is no such number, or what measures it is not installed.
    """
    for limit in limits:
        if limit.metric == FORGETTING:
            continue
        if may_measure(limit.metric, checks):
            if limit.metric == SCHEMA_NUMBER:
                require_package("jsonschema", extra="eval", needed_by=limit.text)
            continue
        require_number(limit, [*SCORE_NUMBERS, FORGETTING, *known_numbers(checks)])
        if limit.metric in _PACKAGES:
            module, package = _PACKAGES[limit.metric]
            require_package(module, extra="eval", needed_by=limit.text, package=package)


def require_checked(limits: Iterable[Limit], checks: Iterable[Check]) -> None:
    """Make sure that the ``checks`` that fit measure what ``limits`` name beside the numbers of a score.

    Raises:
        UsageError: A check has no such part.
        DataError: No check fits that has this number.
    """
    found = {check.name: check.parts for check in checks}
    for limit in limits:
        name, _, part = limit.metric.partition(".")
        if limit.metric in {*SCORE_NUMBERS, FORGETTING} or (
            name in found and (not part or found[name] is None)
        ):
            continue
        if name not in found:
            raise DataError(
                f"{limit.text}: the check {name!r} was not found for these rows",
                hint=f"--check {name} says why, or name other rows with --data FILE",
            )
        require_number(limit, [name, *(f"{name}.{one}" for one in found[name] or ())])


def check_limits(numbers: Mapping[str, float], limits: Iterable[Limit]) -> None:
    """Compare ``numbers`` with ``limits``.

    Raises:
        UsageError: There is no such number.
        DataError: The rows did not give that number.
        ThresholdError: A number is above, or under, its limit.
    """
    broken = []
    for limit in limits:
        if limit.metric in SCORE_NUMBERS - set(numbers):
            raise DataError(
                f"{limit.text}: {limit.metric} was not measured on these rows",
                hint="name more rows, or rows that it can be measured on, with --data FILE",
            )
        require_number(limit, numbers)
        number = numbers[limit.metric]
        if fault := limit.fault_of(number):
            broken.append(fault)
    if broken:
        raise ThresholdError("; ".join(broken))


def require_number(limit: Limit, known: Iterable[str]) -> None:
    """Make sure that the metric of ``limit`` is one of ``known``.

    Raises:
        UsageError: It is not.
    """
    names = sorted(known)
    if limit.metric not in names:
        raise UsageError(
            f"{limit.text}: unknown metric {limit.metric!r}",
            hint=did_you_mean(limit.metric, names) or f"there are {', '.join(names)}",
        )
