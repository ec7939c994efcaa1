"""Settings and packages of two runs, where they differ."""

from dataclasses import dataclass

from sftcli.config.auto import value_of
from sftcli.config.schema.settings import FIELDS
from sftcli.services.runs.folder import RunFolder, resolve_run

_WHERE_IT_IS = "run."  # section of names and folders, which differ in any case


@dataclass(frozen=True, slots=True, kw_only=True)
class ChangedSetting:
    """A settings key with its values, and where each came from."""

    key: str
    before: object
    after: object
    before_from: str
    after_from: str


@dataclass(frozen=True, slots=True, kw_only=True)
class ChangedFact:
    """A version, or another fact of a start; None where the run does not tell."""

    name: str
    before: str | None
    after: str | None


def changed_settings(before: RunFolder, after: RunFolder) -> tuple[ChangedSetting, ...]:
    """Return the settings that differ, in the order of the schema; those that say where a run is stay out.

    Raises:
        NotFoundError, UsageError: A run lacks its settings, or they cannot be read.
    """
    first, second = resolve_run(before), resolve_run(after)
    origins = [run.first_origins() for run in (before, after)]
    return tuple(
        ChangedSetting(
            key=key,
            before=value_of(first.settings, key),
            after=value_of(second.settings, key),
            before_from=origins[0].get(key, first.origins[key]),
            after_from=origins[1].get(key, second.origins[key]),
        )
        for key in FIELDS
        if not key.startswith(_WHERE_IT_IS)
        and value_of(first.settings, key) != value_of(second.settings, key)
    )


def changed_facts(before: RunFolder, after: RunFolder) -> tuple[ChangedFact, ...]:
    """Return the versions and other facts that differ."""
    first, second = (_facts(run) for run in (before, after))
    return tuple(
        ChangedFact(name=name, before=first.get(name), after=second.get(name))
        for name in dict.fromkeys((*first, *second))
        if first.get(name) != second.get(name)
    )


def _facts(run: RunFolder) -> dict[str, str]:
    record = run.record()
    named = {"sft": record.version, "python": record.python, "torch": record.torch}
    made = {
        "weights of the base": record.base and record.base.revision,
        "precision": record.decisions and record.decisions.precision,
    }
    return {name: value for name, value in {**named, **record.packages, **made}.items() if value}
