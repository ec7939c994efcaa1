"""Which rows a run has trained on, as far as they are still prepared somewhere, and which of others are among them."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from sftcli.data.prepared.store import MANIFEST, ExampleTable, PreparedDataset, fingerprint_of, open_prepared
from sftcli.data.prepared.subset import with_subset
from sftcli.errors import SftError
from sftcli.figures import counted
from sftcli.json_files import read_json
from sftcli.modeling.cache import cache_folder
from sftcli.services.runs.folder import RunFolder, read_settings


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainedRows:
    """How many of ``rows`` a run has trained on: the full row, or only its prompt. Tokens are compared."""

    rows: int
    same_row: int
    same_prompt: int  # those of ``same_row`` included

    def __str__(self) -> str:
        """Return it as a sentence."""
        if not self.same_prompt:
            return (
                "this row was not trained on"
                if self.rows == 1
                else f"none of these {self.rows:,} rows was trained on"
            )
        more = self.same_prompt - self.same_row
        said = f"{self.same_row:,} of {'this' if self.rows == 1 else 'these'} {counted(self.rows, 'row')} {_were(self.same_row)} trained on"
        return (
            f"{said}, and {more:,} more {'has' if more == 1 else 'have'} a prompt that was" if more else said
        )


def _were(rows: int) -> str:
    return "was" if rows == 1 else "were"


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
            if fingerprint_of(read_json(folder / MANIFEST)) == wanted:
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
