"""Rows of a dataset on the Hugging Face hub, through `datasets`. A hub that does not answer costs seconds, not minutes."""

import queue
import threading
from collections.abc import Callable, Iterator, Mapping
from itertools import chain
from pathlib import Path
from typing import Protocol, cast

from sftcli.data.reading.json_rows import Row
from sftcli.data.reading.source import Source, near_files
from sftcli.data.reading.table_rows import arrow_dicts, numbered
from sftcli.data.reading.text_lines import Note
from sftcli.errors import ConsentError, DataError, NetworkError, NotFoundError, UsageError, first_line
from sftcli.suggest import did_you_mean

ANSWER_SECONDS = 9.0
_BATCH_ROWS = 1024


class Split(Protocol):
    """One split of a loaded dataset, memory-mapped from the hub's cache."""

    cache_files: list[dict[str, str]]

    def __len__(self) -> int: ...

    def with_format(self, type: str) -> "Split":
        """Return a view that gives tables of the named kind."""
        ...

    def iter(self, batch_size: int) -> "Iterator[_Table]":
        """Yield batches."""
        ...


class _Table(Protocol):
    def to_pylist(self) -> list[dict[str, object]]: ...


def load_split(source: Source, note: Note) -> Split:
    """Download the dataset of ``source``, or find it in the cache, and return the split that is asked for.

    Without ``@split`` it is ``train``, or the only one there is.

    Raises:
        NetworkError: The hub does not answer, and the dataset is not in the cache.
        NotFoundError: The hub has no such dataset.
        ConsentError: Access needs a login or an approval.
        UsageError: There is no such split or config.
    """
    fault = _ask_hub(source.name)
    if fault is not None and not _is_cached(source.name):
        raise _hub_fault(source.name, fault)
    if fault is not None:
        note(f"{source.name}: the hub cannot be reached; using the cached copy")
    import datasets

    datasets.disable_progress_bars()
    try:
        loaded = _load(source) if fault is None else _load_cached(source)
    except ValueError as error:
        raise UsageError(
            f"{source.text!r}: {first_line(error)}", hint="choose the config with NAME#config"
        ) from None
    except (OSError, datasets.exceptions.DatasetsError) as error:
        raise DataError(f"{source.name}: the dataset cannot be loaded: {first_line(error)}") from None
    return pick_split(cast("Mapping[str, Split]", loaded), source, note)


def pick_split(splits: Mapping[str, Split], source: Source, note: Note) -> Split:
    """Return the split that ``source`` asks for.

    Raises:
        UsageError: There is no such split, or several and none is called ``train``.
    """
    names = ", ".join(splits)
    if source.split is None:
        if len(splits) > 1 and "train" not in splits:
            raise UsageError(
                f"{source.name} has the splits {names}, none of them train",
                hint=f"choose one: {source.name}@{next(iter(splits))}",
            )
        chosen = "train" if "train" in splits else next(iter(splits))
        note(f"{source.name}: split {chosen} of {names}")
        return splits[chosen]
    if source.split not in splits:
        guess = did_you_mean(source.split, splits)
        raise UsageError(f"{source.name} has no split {source.split!r}; it has {names}", hint=guess)
    return splits[source.split]


def split_rows(split: Split, name: str) -> Callable[[], Iterator[Row]]:
    """Return a function that reads the rows from the start each time it is called."""

    def read() -> Iterator[Row]:
        tables = split.with_format("arrow").iter(batch_size=_BATCH_ROWS)
        return numbered(chain.from_iterable(map(arrow_dicts, tables)), name)

    return read


def _ask_hub(name: str) -> Exception | None:
    """Return why the hub does not give ``name``, or None when it does. Takes at most ``ANSWER_SECONDS``."""
    answers: queue.Queue[Exception | None] = queue.Queue()

    def ask() -> None:
        from huggingface_hub import HfApi

        try:
            HfApi().dataset_info(name, timeout=ANSWER_SECONDS)
        except Exception as error:  # noqa: BLE001 - handed to the caller, who tells the kinds apart
            answers.put(error)
        else:
            answers.put(None)

    # A thread, because a name server that is silent has no timeout.
    threading.Thread(target=ask, daemon=True).start()
    try:
        return answers.get(timeout=ANSWER_SECONDS)
    except queue.Empty:
        return TimeoutError(f"no answer in {ANSWER_SECONDS:.0f} seconds")


def _load(source: Source) -> object:
    import datasets

    return datasets.load_dataset(source.name, source.config)


def _load_cached(source: Source) -> object:
    """Return what an earlier download left. `load_dataset` would do the same, after half a minute of vain requests."""
    from datasets.packaged_modules.cache.cache import Cache

    return Cache(
        repo_id=source.name,
        dataset_name=source.name.split("/")[-1],
        config_name=source.config,
        version="auto",
        hash="auto",
    ).as_dataset()


def _is_cached(name: str) -> bool:
    from datasets import config
    from datasets.naming import camelcase_to_snakecase

    *owner, last = name.split("/")
    folder = Path(config.HF_DATASETS_CACHE).expanduser() / "___".join([*owner, camelcase_to_snakecase(last)])
    return any(folder.glob("*/*/*"))


def _hub_fault(name: str, fault: Exception) -> Exception:
    from huggingface_hub import errors

    if isinstance(fault, errors.GatedRepoError):
        return ConsentError(
            f"access to the dataset {name} needs approval or a login",
            hint=f"ask for access at https://huggingface.co/datasets/{name}, then run: hf auth login",
        )
    near = guess if (guess := near_files(name)).endswith("?") else ""
    if isinstance(fault, errors.RepositoryNotFoundError | errors.HFValidationError):
        return NotFoundError(
            f"no file {name!r}, and no hub dataset of that name, or it is private",
            hint=near or "check the spelling; for a private dataset run: hf auth login",
        )
    elsewhere = f"on a connected machine run: hf download --repo-type dataset {name} --local-dir FOLDER"
    return NetworkError(
        f"no file {name!r}, and the hub dataset of that name cannot be reached: {first_line(fault)}",
        hint=f"{near and near + ' otherwise '}{elsewhere}, copy FOLDER here and name the folder with its files",
    )
