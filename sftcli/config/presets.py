"""The presets that come with the program: named TOML files with settings, and the rows that some of them need."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from sftcli.config.toml_file import TomlDocument, read_toml
from sftcli.errors import Location, NotFoundError, UsageError
from sftcli.suggest import aside, did_you_mean

REFERENCE_PREFIX = "preset:"
_PACKAGE_FOLDER = Path(__file__).resolve().parents[1]


@dataclass(frozen=True, slots=True, kw_only=True)
class Preset:
    """A preset file. ``base`` is the preset that it extends: its settings apply where this one has none."""

    name: str
    description: str
    document: TomlDocument
    base: "Preset | None"

    @property
    def chain(self) -> Sequence["Preset"]:
        """The preset and those it is built on, the one to apply first first."""
        return (*(self.base.chain if self.base else ()), self)


def preset_folder(package_folder: Path = _PACKAGE_FOLDER) -> Path:
    """Return the folder of the presets: the installed package's own, else the one of the source tree around it.

    Raises:
        NotFoundError: The installation is incomplete.
    """
    for folder in (package_folder / "_presets", package_folder.parent / "presets"):
        if (folder / "quick.toml").is_file():  # a stranger's folder of the same name does not count
            return folder
    raise NotFoundError(
        f"the presets are missing from {package_folder}",
        hint="Install the package again.",
        location=Location(),
    )


def preset_names() -> tuple[str, ...]:
    """Return the names of all presets in alphabetical order."""
    return tuple(sorted(path.stem for path in preset_folder().glob("*.toml")))


def read_preset(name: str, *, folder: Path | None = None) -> Preset:
    """Read a preset and what it extends. ``folder`` replaces the program's own presets.

    Raises:
        UsageError: There is no such preset, or its file is not a preset.
    """
    return _read(name, folder or preset_folder(), ())


def _read(name: str, folder: Path, extended_by: tuple[str, ...]) -> Preset:
    names = sorted(path.stem for path in folder.glob("*.toml"))
    if name not in names:
        raise UsageError(
            f"no preset {name!r}{aside(did_you_mean(name, names))}",
            hint=f"Presets are {', '.join(names)}.",
            location=Location(key="preset"),
        )
    document = read_toml(folder / f"{name}.toml")
    base = _text(document, "extends")
    if base in (*extended_by, name):
        circle = " -> ".join((*extended_by, name, base))
        raise UsageError(
            f"{_place(document, 'extends')}: presets extend each other in a cycle: {circle}",
            location=document.places["extends"],
        )
    if not (description := _text(document, "description")) or "\n" in description:
        raise UsageError(
            f"{_place(document, 'description')}: a preset needs a description of one line",
            location=document.places.get("description", Location(file=document.name)),
        )
    return Preset(
        name=name,
        description=description,
        document=document,
        base=_read(base, folder, (*extended_by, name)) if base else None,
    )


def _text(document: TomlDocument, key: str) -> str:
    value = document.tables.get(key, "")
    if not isinstance(value, str):
        raise UsageError(f"{_place(document, key)}: {key} must be text", location=document.places[key])
    return value


def _place(document: TomlDocument, key: str) -> str:
    location = document.places.get(key)
    return f"{location.file}:{location.line}" if location else document.name


def preset_file(reference: str) -> Path:
    """Return the path of a file that came with a preset, named like ``preset:quick/train.jsonl``.

    Raises:
        UsageError: The reference has another form or leads out of the presets' folder.
        NotFoundError: There is no such file.
    """
    location = Location(key=reference)
    folder = preset_folder().resolve()
    relative = reference.removeprefix(REFERENCE_PREFIX)
    path = (folder / relative).resolve()
    if relative == reference or not relative or not path.is_relative_to(folder):
        raise UsageError(
            f"{reference!r} is not a preset file",
            hint="Write it as preset:NAME/FILE, such as preset:quick/train.jsonl.",
            location=location,
        )
    if not path.is_file():
        known = [
            f"{REFERENCE_PREFIX}{file.relative_to(folder).as_posix()}" for file in folder.rglob("*.jsonl")
        ]
        raise NotFoundError(
            f"no file {reference!r} among the presets{aside(did_you_mean(reference, known))}",
            location=location,
        )
    return path
