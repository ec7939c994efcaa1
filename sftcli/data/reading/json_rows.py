"""JSON to rows: one object per line, one array of objects, or objects over several lines, whatever the file is called.

A key that stands twice in an object has its last value, as in Python, jq and pandas.
"""

import json
import re
from collections.abc import Iterator

from sftcli.data.reading.text_lines import (
    ByteStream,
    Note,
    data_error,
    decode,
    excerpt,
    skip_bom,
    text_lines,
)
from sftcli.errors import DataError
from sftcli.plain_yaml import MAX_DEPTH

MAX_ARRAY_BYTES = 512 * 2**20

Row = tuple[int, dict[str, object]]
"""Line or row number, 1-based, and the columns."""

_SPACE = re.compile(r"[ \t\r\n]*")
_SUSPECT = re.compile(r"\\u(?:0000|[dD][89a-fA-F])")
_TOO_DEEP = f"lists and objects that are nested more than {MAX_DEPTH} deep"
_DECODER = json.JSONDecoder()
_NAMES = {
    str: "text",
    bool: "true or false",
    int: "a number",
    float: "a number",
    list: "a list",
    dict: "an object",
}


def json_type(value: object) -> str:
    """Return what JSON calls ``value``, with its article."""
    return "null" if value is None else _NAMES.get(type(value), type(value).__name__)


def json_rows(stream: ByteStream, name: str, note: Note) -> Iterator[Row]:
    """Yield the objects of JSON lines, of one JSON array, or one after another, with the line that each begins on.

    Raises:
        DataError: The text is not such JSON; the error has line, column and an excerpt.
    """
    offset = skip_bom(stream, name, note)
    line = 1
    while (head := stream.peek(1)[:1]) and head in b" \t\r\n":
        offset += len(stream.read(1))
        line += head == b"\n"
    if head == b"[":
        yield from _array_rows(stream, name, line, offset)
        return
    is_first = True
    for number, text in text_lines(stream, name, line=line, offset=offset):
        if text.isspace():
            continue
        try:
            value = json.loads(text)
        except (ValueError, RecursionError) as error:
            ends_here = not stream.peek(1)
            if is_first and not ends_here and _breaks_off(error, text):
                yield from _spread_rows(text, stream, name, number, offset)
                return
            raise _line_fault(error, text, name, number, ends_here=ends_here) from None
        is_first = False
        yield number, _checked(value, text, name, number)


def _spread_rows(first: str, stream: ByteStream, name: str, line: int, offset: int) -> Iterator[Row]:
    """Yield objects that are written over several lines; ``first`` is the line at which they begin."""
    data = stream.read(MAX_ARRAY_BYTES + 1)
    if len(data) > MAX_ARRAY_BYTES:
        raise data_error(
            f"JSON objects over several lines of more than {MAX_ARRAY_BYTES // 2**20} MB are not supported",
            name,
            line,
            hint=f"make it one object per line: jq -c . {name} > rows.jsonl",
        )
    text = first + decode(data, name, line=line + 1, offset=offset + len(first.encode()))
    del data
    counted, position = 0, _skip_space(text, 0)
    while position < len(text):
        line += text.count("\n", counted, position)
        counted = position
        try:
            value, end = _DECODER.raw_decode(text, position)
        except (ValueError, RecursionError) as error:
            raise _array_fault(error, text, name, line, position, what="object") from None
        yield line, _checked(value, text[position:end], name, line)
        position = _skip_space(text, end)


def _array_rows(stream: ByteStream, name: str, line: int, offset: int) -> Iterator[Row]:
    """Yield the elements of the array that begins at the stream's position."""
    data = stream.read(MAX_ARRAY_BYTES + 1)
    if len(data) > MAX_ARRAY_BYTES:
        raise data_error(
            f"a JSON array of more than {MAX_ARRAY_BYTES // 2**20} MB is not supported",
            name,
            line,
            hint=f"make it one object per line: jq -c '.[]' {name} > rows.jsonl",
        )
    text = decode(data, name, line=line, offset=offset)
    del data
    counted, position, is_first = 0, 1, True
    while True:
        position = _next_element(text, position, name, line, counted, is_first=is_first)
        line += text.count("\n", counted, position)
        counted = position
        if text[position] == "]":
            break
        try:
            value, end = _DECODER.raw_decode(text, position)
        except (ValueError, RecursionError) as error:
            raise _array_fault(error, text, name, line, position) from None
        yield line, _checked(value, text[position:end], name, line)
        position, is_first = end, False
    if (rest := _skip_space(text, position + 1)) < len(text):
        raise _text_fault("text after the end of the array", text, rest, name, line, position)


def _next_element(text: str, position: int, name: str, line: int, counted: int, *, is_first: bool) -> int:
    """Return where the next element or the closing bracket stands."""
    position = _skip_space(text, position)
    if text[position : position + 1] == "]":
        return position
    if not is_first:
        if text[position : position + 1] not in ("", ","):
            raise _text_fault("broken JSON: expected ',' or ']'", text, position, name, line, counted)
        position = _skip_space(text, position + 1)
        if text[position : position + 1] == "]":
            raise _text_fault("broken JSON: a row is missing after ','", text, position, name, line, counted)
    if position >= len(text):
        raise _text_fault(
            "the array is truncated: it has no closing ']'", text, len(text), name, line, counted
        )
    return position


def _skip_space(text: str, position: int) -> int:
    match = _SPACE.match(text, position)
    return match.end() if match else position


def _text_fault(message: str, text: str, position: int, name: str, line: int, counted: int) -> DataError:
    """Return a fault at ``position``, where ``line`` is the line of the position ``counted``."""
    start = text.rfind("\n", 0, position) + 1
    end = text.find("\n", position)
    column = position - start + 1
    shown = excerpt(text[start : end if end >= 0 else len(text)], column)
    return data_error(message + shown, name, line + text.count("\n", counted, position), column)


def _array_fault(
    error: Exception, text: str, name: str, line: int, position: int, *, what: str = "array"
) -> DataError:
    if not isinstance(error, json.JSONDecodeError):
        return _value_fault(error, name, line)
    if error.pos >= len(text.rstrip()) or error.msg.startswith("Unterminated string"):
        return _text_fault(
            f"the {what} is truncated or broken: {error.msg}", text, error.pos, name, line, position
        )
    return _text_fault(f"broken JSON: {error.msg}", text, error.pos, name, line, position)


def _breaks_off(error: Exception, text: str) -> bool:
    """Return whether what is wrong with a line is that it ends too early."""
    if not isinstance(error, json.JSONDecodeError):
        return False
    return error.pos >= len(text.rstrip()) or error.msg.startswith("Unterminated string")


def _line_fault(error: Exception, text: str, name: str, line: int, *, ends_here: bool) -> DataError:
    if not isinstance(error, json.JSONDecodeError):
        return _value_fault(error, name, line)
    column = error.pos + 1
    what = (
        "the last line is truncated"
        if ends_here and _breaks_off(error, text)
        else f"broken JSON: {error.msg}"
    )
    return data_error(what + excerpt(text, column), name, line, column)


def _value_fault(error: Exception, name: str, line: int) -> DataError:
    if isinstance(error, RecursionError):
        return _too_deep(name, line)
    return data_error(f"broken JSON: {str(error).split(';', 1)[0]}", name, line)


def _too_deep(name: str, line: int) -> DataError:
    return data_error(f"lists and objects are nested more than {MAX_DEPTH} deep", name, line)


def _checked(value: object, text: str, name: str, line: int) -> dict[str, object]:
    if not isinstance(value, dict):
        raise data_error(f"the row is {json_type(value)}, expected an object with named columns", name, line)
    if _may_hold_trouble(text):
        check_values(value, name, line)
    return value


def _may_hold_trouble(text: str) -> bool:
    """Return whether the walk over all values of a row, which is slow, may find something."""
    return bool(_SUSPECT.search(text)) or text.count("[") + text.count("{") > MAX_DEPTH


def check_values(fields: dict[str, object], name: str, line: int) -> None:
    """Refuse what no tokenizer can take.

    Raises:
        DataError: A text holds a NUL or half of a surrogate pair, or values are nested too deeply.
    """
    for column, value in fields.items():
        if fault := _text_trouble(column):
            raise data_error(f"the name of a column holds {fault}", name, line, hint="remove it from the row")
        if fault := _trouble_in(value):
            if fault == _TOO_DEEP:
                raise _too_deep(name, line)
            raise data_error(f'"{column}" holds {fault}', name, line, hint="remove it from the row")


def decode_inner(text: str) -> object:
    """Return what the JSON text inside of a row holds.

    Raises:
        ValueError: It is none, or holds what no tokenizer can take; what it is then, as in "it is ...".
    """
    try:
        value: object = json.loads(text)
    except (ValueError, RecursionError):
        raise ValueError("text that is not JSON") from None
    if _may_hold_trouble(text) and (fault := _trouble_in(value)):
        raise ValueError(f"JSON text that holds {fault}")
    return value


def _trouble_in(value: object) -> str:
    pending = [(value, 2)]
    while pending:
        item, depth = pending.pop()
        if depth > MAX_DEPTH:
            return _TOO_DEEP
        if isinstance(item, str):
            if fault := _text_trouble(item):
                return fault
        elif isinstance(item, dict):
            pending.extend((inner, depth + 1) for pair in item.items() for inner in pair)
        elif isinstance(item, list):
            pending.extend((inner, depth + 1) for inner in item)
    return ""


def _text_trouble(text: str) -> str:
    if "\0" in text:
        return "a NUL character (\\u0000)"
    try:
        text.encode()
    except UnicodeEncodeError as error:
        return f"half of a surrogate pair (\\u{ord(text[error.start]):04x})"
    return ""
