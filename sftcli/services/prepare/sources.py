"""Where rows are: found by name, before anything is read or a model is loaded. Needs no torch."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from sftcli.config.schema.data import DataSettings
from sftcli.data.reading.source import Source, parse_source
from sftcli.errors import NotFoundError, UsageError
from sftcli.suggest import aside


@dataclass(frozen=True, slots=True, kw_only=True)
class Sources:
    """Where rows are, found but not yet read."""

    train: tuple[Source, ...]
    heldout: tuple[Source, ...]
    text: tuple[Source, ...] = ()

    def all(self) -> tuple[Source, ...]:
        """Return the sources of all three kinds."""
        return (*self.train, *self.heldout, *self.text)


def find_sources(data: DataSettings) -> Sources:
    """Find what ``data`` names: fast, so that a slip of the finger is told before a model is fetched for nothing.

    Raises:
        UsageError: No source was named.
        NotFoundError: A file is not there.
    """
    if not data.sources and not data.heldout_sources:
        raise UsageError(
            "there is no data to train on",
            hint="name a file or a hub dataset: --data rows.jsonl, or use a preset",
        )
    if data.text_fraction and not data.text_sources:
        raise UsageError(
            f"data.text_fraction is {data.text_fraction}, but there is no pretraining text",
            hint="name some: --set data.text_sources=texts.jsonl, rows with a column text",
        )
    missing: list[NotFoundError] = []
    train, heldout, text = (
        tuple(_parsed(names, missing)) for names in (data.sources, data.heldout_sources, data.text_sources)
    )
    if missing:
        raise _in_one(missing)
    if repeated := next((source for source in heldout if source.times > 1), None):
        raise UsageError(
            f"{repeated.text!r}: held-out rows cannot be repeated",
            hint=f"leave out x{repeated.times}",
        )
    return Sources(train=train, heldout=heldout, text=text)


def _parsed(names: Sequence[str], missing: list[NotFoundError]) -> Iterator[Source]:
    for name in names:
        try:
            yield parse_source(name)
        except NotFoundError as error:
            missing.append(error)


def _in_one(missing: Sequence[NotFoundError]) -> NotFoundError:
    first = missing[0]
    if len(missing) == 1:
        return first
    lines = [f"  {error.message}{aside(error.hint)}" for error in missing]
    return NotFoundError(
        "\n".join([f"{len(missing)} sources are not there:", *lines]), location=first.location
    )
