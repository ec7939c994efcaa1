"""Whatever a library raises over a file is one error that names it; what a file is instead is told by its first bytes."""

import errno
import gzip
import io
import os
import pickle
import zipfile
from pathlib import Path

import pytest

from sftcli.errors import (
    DataError,
    MismatchError,
    NotFoundError,
    ResourceError,
    SftError,
    StorageError,
    UsageError,
)
from sftcli.foreign import damaged, foreign_file, kind_of, without_panics


class Panic(BaseException):
    """As a library of Rust raises it."""


def told(error: BaseException, path: Path) -> SftError:
    with pytest.raises(SftError) as caught, foreign_file(path, "cannot be loaded"):
        raise error
    return caught.value


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "config.json"
    path.write_text("{}")
    return path


@pytest.mark.parametrize(
    ("error", "cause"),
    [
        (ZeroDivisionError("division by zero"), "division by zero"),
        (AssertionError(), "a check of its content fails (AssertionError)"),
        (SystemError("bad call"), "bad call"),
        (OverflowError("too large"), "too large"),
        (RecursionError("maximum recursion depth"), "its parts are nested too deeply"),
        (KeyError("rope"), "'rope' is missing or not known"),
        (Panic("index out of bounds\nbacktrace"), "index out of bounds"),
        (ValueError("field 'a':\n    expected int\nmore"), "field 'a': expected int"),
        (OSError("It looks like a config"), "It looks like a config"),
        (OSError(errno.EINVAL, "Invalid argument"), "it leads to places that it has not"),
        (StopIteration(), "a check of its content fails (StopIteration)"),
        (ValueError("x" * 999), "x" * 300 + "..."),
    ],
)
def test_an_error_of_a_library_names_the_file_and_its_cause_in_a_line(
    file: Path, error: BaseException, cause: str
):
    found = told(error, file)
    assert type(found) is DataError
    assert (found.message, found.location.file) == (f"{file} cannot be loaded: {cause}", str(file))
    assert found.hint


@pytest.mark.parametrize(
    ("error", "kind"),
    [
        (ImportError("needs optimum"), UsageError),
        (FileNotFoundError(errno.ENOENT, "No such file", "a.bin"), NotFoundError),
        (FileNotFoundError("a.bin"), NotFoundError),
        (OSError(errno.EIO, "Input/output error"), StorageError),
        (PermissionError(errno.EACCES, "Permission denied"), StorageError),
    ],
)
def test_what_is_not_the_files_fault_keeps_its_kind(file: Path, error: BaseException, kind: type[SftError]):
    assert type(told(error, file)) is kind


@pytest.mark.parametrize(
    "error", [MemoryError(), RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory")]
)
def test_memory_runs_out_over_a_large_file_and_a_small_one_that_wants_more_than_there_is_is_wrong(
    file: Path, error: Exception
):
    small = told(error, file)
    assert isinstance(small, DataError)
    assert "larger than the memory" in small.message
    os.truncate(file, 2 << 20)
    assert type(told(error, file)) is ResourceError


@pytest.mark.parametrize("error", [MismatchError("shapes"), KeyboardInterrupt(), SystemExit(3)])
def test_errors_of_this_program_and_what_ends_it_pass(file: Path, error: BaseException):
    with pytest.raises(type(error)) as caught, foreign_file(file):
        raise error
    assert caught.value is error


def zipped() -> bytes:
    sink = io.BytesIO()
    with zipfile.ZipFile(sink, "w") as archive:
        archive.writestr("a", "b")
    return sink.getvalue()


@pytest.mark.parametrize(
    ("content", "kind"),
    [
        (b"version https://git-lfs.github.com/spec/v1\n", "a pointer of Git LFS"),
        (b"\n<!DOCTYPE html><html></html>", "an HTML page"),
        (b"<HTML>", "an HTML page"),
        ("{}".encode("utf-16"), "UTF-16 text"),
        ("{}".encode("utf-32"), "UTF-32 text"),
        (gzip.compress(b"{}", mtime=0), "compressed (gzip)"),
        (b"\x28\xb5\x2f\xfd\0", "compressed (zstd)"),
        (zipped(), "a zip archive"),
        (pickle.dumps({"a": 1}), "a pickle"),
        (b"GGUF\x03\0", "a GGUF file"),
        (b"PAR1", "a Parquet file"),
        (b"", "is empty"),
        (b"\0" * 99, "zeros only"),
    ],
)
def test_the_first_bytes_tell_what_a_file_is(tmp_path: Path, content: bytes, kind: str):
    path = tmp_path / "model.safetensors"
    path.write_bytes(content)
    found = damaged(path, "cannot be read")
    assert kind in found.message
    assert "cannot be read" not in found.message
    assert found.hint
    assert told(ValueError("header"), tmp_path).message == found.message  # also of the folder that it is in


@pytest.mark.parametrize(
    ("name", "content"), [("a.pt", zipped()), ("a.gz", gzip.compress(b"x", mtime=0)), ("a.json", b'{"a": 1}')]
)
def test_a_file_is_not_told_as_what_its_name_says(tmp_path: Path, name: str, content: bytes):
    (tmp_path / name).write_bytes(content)
    assert kind_of(tmp_path / name) is None
    assert kind_of(tmp_path / "missing") is None


def test_nothing_is_shown_of_a_panic_and_all_of_what_follows(capfd: pytest.CaptureFixture[str]):
    def panic() -> None:
        with without_panics(), without_panics():
            os.write(2, b"thread panicked")
            raise Panic

    with pytest.raises(Panic):
        panic()
    os.write(2, b"after")
    assert capfd.readouterr().err == "after"
