"""``fields``: the answer is a JSON object, right key by key."""

from collections.abc import Sequence
from dataclasses import dataclass

from sftcli.services.evaluate.checks.check import AskedRow, MeanCheck, behind_thought
from sftcli.services.evaluate.checks.json_values import are_equal, read_json_value
from sftcli.services.report.check_results import Grade

NAME = "fields"


@dataclass(frozen=True, slots=True, kw_only=True)
class FieldsCheck(MeanCheck):
    """Compares the values of ``keys``. An answer is right if it has these keys, no other ones, and all their values."""

    keys: tuple[str, ...]

    def grade(self, answer: str, row: AskedRow, /) -> Grade:
        """Grade each key by its value."""
        said, want = object_in(answer), object_in(behind_thought(row.expected))
        assert want is not None
        parts = {
            key: float(said is not None and key in said and are_equal(said[key], want[key]))
            for key in self.keys
        }
        return Grade(score=float(are_equal(said, want)), parts=parts)


def fit_fields(rows: Sequence[AskedRow], _is_named: bool, /) -> FieldsCheck | str:
    """Return the check, or what does not fit."""
    keys: tuple[str, ...] = ()
    for row in rows:
        want = object_in(behind_thought(row.expected))
        if not want:
            return f"{row.origin} expects no JSON object with keys"
        if keys and set(keys) != want.keys():
            other = sorted(set(keys) ^ want.keys())[0]
            return f"{row.origin} expects an object with other keys than the rows before it ({other!r})"
        keys = keys or tuple(want)
    return FieldsCheck(
        name=NAME,
        about=f"{len(keys)} {'key' if len(keys) == 1 else 'keys'}",
        found=f"all {len(rows)} expected answers are JSON objects with the same keys",
        parts=frozenset(keys),
        keys=keys,
    )


def object_in(text: str) -> dict[str, object] | None:
    """Return the object that a text is in JSON; None where it is something else."""
    try:
        value = read_json_value(text)
    except ValueError:
        return None
    return value if isinstance(value, dict) else None
