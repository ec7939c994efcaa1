"""Variables of a chat template, such as ``enable_thinking=false``: read from text, and written into the template as defaults."""

import json
from collections.abc import Iterable, Mapping

from jinja2 import meta, nodes

from sftcli.config.schema.data import RENDERING_NAMES
from sftcli.errors import UsageError
from sftcli.modeling.tokenizer.sandbox import TemplateEnvironment
from sftcli.suggest import did_you_mean

Value = bool | int | float | str | None


def parse_variables(texts: Iterable[str]) -> dict[str, Value]:
    """Return ``enable_thinking=false`` and its like as a mapping; a value that is no JSON is text.

    Raises:
        UsageError: One has no name or no value, or a name is given twice or used by rendering itself.
    """
    values: dict[str, Value] = {}
    for text in texts:
        name, equals, value = text.partition("=")
        if not equals or not name.isidentifier():
            raise UsageError(
                f"{text!r} sets no variable", hint="write NAME=VALUE, such as enable_thinking=false"
            )
        if name in values or name in RENDERING_NAMES:
            what = "is set twice" if name in values else "is set by rendering itself"
            raise UsageError(f"{text!r}: the template variable {name} {what}")
        values[name] = _value(value)
    return values


def _value(text: str) -> Value:
    try:
        value = json.loads(text.lower() if text.lower() in ("true", "false") else text)
    except ValueError:
        return text
    return value if isinstance(value, bool | int | float | str | None) else text


def check_known(values: Mapping[str, Value], sources: Iterable[str], where: str) -> None:
    """See that a template of ``sources`` reads each of ``values``.

    Raises:
        UsageError: None does: it would change nothing.
    """
    environment = TemplateEnvironment()
    known = frozenset[str]().union(
        *(meta.find_undeclared_variables(environment.parse(source)) for source in sources)
    )
    for name in values:
        if name not in known:
            names = sorted(known - RENDERING_NAMES)
            raise UsageError(
                f"{where} reads no variable {name!r}",
                hint=did_you_mean(name, names) or f"it reads {', '.join(names) or 'none'}",
            )


def find_switches(source: str) -> tuple[str, ...]:
    """Return the variables that decide something in a template of ``source`` and are not printed, those of thinking first."""
    tree = TemplateEnvironment().parse(source)
    tests = [branch.test for branch in tree.find_all(nodes.If)]
    tests += [branch.test for branch in tree.find_all(nodes.CondExpr)]
    deciding = [name for test in tests for name in _names(test)]
    printed = [
        name
        for output in tree.find_all(nodes.Output)
        for name in _names(output)
        if not any(name is one for one in deciding)
    ]
    asked = [name for test in tree.find_all(nodes.Test) if test.name == "defined" for name in _names(test)]
    kept = [  # {% set name = name | default(...) %}
        name
        for assignment in tree.find_all(nodes.Assign)
        for name in _names(assignment.node)
        if isinstance(assignment.target, nodes.Name) and assignment.target.name == name.name
    ]
    own = [name for name in tree.find_all(nodes.Name) if name.ctx != "load"]
    taken = _texts(own) - _texts(asked) - _texts(kept) | _texts(printed) | RENDERING_NAMES
    found = (meta.find_undeclared_variables(tree) & _texts(deciding)) - taken
    return tuple(sorted(found, key=lambda name: ("think" not in name, name)))


def _names(tree: nodes.Node) -> list[nodes.Name]:
    """Return where names are read in ``tree``."""
    return [*([tree] if isinstance(tree, nodes.Name) else ()), *tree.find_all(nodes.Name)]


def _texts(names: Iterable[nodes.Name]) -> set[str]:
    return {name.name for name in names}


def with_defaults(source: str, values: Mapping[str, Value]) -> str:
    """Return ``source`` so that each of ``values`` holds where nothing else is set."""
    lines = (
        f"{{%- if {name} is not defined %}}{{%- set {name} = {_literal(value)} %}}{{%- endif %}}"
        for name, value in values.items()
    )
    return "".join(lines) + source


def _literal(value: Value) -> str:
    return "none" if value is None else json.dumps(value, ensure_ascii=False)
