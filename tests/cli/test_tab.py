"""Tab in a real bash on a real terminal."""

import os
import pty
import select
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.support.commands import run_command

SECONDS = 60
READY = "ready>"
KEPT = ("HOME", "LANG", "SFT_CACHE_DIR", "HF_HUB_OFFLINE", "COLUMNS")


class Shell:
    """A bash that knows the program's completions."""

    def __init__(self, folder: Path) -> None:
        program = folder / "sft"
        program.write_text(f'#!/bin/sh\nexec {sys.executable} -m sftcli "$@"\n', encoding="utf-8")
        program.chmod(0o755)
        keys = folder / "inputrc"
        keys.write_text("", encoding="utf-8")
        # Not the environment of the tests, nor the keys of who runs them.
        env = {name: os.environ[name] for name in KEPT if name in os.environ} | {
            "PATH": f"{folder}:{os.environ['PATH']}",
            "PS1": READY,
            "TERM": "dumb",
            "INPUTRC": str(keys),
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
        self.shown = ""

    def load(self) -> None:
        """Load the completions."""
        self.read(READY)
        self.type(". ./completions && echo load''ed\n")
        self.read("loaded")
        self.read(READY)

    def type(self, text: str) -> None:
        os.write(self.leader, text.encode())

    def read(self, until: str) -> str:
        """Return what was shown up to ``until``; what stands behind it is read next."""
        end = time.monotonic() + SECONDS
        while until not in self.shown:
            ready, _, _ = select.select([self.leader], [], [], max(end - time.monotonic(), 0))
            assert ready, f"{until!r} did not come within {SECONDS} s: {self.shown!r}"
            self.shown += os.read(self.leader, 4096).decode().replace("\x07", "")
        before, _, self.shown = self.shown.partition(until)
        return before + until

    def end(self) -> None:
        self.process.kill()
        self.process.wait()
        os.close(self.leader)


@pytest.fixture
def shell(tmp_path: Path):
    if shutil.which("bash") is None:
        pytest.skip("there is no bash here")
    bash = Shell(tmp_path)
    try:
        bash.load()
        yield bash
    finally:
        bash.end()


def test_no_space_stands_behind_a_setting_and_one_behind_a_word(shell: Shell):
    shell.type("sft train --set training.learning_r\t")
    shell.read("training.learning_rate=")
    shell.type("X\x15")  # Ctrl-U clears the line
    assert shell.read("X").startswith("X")
    shell.type("sft prese\t")
    shell.read("presets ")


@pytest.mark.parametrize(
    ("shell", "line"),
    [("bash", "complete -o default"), ("zsh", "#compdef sft"), ("fish", "complete --command sft")],
)
def test_the_script_of_the_shell_that_is_named_is_printed_whatever_runs_the_program(
    shell: str, line: str, tmp_path: Path
):
    said = run_command(["--show-completion", shell], tmp_path / "said")
    assert (said.code, line in said.text) == (0, True), said.text


@pytest.mark.parametrize("words", [["tcsh"], ["bash", "zsh"]])
def test_a_shell_without_completions_is_refused_by_name(words: list[str], tmp_path: Path):
    said = run_command(["--show-completion", *words], tmp_path / "said")
    assert said.code == 2
    assert "no completions for" in said.text
    assert "sft --show-completion bash" in said.text
