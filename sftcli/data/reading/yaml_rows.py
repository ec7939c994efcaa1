"""YAML to rows: a list of objects, or one object a document; see ``plain_yaml`` for what words and numbers mean."""

from collections.abc import Iterator

from sftcli.data.reading.json_rows import Row, check_values, json_type
from sftcli.data.reading.text_lines import ByteStream, Note, data_error, whole_text
from sftcli.plain_yaml import YamlFaultError, yaml_documents, yaml_values

MAX_BYTES = 16 * 2**20


def yaml_rows(stream: ByteStream, name: str, note: Note) -> Iterator[Row]:
    """Yield the rows of YAML text with the line that each begins on.

    Raises:
        DataError: The text is not such YAML, or too long.
    """
    text = whole_text(
        stream,
        name,
        note,
        max_bytes=MAX_BYTES,
        too_long=f"YAML of more than {MAX_BYTES // 2**20} MB is not supported",
        hint="convert it to JSON lines, one object per line",
    )
    try:
        for document in yaml_documents(text):
            nodes = document.value if document.id == "sequence" else [document]
            for node, value in zip(nodes, yaml_values(nodes), strict=True):
                line = node.start_mark.line + 1
                yield line, _fields(value, name, line)
    except YamlFaultError as fault:
        raise data_error(fault.text, name, fault.line, fault.column, hint=fault.hint) from None


def _fields(value: object, name: str, line: int) -> dict[str, object]:
    if not isinstance(value, dict):
        raise data_error(f"the row is {json_type(value)}, expected an object with named columns", name, line)
    _check_plain(value, name, line)
    check_values(value, name, line)
    return value


def _check_plain(value: object, name: str, line: int) -> None:
    """See that a value is one that JSON has too."""
    if isinstance(value, dict):
        for key, inner in value.items():
            if not isinstance(key, str):
                raise data_error(
                    f"the name {key!r} is {json_type(key)}, expected text",
                    name,
                    line,
                    hint=f'put it in quotes: "{key}"',
                )
            _check_plain(inner, name, line)
    elif isinstance(value, list):
        for inner in value:
            _check_plain(inner, name, line)
    elif not isinstance(value, str | int | float | None):
        raise data_error(f"a value is {json_type(value)}, expected a plain one", name, line)
