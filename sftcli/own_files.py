"""JSON files that this program writes and reads back: each kind has one form, by which it is checked, one reader and one writer.

A form is a frozen dataclass, or a dict, of plain types. Beside what it holds, a file has the number of its format; a file of before
there was one is of the first.
"""

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import MISSING, asdict, dataclass, fields, is_dataclass
from enum import Enum
from functools import cache
from pathlib import Path
from types import NoneType, UnionType
from typing import Annotated, Any, Generic, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

from sftcli import storage
from sftcli.errors import DataError, NotFoundError, StorageError, UsageError
from sftcli.foreign import AGAIN
from sftcli.json_files import json_text, read_json

Form = TypeVar("Form")

_FORMAT = "format"  # key of the number
_LARGEST = 2**63  # an integer that nothing here counts up to


class FormError(ValueError):
    """A value has not the form that it should have; its text says where and why."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Stamp:
    """Size and hash of a file."""

    bytes: int
    sha256: str


def stamp_of(path: Path) -> Stamp:
    """Return size and hash of the file ``path``."""
    return Stamp(bytes=path.stat().st_size, sha256=storage.file_sha256(path))


@dataclass(frozen=True, slots=True, kw_only=True)
class OwnFile(Generic[Form]):
    """A kind of file: what it holds, the number of its format and of the oldest that is read, and what to do where one is damaged."""

    form: type[Form]
    version: int = 1
    oldest: int = 1
    hint: str

    def read(self, path: Path) -> Form:
        """Return what is in the file ``path``.

        Raises:
            NotFoundError: It does not exist.
            DataError: It is damaged, something else, or of a later version.
        """
        try:
            content = read_json(path, hint=self.hint)
        except (DataError, StorageError) as error:
            hint = self.hint if error.hint in ("", AGAIN) else error.hint  # nobody has another copy
            message = error.message
            if isinstance(error, DataError):
                message = f"{path} is damaged: it {message.removeprefix(str(path)).lstrip(': ')}"
            raise DataError(message, hint=hint, location=error.location) from error
        return self.of(content, where=str(path))

    def find(self, path: Path) -> Form | None:
        """Return what is in the file ``path``; None where there is none.

        Raises:
            DataError: As ``read``.
        """
        try:
            return self.read(path)
        except NotFoundError:
            return None

    def find_whole(self, path: Path) -> Form | None:
        """Return what is in the file ``path``; None where there is none that can be read, for what is made again then."""
        try:
            return self.read(path)
        except (NotFoundError, DataError):
            return None

    def of(self, content: Mapping[str, object], *, where: str) -> Form:
        """Return the value that ``content`` stands for; ``where`` is what messages call it.

        Raises:
            DataError: It is something else, or of a later version.
        """
        rest = dict(content)
        found = rest.pop(_FORMAT, 1)
        if type(found) is not int or not self.oldest <= found <= self.version:
            newer = type(found) is int and found > self.version
            raise DataError(
                f"{where} has the format {json.dumps(found):.40}, and this version reads {self.version}",
                hint="it is of a newer version of sft: update this one" if newer else self.hint,
            )
        try:
            value: Form = as_form(rest, self.form)
        except FormError as error:
            raise DataError(f"{where} is damaged: {error}", hint=self.hint) from error
        return value

    def plain(self, value: Form) -> dict[str, object]:
        """Return the inverse of ``of``; what has its default is left out."""
        if isinstance(value, dict):
            return {_FORMAT: self.version, **{key: _plain(one) for key, one in value.items()}}
        assert is_dataclass(value)
        assert not isinstance(value, type)
        defaults = {field.name: _default(field) for field in fields(value)}
        content = {name: one for name, one in asdict(value).items() if getattr(value, name) != defaults[name]}
        return {_FORMAT: self.version, **content}

    def text(self, value: Form) -> str:
        """Return the text of a file that holds ``value``."""
        return json_text(self.plain(value))

    def write(self, path: Path, value: Form, *, kind: str = storage.TEMPORARY) -> None:
        """Put ``value`` in the place of the file ``path``, whole or not at all; ``kind`` as in ``storage.replace_file``."""
        storage.replace_file(path, self.text(value).encode(), kind=kind)


def _plain(value: object) -> object:
    return asdict(value) if is_dataclass(value) and not isinstance(value, type) else value


def as_form(value: object, form: Any, at: str = "") -> Any:  # noqa: ANN401 - it is of ``form``
    """Return ``value``, as JSON has it, in the type ``form``; ``at`` is where it stands in a file.

    Raises:
        FormError: It is of another type.
    """
    origin, arguments = get_origin(form) or form, get_args(form)
    if origin is Annotated:
        return _checked(value, arguments[0], arguments[1:], at)
    if form in _PLAIN:
        return _PLAIN[form](value, at)
    if origin in (Union, UnionType):
        return _one_of(value, arguments, at)
    if origin is Literal:
        return (
            value
            if value in arguments and type(value) is not bool
            else _refuse(value, at, f"one of {arguments}")
        )
    if is_dataclass(form):
        return _record(value, form, at)
    if isinstance(form, type) and issubclass(form, Enum):
        return next((one for one in form if one.value == value), None) or _refuse(value, at, form.__name__)
    if issubclass(origin, str):
        return _text(value, at)
    if issubclass(origin, Mapping):
        return {
            _text(key, at): as_form(one, (arguments or (str, object))[1], _inside(at, key))
            for key, one in (value if isinstance(value, dict) else _refuse(value, at, "an object")).items()
        }
    if issubclass(origin, Sequence):
        return _listed(value, origin, arguments, at)
    raise TypeError(f"{form} is no form")


def _checked(value: object, form: Any, checks: Sequence[Callable[[Any], object]], at: str) -> object:  # noqa: ANN401
    found = as_form(value, form, at)
    try:
        for check in checks:
            check(found)
    except UsageError as error:
        raise FormError(f"{at or 'it'}: {error.message}") from error
    return found


def _record(value: object, form: Any, at: str) -> object:  # noqa: ANN401 - a dataclass
    content = value if isinstance(value, dict) else _refuse(value, at, "an object")
    found: dict[str, object] = {}
    for field in fields(form):
        if field.name in content:
            found[field.name] = as_form(
                content[field.name], _hints(form)[field.name], _inside(at, field.name)
            )
        elif _default(field) is MISSING:
            raise FormError(f"{_inside(at, field.name)} is missing")
    try:
        return form(**found)
    except ValueError as error:  # what the dataclass checks itself
        raise FormError(f"{at or 'it'}: {error}") from error


def _listed(value: object, origin: type, arguments: tuple[Any, ...], at: str) -> object:
    items = value if isinstance(value, list) else _refuse(value, at, "a list")
    forms = arguments or (object,)
    if origin is tuple and ... not in forms:
        if len(items) != len(forms):
            _refuse(value, at, f"a list of {len(forms)}")
        each: Sequence[Any] = forms
    else:
        each = [forms[0]] * len(items)
    found = [
        as_form(one, form, f"{at}[{place}]")
        for place, (one, form) in enumerate(zip(items, each, strict=True))
    ]
    return found if origin is list else tuple(found)


def _one_of(value: object, forms: tuple[Any, ...], at: str) -> object:
    if value is None and NoneType in forms:
        return None
    rest = [form for form in forms if form is not NoneType]
    for form in rest[:-1]:
        try:
            return as_form(value, form, at)
        except FormError:
            continue
    return as_form(value, rest[-1], at)


def _text(value: object, at: str) -> str:
    if not isinstance(value, str):
        _refuse(value, at, "text")
    try:
        str(value).encode()
    except UnicodeEncodeError:
        _refuse(value, at, "text that can be written")
    return str(value)


def _whole(value: object, at: str) -> int:
    if type(value) is not int or not -_LARGEST <= value < _LARGEST:
        return int(_refuse(value, at, "a whole number"))
    return value


def _number(value: object, at: str) -> float:
    return (
        value
        if type(value) is float
        else float(_whole(value, at))
        if type(value) is int
        else _refuse(value, at, "a number")
    )


def _flag(value: object, at: str) -> bool:
    return value if isinstance(value, bool) else _refuse(value, at, "true or false")


def _nothing(value: object, at: str) -> object:
    return value if value is None else _refuse(value, at, "null")


_PLAIN: Mapping[Any, Callable[[object, str], object]] = {
    str: _text, int: _whole, float: _number, bool: _flag, NoneType: _nothing, object: lambda value, _: value, Any: lambda value, _: value,
}  # fmt: skip


def _refuse(value: object, at: str, wanted: str) -> Any:  # noqa: ANN401 - never
    shown = (
        json.dumps(value)
        if isinstance(value, str | int | float | None) and value not in {""}
        else type(value).__name__
    )
    shown = {"dict": "an object", "list": "a list", "str": '""'}.get(shown, shown)
    raise FormError(f"{at or 'it'} is {shown:.60}, and not {wanted}")


def _inside(at: str, key: object) -> str:
    return f"{at}.{key}" if at else str(key)


@cache
def _hints(form: Any) -> dict[str, Any]:  # noqa: ANN401 - a dataclass
    return get_type_hints(form, include_extras=True)


def _default(field: Any) -> object:  # noqa: ANN401 - of a dataclass
    return field.default_factory() if field.default_factory is not MISSING else field.default
