"""Parameters of commands that stand for several options, so that functions of commands are short.

A group is a dataclass whose fields are options, or ``Flags``. ``Annotated[Output, "json", "color"]`` takes two fields
of a dataclass, ``Annotated[Flags, "--data", "--model"]`` two rows of the table.
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import MISSING, fields, is_dataclass
from functools import wraps
from inspect import Parameter, Signature, signature
from pathlib import Path
from typing import Annotated, Any, get_args, get_origin

from sftcli.cli.options.flags import FLAGS, Flag, Flags
from sftcli.paths import as_path

_Annotation = Any  # of a parameter; what it can be has no common class


def command(function: Callable[..., None]) -> Callable[..., None]:
    """Return ``function`` as Typer takes it: each group is replaced by its options, in its place, and made of them for a call."""
    taken = signature(function).parameters.values()
    options = [option for parameter in taken for option in _options(parameter)]

    @wraps(function)
    def run(**given: object) -> None:
        function(**{parameter.name: _value(parameter, given) for parameter in taken})

    run.__signature__ = Signature(options)  # type: ignore[attr-defined]
    run.__annotations__ = {option.name: option.annotation for option in options}
    return run


def _options(parameter: Parameter) -> Iterator[Parameter]:
    """Yield the options that ``parameter`` stands for, or itself."""
    kind, chosen = _group(parameter.annotation)
    if kind is Flags:
        yield from (flag.parameter for flag in _flags(chosen))
    elif _is_dataclass(kind):
        for inner in _fields(kind, chosen):
            yield from _options(inner)
    else:
        yield parameter.replace(kind=Parameter.KEYWORD_ONLY)


def _value(parameter: Parameter, given: Mapping[str, object]) -> object:
    """Return the value of ``parameter``, made of the options it stands for."""
    kind, chosen = _group(parameter.annotation)
    if kind is Flags:
        return Flags({flag: given[flag.parameter_name] for flag in _flags(chosen)})
    if _is_dataclass(kind):
        return kind(**{inner.name: _value(inner, given) for inner in _fields(kind, chosen)})
    value = given[parameter.name]
    return as_path(value) if isinstance(value, Path) else value  # no shell knows ~ behind --flag=


def _group(annotation: _Annotation) -> tuple[_Annotation, tuple[object, ...]]:
    """Return the type of a parameter, and what is said about it within ``Annotated``."""
    origin: object = get_origin(annotation)
    kind, *said = get_args(annotation) if origin is Annotated else (annotation,)
    return kind, tuple(said)


def _is_dataclass(kind: _Annotation) -> bool:
    return is_dataclass(kind)  # by itself it narrows a type to an instance, which cannot be called


def _flags(chosen: tuple[object, ...]) -> Iterator[Flag]:
    for one in chosen:
        yield one if isinstance(one, Flag) else FLAGS[str(one)]


def _fields(kind: _Annotation, chosen: tuple[object, ...]) -> Iterator[Parameter]:
    """Yield the fields of a dataclass, or those that are ``chosen`` by name."""
    for field in fields(kind):
        if not chosen or field.name in chosen:
            default = Parameter.empty if field.default is MISSING else field.default
            yield Parameter(field.name, Parameter.KEYWORD_ONLY, default=default, annotation=field.type)
