"""The view in a real process on a real terminal or pipe. The run is made of fixed events, so no model is needed."""

import fcntl
import json
import os
import pty
import re
import signal
import struct
import subprocess
import sys
import termios
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

PROGRAM = [sys.executable, "-m", "tests.support.fake_run"]
REPO = Path(__file__).parents[2]
ESCAPES = re.compile(r"\x1b\[[0-9;?]*[A-Za-z]")


def environment(**changes: str | None) -> dict[str, str]:
    env = {name: os.environ[name] for name in ("PATH", "HOME") if name in os.environ}
    env |= {"TERM": "xterm-256color", "PYTHONPATH": str(REPO), "LC_ALL": "C.UTF-8"}
    return env | {name: value for name, value in changes.items() if value is not None}


def on_terminal(*arguments: str, columns: int = 100, rows: int = 30, **env: str) -> tuple[int, str]:
    """Run with all three streams on a terminal; return the exit code and what the terminal was sent."""
    leader, follower = pty.openpty()
    fcntl.ioctl(follower, termios.TIOCSWINSZ, struct.pack("HHHH", rows, columns, 0, 0))
    command = [*PROGRAM, *arguments]
    process = subprocess.Popen(
        command, stdin=follower, stdout=follower, stderr=follower, env=environment(**env), cwd=REPO
    )
    os.close(follower)
    sent = read_all(leader)
    return process.wait(timeout=60), sent


def read_all(leader: int) -> str:
    parts = []
    try:
        while data := os.read(leader, 65536):
            parts.append(data)
    except OSError:  # how Linux says that the other end of a terminal is closed
        pass
    os.close(leader)
    return b"".join(parts).decode("utf-8", "surrogateescape").replace("\r\n", "\n")


def off_terminal(*arguments: str, **env: str) -> subprocess.CompletedProcess[bytes]:
    return subprocess.run(
        [*PROGRAM, *arguments],
        stdin=subprocess.DEVNULL,
        capture_output=True,
        env=environment(**env),
        cwd=REPO,
        timeout=60,
        check=False,
    )


@pytest.mark.parametrize("columns", [60, 120])
def test_the_live_view_works_on_a_terminal(columns: int) -> None:
    code, sent = on_terminal(columns=columns)
    assert code == 0
    assert sent.count("\x1b[?25l") == sent.count("\x1b[?25h") > 0
    assert sent.endswith("\x1b[?25h")
    last = ESCAPES.sub("", sent).splitlines()[-6:]
    assert [line[:9].strip() for line in last if line[0] != " "][-1] == "saved"
    assert all(len(line) < columns for line in last)
    assert "\x1b]" not in sent


@pytest.mark.parametrize(
    ("columns", "rows", "env"),
    [(20, 5, {}), (1, 1, {}), (100, 30, {"TERM": "dumb"}), (100, 30, {"CI": "true"})],
    ids=["narrow", "tiny", "dumb", "ci"],
)
def test_a_terminal_that_cannot_be_redrawn_gets_plain_lines(
    columns: int, rows: int, env: dict[str, str]
) -> None:
    code, sent = on_terminal(columns=columns, rows=rows, **env)
    assert code == 0
    assert "\x1b" not in sent
    assert "\r" not in sent
    assert "step 60/60 loss " in " ".join(
        sent.split()
    )  # lines are broken between words where they do not fit


@pytest.mark.parametrize("env", [{}, {"FORCE_COLOR": "1"}, {"TERM": "dumb"}], ids=["plain", "force", "dumb"])
def test_no_escape_leaves_a_terminal(env: dict[str, str]) -> None:
    done = off_terminal(**env)
    assert (done.returncode, done.stdout) == (0, b"")
    assert b"\nstep 60/60  loss " in done.stderr
    assert not re.search(rb"[\x1b\r\x07]", done.stderr)


def test_no_color_leaves_no_style() -> None:
    _, sent = on_terminal(NO_COLOR="1")
    assert "\x1b[1A" in sent
    assert not re.search(r"\x1b\[[0-9;]*m", sent)


def test_an_empty_no_color_is_ignored() -> None:
    _, sent = on_terminal(NO_COLOR="")
    assert re.search(r"\x1b\[[0-9;]*m", sent)


@pytest.mark.parametrize("on_tty", [True, False])
def test_a_terminal_without_unicode_gets_ascii(on_tty: bool) -> None:
    ascii_only = {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
    code, sent = (
        on_terminal(**ascii_only) if on_tty else (0, off_terminal(**ascii_only).stderr.decode("ascii"))
    )
    assert code == 0
    assert sent.isascii()
    assert r"\u2603" in sent


def test_an_answer_is_harmless_on_a_terminal_and_raw_in_a_pipe() -> None:
    _, sent = on_terminal("text")
    assert r"an answer \x1b]52;c;aGk=\x07" in sent
    assert b"an answer \x1b]52;c;aGk=\x07" in off_terminal("text").stdout


def test_a_reader_that_leaves_ends_the_command_in_silence() -> None:
    process = subprocess.Popen(
        [*PROGRAM, "text", "forever"],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env=environment(),
        cwd=REPO,
    )
    assert process.stdout is not None
    assert process.stderr is not None
    assert process.stdout.readline().startswith(b"an answer")
    process.stdout.close()
    assert process.stderr.read() == b""
    assert process.wait(timeout=60) == 141
    process.stderr.close()


@pytest.mark.parametrize(("redirect", "code"), [(">&-", 141), (">/dev/full", 74), ("2>&-", 0), ("<&-", 0)])
def test_streams_may_be_closed_or_full(redirect: str, code: int) -> None:
    command = f"exec {sys.executable} -m tests.support.fake_run text {redirect}"
    done = subprocess.run(
        ["sh", "-c", command], capture_output=True, env=environment(), cwd=REPO, timeout=60, check=False
    )
    assert done.returncode == code
    assert b"Exception ignored" not in done.stderr
    assert b"Traceback" not in done.stderr


@contextmanager
def waiting(*arguments: str) -> Iterator["subprocess.Popen[bytes]"]:
    """Start a run that goes on until it is stopped; it has begun, and does not outlive the block."""
    with subprocess.Popen(
        [*PROGRAM, "wait", *arguments],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env=environment(),
        cwd=REPO,
    ) as process:
        try:
            assert process.stdout is not None
            assert process.stdout.readline() == b"ready\n"
            yield process
        finally:
            process.kill()


@pytest.mark.parametrize(
    ("name", "code"), [("SIGINT", 130), ("SIGTERM", 143), ("SIGHUP", 129), ("SIGUSR1", 75)]
)
def test_a_signal_stops_a_run_at_the_next_step(name: str, code: int) -> None:
    with waiting() as process:
        process.send_signal(signal.Signals[name])
        _, err = process.communicate(timeout=60)
    assert process.returncode == code
    assert b"stopping after this step; press Ctrl-C again to quit now\n" in err
    assert b"training stopped at step" in err


def test_a_second_interrupt_ends_a_run_that_does_not_listen() -> None:
    with waiting("deaf", "-q") as process:
        process.send_signal(signal.SIGINT)
        assert process.stderr is not None
        assert process.stderr.readline().startswith(b"stopping")
        process.send_signal(signal.SIGINT)
        _, err = process.communicate(timeout=60)
    assert (process.returncode, err) == (130, b"interrupted\n")


def test_a_stopped_command_prints_its_object() -> None:
    with waiting("prepare", "--json") as process:
        process.send_signal(signal.SIGTERM)
        out, _ = process.communicate(timeout=60)
    failure = json.loads(out)
    assert (process.returncode, failure["exit_code"], failure["error"]["kind"]) == (143, 143, "stopped")


def test_a_closed_terminal_ends_a_run_as_a_hangup() -> None:
    leader, follower = pty.openpty()
    process = subprocess.Popen(
        [*PROGRAM, "wait"],
        stdin=follower,
        stdout=subprocess.PIPE,
        stderr=follower,
        env=environment(),
        cwd=REPO,
        preexec_fn=lambda: _take_terminal(follower),
    )
    os.close(follower)
    assert process.stdout is not None
    assert process.stdout.readline() == b"ready\n"
    os.close(leader)
    process.communicate(timeout=60)
    assert process.returncode == 129


def _take_terminal(follower: int) -> None:
    os.setsid()
    fcntl.ioctl(follower, termios.TIOCSCTTY, 0)
