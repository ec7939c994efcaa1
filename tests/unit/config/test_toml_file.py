import os

import pytest

from sftcli.config.toml_file import read_toml
from sftcli.errors import NotFoundError, StorageError, UsageError


@pytest.fixture
def write(tmp_path):
    def write(content):
        path = tmp_path / "my.toml"
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
        return path

    return write


def place(document, key):
    return (document.places[key].line, document.places[key].column)


def test_keys_know_their_line_and_column_however_they_are_written(write):
    document = read_toml(
        write(
            "# settings\n"
            "top.key = 1\n"
            "\n"
            "[training]\n"
            "  max_steps = 5   # a comment\n"
            "inline = { one = 1, two = 2 }\n"
            "[ data ] # another\n"
            "sources = [\n"
            '  "max_steps = 7",\n'
            "]\n"
            'text = """\n'
            "[not_a_table]\n"
            'not_a_key = 1"""\n'
            "'quoted key' = 1\n"
            "[data.deep]\n"
            "last = 1\n"
        ),
        name="my.toml",
    )
    assert place(document, "top.key") == (2, 5)
    assert place(document, "training") == (4, 2)
    assert place(document, "training.max_steps") == (5, 3)
    assert place(document, "training.inline.two") == (6, 21)
    assert place(document, "data") == (7, 3)
    assert place(document, "data.sources") == (8, 1)
    assert place(document, "data.text") == (11, 1)
    assert place(document, 'data."quoted key"') == (14, 2)
    assert place(document, "data.deep.last") == (16, 1)
    assert not [key for key in document.places if "not_a" in key]


def test_a_table_in_an_array_knows_its_line(write):
    assert place(read_toml(write("[[rows]]\na = 1\n[[rows]]\na = 2\n")), "rows") == (1, 3)


def test_a_key_written_with_an_escape_is_placed_at_its_line(write):
    assert place(read_toml(write('a = 1\n  "\\u0062" = 2\n')), "b") == (2, 3)


def test_a_quoted_key_with_a_dot_is_not_the_dotted_key(write):
    document = read_toml(write('"training.max_steps" = 1\n'))
    assert set(document.places) == {'"training.max_steps"'}


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (
            "[training]\nmax_steps 5\n",
            "my.toml:2:11: expected '=' after a key in a key/value pair\n    max_steps 5\n              ^",
        ),
        ("a = [1,\n2", "my.toml:2:2: unclosed array\n    2\n     ^"),
        ("a = 1\na = 2\n", "my.toml:2:6: cannot overwrite a value\n    a = 2\n         ^"),
        ("\ta = ?\n", "my.toml:1:6: invalid value\n     a = ?\n         ^"),
        (
            "a = 08",
            "my.toml:1:6: expected newline or end of document after a statement\n    a = 08\n         ^",
        ),
        ("[]", None),
        ("", "my.toml: the file is empty"),
        (" \n\n", "my.toml: the file is empty"),
        (b"a = '\xe4'", "my.toml: not UTF-8 text (byte 5)"),
        ("a = 1".encode("utf-16"), "my.toml: not UTF-8 text (byte 0)"),
        ("a = " + "[" * 100_000, "my.toml: values are nested too deeply"),
    ],
)
def test_a_file_that_is_not_toml_is_refused_at_its_line_and_column(write, content, message):
    with pytest.raises(UsageError) as caught:
        read_toml(write(content), name="my.toml")
    assert caught.value.location.file == "my.toml"
    assert message is None or caught.value.message == message


def test_an_integer_of_thousands_of_digits_is_refused(write):
    with pytest.raises(UsageError, match=r"my\.toml: "):
        read_toml(write("a = " + "1" * 5000), name="my.toml")


def test_only_the_part_of_a_long_line_around_the_fault_is_shown(write):
    with pytest.raises(UsageError) as caught:
        read_toml(write('a = "' + "x" * 500 + '" ?'), name="my.toml")
    _, source, caret = caught.value.message.split("\n")
    assert len(source) <= 104
    assert source[caret.index("^")] == "?"


def test_control_characters_of_a_broken_file_do_not_reach_the_terminal(write):
    with pytest.raises(UsageError) as caught:
        read_toml(write("a = \x1b[31m"), name="my.toml")
    assert "\x1b" not in caught.value.message


def test_a_byte_order_mark_windows_line_ends_and_comments_are_accepted(write):
    document = read_toml(write(b"\xef\xbb\xbf# note\r\na = 1\r\nb = 2\r\n"))
    assert document.tables == {"a": 1, "b": 2}
    assert place(document, "b") == (3, 1)
    assert read_toml(write("# nothing yet\n")).tables == {}


def test_a_missing_file_is_not_found(tmp_path):
    with pytest.raises(NotFoundError, match=r"no\.toml: no such file"):
        read_toml(tmp_path / "no.toml")


def test_a_folder_is_refused(tmp_path):
    with pytest.raises(UsageError, match="is a folder"):
        read_toml(tmp_path)


@pytest.mark.skipif(not hasattr(os, "geteuid"), reason="needs POSIX names")
def test_a_file_that_cannot_be_read_is_a_storage_error(tmp_path):
    with pytest.raises(StorageError, match="cannot be read"):
        read_toml(tmp_path / ("x" * 300))
