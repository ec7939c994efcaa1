"""The file behind ``--config``: TOML, YAML or JSON with our sections, a pipeline's JSON, or another trainer's configuration."""

import json
from collections.abc import Container, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from sftcli.config.foreign_config import is_foreign, read_foreign
from sftcli.config.pipeline_json import is_pipeline, read_pipeline
from sftcli.config.toml_file import TomlDocument, dotted, read_text, read_toml, tables_of
from sftcli.errors import Location, UsageError
from sftcli.plain_yaml import YamlFaultError, keys_as_text, yaml_documents, yaml_places, yaml_values

_YAML = (".yaml", ".yml")


@dataclass(frozen=True, slots=True, kw_only=True)
class ConfigFile:
    """Settings with their places, what a person should know of the rest, and what the file says about a model."""

    document: TomlDocument
    notices: tuple[str, ...] = ()
    model_keys: Mapping[str, object] = field(default_factory=dict)


def read_config(path: Path, sections: frozenset[str], typed: Container[str] = ()) -> ConfigFile:
    """Read a configuration, by its suffix and then by its keys; ``sections`` are ours. Keys that nobody knows are kept.

    ``typed`` are settings that the command line has, and that another trainer's file need not be understood for.

    Raises:
        NotFoundError: There is no such file.
        UsageError: It is empty, broken, or another trainer's with keys that cannot be taken.
        StorageError: It cannot be read.
    """
    if path.suffix not in (*_YAML, ".json"):
        return ConfigFile(document=read_toml(path))
    name = str(path)
    text = read_text(path, name)
    document = _json_document(text, name) if path.suffix == ".json" else _yaml_document(text, name)
    content = document.tables
    if any(isinstance(content.get(section), dict) for section in sections):
        return ConfigFile(document=document)
    if is_pipeline(content):
        return _pipeline(content, name)
    if is_foreign(content):
        return _foreign(document, typed)
    return ConfigFile(document=document)


def _pipeline(content: Mapping[str, object], name: str) -> ConfigFile:
    found = read_pipeline(content, name)
    notices = (
        (f"{name}: keys of other stages are ignored: {', '.join(found.ignored)}",) if found.ignored else ()
    )
    return ConfigFile(document=found.document, notices=notices, model_keys=found.model_keys)


def _foreign(document: TomlDocument, typed: Container[str]) -> ConfigFile:
    found = read_foreign(document.tables, typed)
    if found.refused:
        lines = [f"  {document.places.get(key, key)}: {key}: {why}" for key, why in found.refused.items()]
        raise UsageError(
            "\n".join([f"{document.name}: {_counted(lines)} of another trainer cannot be taken:", *lines]),
            hint="Take them out of the file, and type what is needed in their place.",
            location=next((document.places[key] for key in found.refused if key in document.places), None),
        )
    tables = tables_of({ours: value for ours, (value, _) in found.settings.items()})
    places = {
        ours: document.places.get(theirs, Location(file=document.name))
        for ours, (_, theirs) in found.settings.items()
    }
    notice = f"{document.name}: read as another trainer's configuration"
    if found.ignored:
        notice += f"; without meaning here: {', '.join(dict.fromkeys(found.ignored))}"
    return ConfigFile(
        document=TomlDocument(name=document.name, tables=tables, places=places), notices=(notice,)
    )


def _counted(lines: list[str]) -> str:
    return "a key" if len(lines) == 1 else f"{len(lines)} keys"


def _json_document(text: str, name: str) -> TomlDocument:
    location = Location(file=name)
    try:
        content = json.loads(text)
    except json.JSONDecodeError as error:
        place = Location(file=name, line=error.lineno, column=error.colno)
        raise UsageError(f"{place}: not JSON: {error.msg}", location=place) from None
    except (ValueError, RecursionError) as error:
        raise UsageError(f"{name}: not JSON: {error}", location=location) from None
    if not isinstance(content, dict):
        raise UsageError(f"{name}: not a JSON object", location=location)
    try:  # JSON is YAML, but for a few spellings whose places are then not known
        places = _yaml_document(text, name).places
    except UsageError:
        places = {}
    return TomlDocument(name=name, tables=content, places=places)


def _yaml_document(text: str, name: str) -> TomlDocument:
    try:
        nodes = list(yaml_documents(text))
        if len(nodes) != 1 or nodes[0].id != "mapping":
            raise UsageError(
                f"{name}: expected one YAML document with keys and values", location=Location(file=name)
            )
        keys_as_text(nodes[0])
        tables = next(yaml_values(nodes))
        places = {
            dotted(*path): Location(file=name, line=line, column=column)
            for path, line, column in yaml_places(nodes[0])
        }
    except YamlFaultError as fault:
        place = Location(file=name, line=fault.line, column=fault.column)
        raise UsageError(f"{place}: {fault.text}", hint=fault.hint, location=place) from None
    assert isinstance(tables, dict)
    return TomlDocument(name=name, tables=tables, places=places)
