"""An error of the system is one kind to a user, wherever it happens."""

import errno
import os
from pathlib import Path

import pytest

from sftcli.errors import OutputError, StorageError
from sftcli.storage import disk_error, writing

FULL, FAILS = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG), (errno.EIO, errno.ESTALE, errno.ENOMEM)
NO_PLACE = (
    errno.EACCES,
    errno.EROFS,
    errno.ENOENT,
    errno.ENOTDIR,
    errno.EISDIR,
    errno.EEXIST,
    errno.ENAMETOOLONG,
)


@pytest.mark.parametrize(
    ("number", "kind"),
    [
        *((number, StorageError) for number in (*FULL, *FAILS)),
        *((number, OutputError) for number in NO_PLACE),
    ],
)
def test_each_number_has_its_kind_and_says_the_place(number, kind):
    error = disk_error(
        OSError(number, os.strerror(number), "elsewhere"), Path("out.html"), "choose another --out"
    )
    assert type(error) is kind
    assert "out.html" in error.message
    assert "choose another --out" in error.hint


def test_a_write_inside_the_block_is_that_error():
    with pytest.raises(OutputError, match="cannot write rows/x"), writing(Path("rows/x"), "move it"):
        raise NotADirectoryError(errno.ENOTDIR, "Not a directory")
