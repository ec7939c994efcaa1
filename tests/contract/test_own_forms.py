"""Every kind of file that this program writes and reads back: what is damaged is refused by its name, or is a value of the form."""

import importlib
import pkgutil
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import fields, is_dataclass
from enum import Enum
from pathlib import Path
from random import Random
from types import NoneType
from typing import Any, Literal, get_args, get_origin, get_type_hints

import pytest

import sftcli
from sftcli.errors import DataError
from sftcli.own_files import OwnFile
from tests.fuzz.damage import damaged

DAMAGES = 100  # of each kind
CHECKED = {("Decisions", "precision"): "fp32"}  # what a dataclass checks itself


def all_kinds() -> Iterator[OwnFile[Any]]:
    """Yield every kind of file of the program."""
    for found in pkgutil.walk_packages(sftcli.__path__, "sftcli."):
        if not found.name.endswith("__main__"):
            with suppress(ModuleNotFoundError):  # of an extra
                importlib.import_module(found.name)
    modules = [module for name, module in sys.modules.items() if name.startswith("sftcli.")]
    found_in = (one for module in modules for one in vars(module).values() if isinstance(one, OwnFile))
    yield from {id(one): one for one in found_in}.values()


def example(form: Any) -> Any:
    """Return a value of ``form`` with something in every place."""
    origin, arguments = get_origin(form) or form, get_args(form)
    if origin is tuple and ... not in arguments:
        return tuple(map(example, arguments))
    plain = {str: "text", int: 3, float: 0.5, bool: True, object: {"any": [1]}, NoneType: None}
    if form in plain:
        return plain[form]
    if is_dataclass(form):
        hints = get_type_hints(form)
        return form(
            **{
                one.name: CHECKED.get((form.__name__, one.name)) or example(hints[one.name])
                for one in fields(form)
            }
        )
    if isinstance(form, type) and issubclass(form, Enum):
        return next(iter(form))
    if origin is Literal:
        return arguments[0]
    if isinstance(origin, type) and issubclass(origin, Mapping):
        return {"key": example(arguments[1])}
    if isinstance(origin, type) and issubclass(origin, Sequence):
        return (list if origin is list else tuple)([example(arguments[0])])
    return example(arguments[0])  # of several


def read(kind: OwnFile[Any], path: Path) -> tuple[Any, DataError | None]:
    """Return what is in the file, or the error that says why there is nothing."""
    try:
        return kind.read(path), None
    except DataError as error:
        return None, error


KINDS = list(all_kinds())


def test_the_kinds_are_all_found():
    assert len(KINDS) >= 14


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: getattr(kind.form, "__name__", str(kind.form)))
def test_what_is_written_is_read_and_what_is_damaged_is_refused_or_whole(kind, tmp_path):
    path = tmp_path / "file.json"
    value = example(kind.form)
    kind.write(path, value)
    assert kind.read(path) == value
    good = path.read_bytes()
    refused = 0
    for seed in range(DAMAGES):
        _, content = damaged(good, ".json", Random(f"{kind.form} {seed}"))
        path.write_bytes(content or b"")
        found, error = read(kind, path)
        if error is None:
            kind.write(path, found)
            assert kind.read(path) == found or "nan" in repr(found)
            continue
        refused += 1
        assert str(path) in error.message
        assert error.hint
        assert len(error.message) < 2000
    assert refused > DAMAGES // 4
