"""``FILE.py:function``: a function of the user grades each answer. Only where it is named, for its file is run."""

import ast
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path

from sftcli.errors import DataError, NotFoundError, UsageError
from sftcli.input_files import read_whole
from sftcli.services.evaluate.checks.check import NAMED, AskedRow, MeanCheck
from sftcli.services.report.check_results import Grade
from sftcli.suggest import did_you_mean

SIGNATURE = "(answer, expected, row) -> bool, number from 0 to 1, or dict of these"
Function = Callable[[str, str, Mapping[str, object]], object]


@dataclass(frozen=True, slots=True, kw_only=True)
class UserCheck(MeanCheck):
    """Asks a function. What it returns is right where it, or each of its parts, is true or 1."""

    function: Function

    def grade(self, answer: str, row: AskedRow, /) -> Grade:
        """Grade one answer.

        Raises:
            DataError: The function failed, or returned something else.
        """
        try:
            said = self.function(answer, row.expected, row.fields)
        except Exception as error:
            raise DataError(
                f"{self.about} failed on {row.origin}: {type(error).__name__}: {error}",
                hint=f"its signature is {SIGNATURE}",
            ) from error
        if isinstance(said, Mapping) and said:
            parts = {str(part): self._score(value, row) for part, value in said.items()}
            return Grade(score=min(parts.values()), parts=parts)
        return Grade(score=self._score(said, row))

    def _score(self, value: object, row: AskedRow) -> float:
        try:
            score = float(value)  # type: ignore[arg-type]  # refused below
        except (TypeError, ValueError):
            score = math.nan
        if isinstance(value, str) or not 0 <= score <= 1:
            raise DataError(
                f"{self.about} returned {value!r:.60} for {row.origin}", hint=f"its signature is {SIGNATURE}"
            )
        return score


def check_function(path: Path, function: str) -> None:
    """See that the file defines the function, without running it.

    Raises:
        NotFoundError: There is no such file, or it has no such function.
        UsageError: It is not Python.
    """
    try:
        tree = ast.parse(read_whole(path))
    except OSError as error:
        raise NotFoundError(
            f"--check: cannot read {path}: {error.strerror}", hint="name a file with --check FILE.py:function"
        ) from None
    except (SyntaxError, ValueError) as error:
        raise UsageError(
            f"--check: {path} is not valid Python: {error}", hint="python -m py_compile tells where"
        ) from None
    names = [node.name for node in tree.body if isinstance(node, ast.FunctionDef)]
    if function not in names:
        raise NotFoundError(
            f"--check: {path} defines no function {function!r}",
            hint=did_you_mean(function, names)
            or f"define it at the top of the file: def {function}(answer, expected, row)",
        )


def load_function(path: Path, function: str) -> UserCheck:
    """Run the file and return the check of its function.

    Raises:
        UsageError: The file cannot be run.
    """
    check_function(path, function)
    spec = spec_from_file_location(path.stem, path)
    assert spec is not None
    assert spec.loader is not None
    module = module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
    except Exception as error:
        raise UsageError(
            f"--check: {path} cannot be run: {type(error).__name__}: {error}", hint=f"try it: python {path}"
        ) from error
    return UserCheck(
        name=function,
        about=f"{path.name}:{function}",
        found=NAMED,
        needs_rows=True,
        parts=None,
        function=getattr(module, function),
    )
