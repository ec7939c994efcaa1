"""Which rows a run has trained on, as far as they are still prepared somewhere, and which of others are among them."""

from collections.abc import Iterator
from pathlib import Path

from sftcli.cache import cache_folder
from sftcli.data.prepared.store import (
    MANIFEST,
    ExampleTable,
    PreparedDataset,
    fingerprint_of,
    open_prepared,
    read_manifest,
)
from sftcli.data.prepared.subset import with_subset
from sftcli.errors import SftError
from sftcli.events import EventSink, Warned
from sftcli.services.runs.folder import RunFolder, read_settings
from sftcli.services.runs.overlap import TrainedRows


def count_trained(trained: ExampleTable, rows: ExampleTable) -> TrainedRows:
    """Return how many of ``rows`` are among ``trained``, which are read once and not held."""
    asked = list(rows.keys())
    wanted_rows, wanted_prompts = {row for row, _ in asked}, {prompt for _, prompt in asked}
    same_rows, same_prompts = set[bytes](), set[bytes]()
    for row, prompt in trained.keys():  # noqa: SIM118 - no mapping
        if prompt in wanted_prompts:
            same_prompts.add(prompt)
            if row in wanted_rows:
                same_rows.add(row)
    return TrainedRows(
        rows=len(asked),
        same_row=sum(row in same_rows for row, _ in asked),
        same_prompt=sum(prompt in same_prompts for _, prompt in asked),
    )


def are_rows_of(run: RunFolder, dataset: PreparedDataset, emit: EventSink) -> bool:
    """Return whether ``dataset``, prepared from the settings of ``run``, holds the rows that it was trained on; others are told of."""
    if run.data_fingerprint() in (None, dataset.fingerprint):
        return True
    text = f"the rows are not those that {run.name} was trained on: their files, or what prepares them, changed since"
    emit(Warned(text=text))
    return False


def prepared_rows_of(run: RunFolder) -> PreparedDataset | None:
    """Return what ``run`` was trained on, found by its content; None where it is no longer prepared anywhere.

    Rows of earlier runs that it replayed are behind its own.
    """
    wanted = run.data_fingerprint()
    found = None if wanted is None else _prepared_as(wanted, run)
    if found is None or not run.earlier.is_dir():
        return found
    try:
        return found.joined(open_prepared(run.earlier).train, {})
    except (OSError, KeyError, SftError):
        return None


def _prepared_as(wanted: str, run: RunFolder) -> PreparedDataset | None:
    for folder in _prepared_folders(run):
        try:
            if fingerprint_of(read_manifest(folder)) == wanted:
                return with_subset(open_prepared(folder), read_settings(run).data)
        except (OSError, KeyError, TypeError, SftError):
            continue
    return None


def _prepared_folders(run: RunFolder) -> Iterator[Path]:
    try:
        stores = [cache_folder() / "prepared", run.path / "cache"]
    except SftError:
        stores = [run.path / "cache"]
    for store in stores:
        yield from (manifest.parent for manifest in sorted(store.glob(f"*/{MANIFEST}")))
