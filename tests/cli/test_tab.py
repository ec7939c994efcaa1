"""Tab in a real bash on a real terminal."""

import os
import pty
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest

SECONDS = 60
READY = "ready>"


class Shell:
    """A bash that knows the program's completions."""

    def __init__(self, folder: Path) -> None:
        program = folder / "sft"
        program.write_text(f'#!/bin/sh\nexec {sys.executable} -m sftcli "$@"\n', encoding="utf-8")
        program.chmod(0o755)
        env = {
            **os.environ,
            "PATH": f"{folder}:{os.environ['PATH']}",
            "PS1": "ready>",
            "TERM": "dumb",
            "INPUTRC": "/dev/null",
        }
        script = subprocess.run(
            [program, "--show-completion", "bash"], env=env, capture_output=True, check=True
        )
        (folder / "completions").write_bytes(script.stdout)
        self.leader, follower = pty.openpty()
        command = ["bash", "--norc", "--noprofile", "-i"]
        self.process = subprocess.Popen(
            command,
            stdin=follower,
            stdout=follower,
            stderr=follower,
            env=env,
            cwd=folder,
            start_new_session=True,
        )
        os.close(follower)
        self.read(READY)
        self.type(". ./completions\n")
        self.read(READY)

    def type(self, text: str) -> None:
        os.write(self.leader, text.encode())

    def read(self, until: str) -> str:
        """Return what was shown up to ``until``."""
        shown, begin = "", time.monotonic()
        while until not in shown.replace("\x07", ""):
            assert time.monotonic() - begin < SECONDS, shown
            shown += os.read(self.leader, 4096).decode()
        return shown.replace("\x07", "")

    def end(self) -> None:
        self.process.kill()
        self.process.wait()
        os.close(self.leader)


@pytest.fixture
def shell(tmp_path: Path):
    if shutil.which("bash") is None:
        pytest.skip("there is no bash here")
    bash = Shell(tmp_path)
    yield bash
    bash.end()


def test_no_space_stands_behind_a_setting_and_one_behind_a_word(shell: Shell):
    shell.type("sft train --set training.learning_r\t")
    shell.read("training.learning_rate=")
    shell.type("X\x15")  # Ctrl-U clears the line
    assert shell.read("X").startswith("X")
    shell.type("sft prese\t")
    shell.read("presets ")
