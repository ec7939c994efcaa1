"""What a user names may be a device or a pipe: it is read to a limit, or refused, and never waited for without end."""

import os
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from sftcli import input_files
from sftcli.config.toml_file import read_toml
from sftcli.data.reading.source import parse_source
from sftcli.errors import DataError, SftError, StorageError
from sftcli.input_files import open_input, read_whole, read_whole_text
from sftcli.modeling.tokenizer.chat_tokenizer import named_template
from sftcli.services.generate.prompt_file import read_prompts

ROW = b'{"prompt": "Is 1 a number?"}\n'


@pytest.fixture
def pipe(tmp_path):
    path = tmp_path / "rows.jsonl"
    os.mkfifo(path)
    return path


@pytest.mark.parametrize(
    ("read", "words"),
    [
        (read_whole, "/dev/zero does not end; more than 128 MB are not read"),
        (read_toml, "/dev/zero does not end; more than 4 MB are not read"),
        (lambda path: named_template(str(path)), "/dev/zero does not end; more than 4 MB are not read"),
        (lambda path: parse_source(str(path)), "/dev/zero is a device, not a file of rows"),
        (lambda path: read_prompts(path, system=""), "/dev/zero is a device, not a file of rows"),
    ],
    ids=["whole", "settings", "template", "rows", "prompts"],
)
def test_a_device_without_an_end_is_refused(read, words):
    began = time.process_time()
    with pytest.raises(SftError, match=words):
        read(Path("/dev/zero"))
    assert time.process_time() - began < 10


def test_a_file_over_the_limit_is_refused_without_being_read(tmp_path):
    path = tmp_path / "big"
    with path.open("wb") as file:
        file.truncate(1 << 40)
    with pytest.raises(DataError, match="big has 1048576 MB; more than 128 MB are not read"):
        read_whole(path)


def test_a_pipe_that_nobody_writes_to_is_refused(pipe, monkeypatch):
    monkeypatch.setattr(input_files, "WRITER_SECONDS", 0.2)
    threads = threading.active_count()
    for read in (open_input, read_whole, lambda path: parse_source(str(path))):
        with pytest.raises(
            StorageError, match=r"rows.jsonl is a pipe, and in 0 seconds no program wrote to it"
        ) as caught:
            read(pipe)
        assert caught.value.hint
    deadline = time.monotonic() + 10
    while threading.active_count() > threads:  # nobody waits on
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_a_pipe_whose_writer_comes_later_and_is_slow_is_read(pipe, monkeypatch):
    monkeypatch.setattr(input_files, "WRITER_SECONDS", 30)
    script = f"sleep 0.5; {{ sleep 1; printf '%s' '{ROW.decode().strip()}'; }} > {pipe}"
    with subprocess.Popen(["bash", "-c", script]):
        (prompt,) = read_prompts(pipe, system="")
    assert prompt.messages[0].content == "Is 1 a number?"


@pytest.mark.parametrize("pause", ["", "sleep 2; "], ids=["at once", "slowly"])
def test_what_a_shell_puts_in_place_of_a_file_is_read(pause):
    """``<(...)`` is a pipe under the name of an open file, whose writer may have ended already."""
    script = "import sys\nfrom pathlib import Path\nfrom sftcli import input_files\ninput_files.WRITER_SECONDS = 1\n"
    script += "print(input_files.read_whole(Path(sys.argv[1])).decode())"
    done = subprocess.run(
        ["bash", "-c", f"{sys.executable} -c '{script}' <({pause}echo here)"],
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout.strip() == "here"


def test_lines_of_a_text_end_as_on_any_system(tmp_path):
    (tmp_path / "it").write_bytes(b"a\r\nb\rc\n")
    assert read_whole_text(tmp_path / "it") == "a\nb\nc\n"
