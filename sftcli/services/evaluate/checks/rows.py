"""Rows as their files have them, for checks that look at more than the expected answer."""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace

from sftcli.config.schema.settings import Settings
from sftcli.data.conversations.detect import parse_renames, renamed
from sftcli.data.conversations.turns import tool_list
from sftcli.data.reading.record import RawRecord
from sftcli.data.reading.records import read_records
from sftcli.services.evaluate.checks.check import AskedRow
from sftcli.services.prepare.sources import find_sources


def with_rows(rows: Sequence[AskedRow], settings: Settings) -> list[AskedRow]:
    """Return ``rows`` with their fields and tools, read again from the sources of ``settings``."""
    names = parse_renames(settings.data.renames)
    found = _records(settings, {row.origin for row in rows})
    return [
        replace(
            row, fields=found[row.origin].fields, tools=tool_list(renamed(found[row.origin].fields, names))
        )
        if row.origin in found
        else row
        for row in rows
    ]


def _records(settings: Settings, wanted: Collection[str]) -> Mapping[str, RawRecord]:
    sources = find_sources(settings.data)
    found: dict[str, RawRecord] = {}
    for source in (*sources.heldout, *sources.train):
        for record in read_records(source, seed=settings.training.seed):
            if (origin := str(record.origin)) in wanted:
                found.setdefault(origin, record)
        if len(found) == len(wanted):
            break
    return found
