"""``tool``: the answer calls the right tools with the right arguments."""

import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from importlib.util import find_spec

from sftcli.services.evaluate.checks.calls import Call, calls_in, is_python
from sftcli.services.evaluate.checks.check import AskedRow, MeanCheck, behind_thought
from sftcli.services.evaluate.checks.json_values import are_equal
from sftcli.services.report.check_results import Grade

NAME = "tool"
CALLED, NAMES, ARGUMENTS, SCHEMA = "called", "name", "arguments", "schema"
PARTS = frozenset({CALLED, NAMES, ARGUMENTS, SCHEMA})
_LEAST_SHARE = 0.1  # of the expected answers that call a tool


@dataclass(frozen=True, slots=True, kw_only=True)
class ToolCheck(MeanCheck):
    """Compares calls, in any order and however they are written.

    Its parts: whether a tool is called where one is expected and only there; where one is expected, the names and the
    arguments; and whether these are what the JSON schema of the tool allows, where the row lists its tools and the expected
    calls are so themselves.
    """

    def grade(self, answer: str, row: AskedRow, /) -> Grade:
        """Grade the calls of an answer."""
        said, want = calls_in(answer), calls_in(behind_thought(row.expected))
        parts = {CALLED: float(bool(said) == bool(want))}
        is_right = _pair_up(said, want, _is_same)
        if want:
            parts[NAMES] = float(_pair_up(said, want, _has_same_name))
            parts[ARGUMENTS] = float(_pair_up(said, want, _has_same_arguments))
            schemas = _schemas(row.tools) if has_schemas() else {}
            if _are_allowed(want, schemas):  # else the schema is broken, or says nothing about these calls
                parts[SCHEMA] = float(_are_allowed(said, schemas))
        return Grade(score=float(is_right), parts=parts, found=", ".join(call.name for call in said))


def fit_tool(rows: Sequence[AskedRow], is_named: bool, /) -> ToolCheck | str:
    """Return the check, or what does not fit."""
    calling = sum(_calls_tool(row, is_named=is_named) for row in rows)
    if not calling or (not is_named and calling < _LEAST_SHARE * len(rows)):
        return f"{calling} of {len(rows)} expected answers call a tool"
    return ToolCheck(
        name=NAME,
        found=f"{calling} of {len(rows)} expected answers call a tool",
        needs_rows=True,
        parts=PARTS,
    )


def _calls_tool(row: AskedRow, *, is_named: bool) -> bool:
    """Return whether the expected answer calls a tool; a call in Python may be code unless the prompt names what it calls."""
    text = behind_thought(row.expected)
    calls = calls_in(text)
    return bool(calls) and (is_named or not is_python(text) or all(call.name in row.prompt for call in calls))


def has_schemas() -> bool:
    """Return whether the package that knows JSON schemas is installed."""
    return find_spec("jsonschema") is not None


def _pair_up(said: Sequence[Call], want: Sequence[Call], is_same: Callable[[Call, Call], bool]) -> bool:
    """Return whether each call has one of its own among the expected ones, and none is left."""
    left = list(want)
    for call in said:
        same = next((index for index, one in enumerate(left) if is_same(call, one)), None)
        if same is None:
            return False
        del left[same]
    return not left


def _has_same_name(said: Call, want: Call) -> bool:
    return said.name == want.name


def _has_same_arguments(said: Call, want: Call) -> bool:
    return are_equal(said.arguments, want.arguments)


def _is_same(said: Call, want: Call) -> bool:
    return _has_same_name(said, want) and _has_same_arguments(said, want)


def _schemas(tools: str) -> dict[str, Mapping[str, object]]:
    """Return what each tool of a row takes, by its name."""
    listed = [tool["function"] for tool in json.loads(tools)] if tools else []
    return {tool["name"]: tool["parameters"] for tool in listed if isinstance(tool.get("parameters"), dict)}


def _are_allowed(calls: Sequence[Call], schemas: Mapping[str, Mapping[str, object]]) -> bool:
    """Return whether there are calls, and all are of tools that take their arguments."""
    return bool(calls) and all(call.name in schemas and _takes(schemas[call.name], call) for call in calls)


def _takes(schema: Mapping[str, object], call: Call) -> bool:
    from jsonschema.exceptions import SchemaError
    from jsonschema.validators import Draft202012Validator, validator_for
    from referencing import Registry
    from referencing.exceptions import Unresolvable

    kind = validator_for(schema, default=Draft202012Validator)
    try:
        kind.check_schema(schema)
        # An empty registry: a reference to somewhere else is never fetched.
        return bool(kind(schema, registry=Registry()).is_valid(_typed(call, schema)))
    except (SchemaError, Unresolvable, RecursionError, re.error):
        return False


def _typed(call: Call, schema: Mapping[str, object]) -> Mapping[str, object]:
    """Return the arguments with those as text that were written as bare texts and have to be text."""
    known = schema.get("properties")
    types = (
        {key: value.get("type") for key, value in known.items() if isinstance(value, dict)}
        if isinstance(known, dict)
        else {}
    )
    return {
        key: call.texts[key] if key in call.texts and types.get(key) == "string" else value
        for key, value in call.arguments.items()
    }
