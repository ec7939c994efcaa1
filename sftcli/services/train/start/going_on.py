"""Training that goes on from a run or an adapter: its model, or its base and its shape, become those of the new run."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

from sftcli.config.auto import value_of
from sftcli.config.layers import PRESET_ORIGIN, Override
from sftcli.config.resolve import DEFAULT_ORIGIN, Resolved
from sftcli.config.schema.adapter import AUTO_TARGETS
from sftcli.config.schema.settings import Settings
from sftcli.errors import UsageError
from sftcli.modeling.adapter.folder import is_adapter_folder, read_base, read_shape
from sftcli.modeling.locate.default_model import ALIAS
from sftcli.paths import as_path
from sftcli.services.runs.folder import RunFolder
from sftcli.services.runs.outcome import model_of

START = "adapter.start_from"
_MODEL = "model.name"
# What the adapter's numbers fit to. Dropout and the form of the base are free in each run.
_SHAPE = ("kind", "rank", "alpha", "target_modules", "experts", "rslora")


def resolved_with_start(resolve: Callable[[Sequence[Override]], Resolved]) -> Resolved:
    """Return what ``resolve`` makes of the settings that follow from the others: those of a run or adapter that is trained on."""
    resolved = resolve(())
    found = overrides_of_start(resolved)
    if not found:
        return resolved
    resolved = resolve(found)
    return replace(resolved, notices=(*resolved.notices, going_on_text(resolved.settings)))


def overrides_of_start(resolved: Resolved) -> tuple[Override, ...]:
    """Return the settings that follow from the run or adapter that ``resolved`` goes on from; none where it does from none.

    An adapter is the folder of ``adapter.start_from``, or ``model.name`` is its folder or a run that trained one. Of another
    run it is the folder of its model that becomes the name.

    Raises:
        UsageError: A setting was typed that the adapter does not fit to, or it is of a kind that is not trained here.
        NotFoundError, DataError: A file is missing or damaged, or the run has no model.
    """
    settings = resolved.settings
    folder = _folder_of(settings)
    if folder is None:
        return ()
    if not is_adapter_folder(folder):
        return (Override(key=_MODEL, value=str(folder), origin=f"the run {settings.model.name}"),)
    shape = read_shape(folder)
    found: dict[str, object] = {f"adapter.{name}": getattr(shape, name) for name in _SHAPE}
    for key, value in found.items():
        _require_fits(resolved, key, value, folder)
    if not _is_typed(resolved.origins["adapter.dropout"]):
        found["adapter.dropout"] = shape.dropout
    found[START] = str(folder)
    if settings.adapter.start_from is None:
        base = read_base(folder)
        of_base = {"model.revision": base.revision, "model.tokenizer": base.tokenizer}
        for key, value in of_base.items():
            _require_fits(resolved, key, value, folder)
        found |= {_MODEL: base.name, **of_base}
    return tuple(
        Override(key=key, value=value, origin=f"the adapter {folder}") for key, value in found.items()
    )


def going_on_text(settings: Settings) -> str:
    """Return what a person should know of the run or adapter that a run with ``settings`` goes on from."""
    if settings.adapter.start_from is None:
        return f"training on from the model {settings.model.name}"
    return (
        f"training on from the adapter {settings.adapter.start_from}: {settings.adapter.described()}; "
        f"its base is {settings.model.name}"
    )


def _folder_of(settings: Settings) -> Path | None:
    """Return the folder of a run's model or of an adapter, by its whole path: a later command may be given elsewhere."""
    if settings.adapter.start_from is not None:
        folder = as_path(settings.adapter.start_from)
        if not is_adapter_folder(folder):
            raise UsageError(f"{START} is {folder}, which is not the folder of an adapter")
        return folder.absolute()
    name = settings.model.name
    if name == ALIAS:
        return None
    for path in (as_path(name), Path(settings.run.root) / name):
        if (path / "run.json").is_file():
            return model_of(RunFolder(path)).absolute()
        if is_adapter_folder(path):
            return path.absolute()
        if path.exists():
            return None
    return None


def _require_fits(resolved: Resolved, key: str, value: object, folder: Path) -> None:
    asked, origin = value_of(resolved.settings, key), resolved.origins[key]
    if asked not in (value, (AUTO_TARGETS,)) and _is_typed(origin):
        raise UsageError(
            f"{key} is {_shown(asked)} ({origin}), and the adapter {folder} has {_shown(value)}; it is trained on as it is",
            hint=f"leave {key} out; or for a new adapter merge this one first, sft export {folder} --to hf --out MERGED, "
            "and train on that: --model MERGED",
        )


def _is_typed(origin: str) -> bool:
    return origin != DEFAULT_ORIGIN and not origin.startswith(PRESET_ORIGIN)


def _shown(value: object) -> str:
    return ", ".join(map(str, value)) if isinstance(value, tuple) else str(value).lower()
