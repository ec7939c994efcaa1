"""Results are shown once the view is closed: within a session they would stand behind a line that is drawn again and again."""

import ast
from pathlib import Path

import pytest

import sftcli.cli.commands

MODULES = sorted(Path(sftcli.cli.commands.__file__).parent.glob("*.py"))


def name_of(call: ast.Call) -> str:
    return ast.unparse(call.func).rpartition(".")[2]


def shown_within(tree: ast.AST) -> list[str]:
    return [
        f"{call.lineno}: {name_of(call)}"
        for block in ast.walk(tree)
        if isinstance(block, ast.With)
        and any(
            isinstance(item.context_expr, ast.Call) and name_of(item.context_expr) == "session"
            for item in block.items
        )
        for statement in block.body
        for call in ast.walk(statement)
        if isinstance(call, ast.Call) and name_of(call).lstrip("_").startswith(("show", "print"))
    ]


@pytest.mark.parametrize("module", MODULES, ids=lambda path: path.stem)
def test_no_command_shows_a_result_within_its_session(module: Path) -> None:
    assert shown_within(ast.parse(module.read_text(encoding="utf-8"))) == []


def test_a_result_within_a_session_would_be_found() -> None:
    assert shown_within(ast.parse("with session(x) as y:\n    if z:\n        results.show_plan(z)")) == [
        "3: show_plan"
    ]
